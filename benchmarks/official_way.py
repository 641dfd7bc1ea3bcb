"""A training step as x2i makes it against one as the public trainer of OmniGen makes it.

    python benchmarks/official_way.py [--repeats 5] [--collate-repeats 3]

The same 64 samples of the authors' mixture at up to 256 px, the same `tiny` weights, forward, backward and AdamW in
float32, all ways in turns:

* **official**: batches of 8. Conditions are padded on the left and targets on the right to the longest of the batch; a
  dense float32 mask [B, L, L] is built for every batch and made additive; every image goes through the VAE alone, in
  the step; all blocks are recomputed. (VectorSpaceLab/OmniGen, `train.py`, `processor.py`, `train_helper/`.)
* **x2i**: packs of 2,048 tokens without padding, one interval per row for a mask, latents encoded beforehand.

Between them, the official way with latents encoded beforehand, and x2i with the VAE in the step. The VAE is the small
one that ships with the code; SDXL's would weigh more. Then the time to collate one sample with three input images of
1024 x 1024 px, 16,445 tokens: the official mask alone against a whole pack.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from train_step import BATCH, PACKED, make_sequence, mixed_sequences

from fine_tune import packing
from fine_tune.attention import Attend, IntervalMask
from fine_tune.flow import flow_loss, interpolate
from fine_tune.model import OmniGen, OmniGenConfig
from fine_tune.optim import build_optimizer
from fine_tune.order import best_fit
from fine_tune.packing import Pack, Size, pack
from fine_tune.presets import OptimConfig, tiny
from fine_tune.state import initialise, load_vae
from fine_tune.vae import FrozenVAE


class PaddedOmniGen(OmniGen):
    """The same network on a padded batch under a dense mask."""

    dense_mask: Tensor

    def _prepare(self, mask: IntervalMask) -> Attend:
        return partial(_attend_padded, mask=self.dense_mask)


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Rows [B * L, H, K] under an additive mask [B, 1, L, L]."""
    q, k, v = (x.unflatten(0, (len(mask), -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype)).transpose(1, 2).flatten(0, 1)


def build_mask(sequences: Sequence[packing.Sequence]) -> Tensor:
    """float32 [B, L, L], 1 where attention is allowed: causal, and bidirectional within an image; padding sees all."""
    condition = max(len(s.token_ids) for s in sequences)
    length = condition + 1 + max(s.num_target_tokens for s in sequences)
    masks = []
    for sequence in sequences:
        start = condition - len(sequence.token_ids)
        stop = condition + 1 + sequence.num_target_tokens
        mask = torch.ones(length, length).tril()
        for first, last in [*sequence.image_spans, (len(sequence.token_ids) + 1, len(sequence))]:
            mask[start + first : start + last, start + first : start + last] = 1
        mask[:, :start] = 0
        mask[:, stop:] = 0
        mask[:start] = 1
        mask[stop:] = 1
        masks.append(mask)
    return torch.stack(masks)


def collate_padded(sequences: Sequence[packing.Sequence]) -> tuple[Pack, Tensor]:
    """A padded batch as rows, padding as text of token 0, and its additive mask [B, 1, L, L]."""
    mask = build_mask(sequences)
    additive = ((1.0 - mask) * torch.finfo(mask.dtype).min)[:, None]
    condition = max(len(s.token_ids) for s in sequences)
    length = mask.shape[1]
    token_ids, positions = np.zeros((2, len(sequences), length), np.int64)
    is_input, is_target = np.zeros((2, len(sequences), length), bool)
    for row, sequence in enumerate(sequences):
        start = condition - len(sequence.token_ids)
        token_ids[row, start:condition] = sequence.token_ids
        positions[row, start : start + len(sequence)] = np.arange(len(sequence))
        for first, last in sequence.image_spans:
            is_input[row, start + first : start + last] = True
        is_target[row, condition + 1 : condition + 1 + sequence.num_target_tokens] = True
    time_rows = np.arange(len(sequences)) * length + condition
    is_text = ~(is_input | is_target)
    is_text.reshape(-1)[time_rows] = False
    lo = torch.zeros(1, dtype=torch.int32)
    tokens = [s.num_target_tokens for s in sequences]
    layout = Pack(
        token_ids=torch.from_numpy(token_ids.ravel()),
        position_ids=torch.from_numpy(positions.ravel()),
        use_long_rope=torch.zeros(token_ids.size, dtype=torch.bool),
        mask=IntervalMask(lo, lo + 1, 1),  # not used
        text_rows=torch.from_numpy(np.flatnonzero(is_text)),
        input_rows=torch.from_numpy(np.flatnonzero(is_input)),
        time_rows=torch.from_numpy(time_rows),
        target_rows=torch.from_numpy(np.flatnonzero(is_target)),
        target_draw=torch.from_numpy(np.repeat(np.arange(len(sequences)), tokens)),
        input_sizes=[size for s in sequences for size in s.input_sizes],
        target_sizes=[s.target_size for s in sequences],
        num_tokens=sum(map(len, sequences)),
        attended_pairs=int(mask.sum()),
    )
    return layout, additive


@dataclass
class Way:
    """One way to make a step.

    Attributes:
        encodes: images go through the VAE in the step, one by one or batched by size.
    """

    name: str
    model: OmniGen
    optimizer: torch.optim.Optimizer
    groups: list[list[packing.Sequence]]
    encodes: Callable[[list[Tensor]], list[Tensor]] | None = None

    def run(self) -> None:
        """One update on all samples."""
        device = self.model.embed_tokens.weight.device
        for sequences in self.groups:
            if isinstance(self.model, PaddedOmniGen):
                layout, mask = collate_padded(sequences)
                self.model.dense_mask = mask.to(device)
            else:
                layout = pack(sequences)
            self._backward(layout.to(device))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, layout: Pack) -> None:
        device = layout.token_ids.device
        sizes = [*layout.input_sizes, *layout.target_sizes]
        latents = self.encodes([_image(size, device) for size in sizes]) if self.encodes else _latents(sizes, device)
        inputs, targets = latents[: len(layout.input_sizes)], latents[len(layout.input_sizes) :]
        timestep = torch.rand(len(targets), device=device)
        pairs = [interpolate(x, torch.randn_like(x), t) for x, t in zip(targets, timestep, strict=True)]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            velocities = self.model(layout, inputs, [noisy for noisy, _ in pairs], timestep)
        flow_loss(velocities, [velocity for _, velocity in pairs], [None] * len(pairs)).loss.backward()


def _image(size: Size, device: torch.device) -> Tensor:
    return torch.rand(3, 16 * size[0], 16 * size[1], device=device)


def _latents(sizes: list[Size], device: torch.device) -> list[Tensor]:
    return [torch.randn(4, 2 * h, 2 * w, device=device) for h, w in sizes]


def encode_singly(vae: FrozenVAE, images: list[Tensor]) -> list[Tensor]:
    return [vae.encode(image).mean for image in images]


def encode_batched(vae: FrozenVAE, images: list[Tensor]) -> list[Tensor]:
    return [posterior.mean for posterior in vae.encode(images)]


def make_ways(sequences: list[packing.Sequence], config: OmniGenConfig, vae: FrozenVAE) -> list[Way]:
    batches = [sequences[start : start + BATCH] for start in range(0, len(sequences), BATCH)]
    packs = [[sequences[i] for i in members] for members in best_fit([len(s) for s in sequences], PACKED)]

    def way(name: str, kind: type[OmniGen], groups: list[list[packing.Sequence]], encodes: object = None) -> Way:
        model = kind(config)
        initialise(model, torch.Generator().manual_seed(0))
        if kind is PaddedOmniGen:
            model.set_checkpointing("full")
        return Way(name, model, build_optimizer(model.parameters(), OptimConfig(), 0), groups, encodes)  # type: ignore[arg-type]

    return [
        way("official", PaddedOmniGen, batches, partial(encode_singly, vae)),
        way("official, latents encoded beforehand", PaddedOmniGen, batches),
        way("x2i, VAE in the step", OmniGen, packs, partial(encode_batched, vae)),
        way("x2i, latents encoded beforehand", OmniGen, packs),
    ]


def compare_steps(repeats: int, samples: int) -> None:
    """Print tokens/s of each way, and how often faster than the official one."""
    sequences = mixed_sequences(samples, np.random.default_rng(0), side=16)
    config = tiny()
    ways = make_ways(sequences, OmniGenConfig(**config.model.architecture), load_vae(config.model, torch.device("cpu")))
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for number in range(repeats + 1):  # in turns, so that a change of the machine's speed meets all; the first warms up
        for way in ways:
            start = time.perf_counter()
            way.run()
            if number:
                seconds[way.name].append(time.perf_counter() - start)
    tokens = sum(map(len, sequences))
    print(f"{len(sequences)} samples, {tokens:,} tokens, tiny model, CPU, medians of {repeats}\n")
    print("| way | seconds | tokens/s | times official (least to most) |\n|---|---|---|---|")
    official = seconds["official"]
    for name, taken in seconds.items():
        ratios = [theirs / ours for ours, theirs in zip(taken, official, strict=True)]
        median = statistics.median(taken)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {median:.2f} | {tokens / median:,.0f} | {spread} |", flush=True)


def compare_collating(repeats: int, side: int) -> None:
    """Print the time to lay out one sample of three input images, and to build its mask."""
    patches = (side // 16, side // 16)
    sequence = make_sequence(60, [patches] * 3, patches)
    print(
        f"\ncollating one sample with three images of {side} x {side}, {len(sequence):,} tokens, medians of {repeats}"
    )
    for name, collate in (("official, dense mask", build_mask), ("x2i, pack", pack)):
        taken = []
        for _ in range(repeats):
            start = time.perf_counter()
            collate([sequence])
            taken.append(time.perf_counter() - start)
        print(f"* {name}: {1e3 * statistics.median(taken):,.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--collate-repeats", type=int, default=3)
    parser.add_argument("--collate-side", type=int, default=1024)
    options = parser.parse_args()
    compare_collating(options.collate_repeats, options.collate_side)
    compare_steps(options.repeats, options.samples)


if __name__ == "__main__":
    main()
