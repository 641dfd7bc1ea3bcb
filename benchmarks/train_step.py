"""Time of a training step: packed against padded, and on a GPU the full-size model in all ways it can be trained.

    python benchmarks/train_step.py [--repeats 5] [--cpu-only]

* **packed against padded** (any machine): the same 64 samples of the authors' mixture, at sizes and prompt lengths
  drawn once, through the same tiny model: forward, backward and AdamW. *Padded* runs batches of eight in which every
  condition is as long as the longest and every target as large as the largest, as the public trainer computes;
  *packed* runs packs of 2,048 tokens. Both attend within samples only.
* **full size** (CUDA): OmniGen-v1's 3.76 B parameters with random weights, packs of 8,448 rows, per way to train, side,
  task and attention kernel: tokens/s, MFU by exact FLOPs, and the peak of memory.

The VAE is not timed. Medians of `--repeats` after warm-up.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch

from fine_tune.adapters import add_adapter
from fine_tune.attention import Backend
from fine_tune.flow import flow_loss, interpolate
from fine_tune.metrics import peak_flops, training_flops
from fine_tune.model import OmniGen, OmniGenConfig
from fine_tune.optim import build_optimizer
from fine_tune.order import AUTHORS_MIXTURE, best_fit
from fine_tune.packing import Pack, Sequence, Size, pack
from fine_tune.presets import BLOCK_LINEARS, ModelConfig, OptimConfig, tiny
from fine_tune.state import initialise

INPUT_IMAGES = {"text_to_image": 0, "subject": 2, "control": 1, "edit": 1, "other": 1}
BUDGET = 8448
PACKED = 2048  # tokens of a pack beside it
BATCH = 8  # samples of a padded batch, as at 256 px in the paper


def make_sequence(text: int, inputs: list[Size], target: Size) -> Sequence:
    """A condition of `text` tokens with its images in front."""
    spans: list[tuple[int, int]] = []
    ids: list[int] = []
    for h, w in inputs:
        spans.append((len(ids), len(ids) + h * w))
        ids += [0] * (h * w)
    return Sequence(np.array(ids + [5] * text), spans, inputs, target)


def mixed_sequences(number: int, rng: np.random.Generator, side: int) -> list[Sequence]:
    """Samples of the authors' mixture with images of `side` patches on the longer side and 24 to 96 text tokens."""
    tasks = rng.choice(list(AUTHORS_MIXTURE), size=number, p=list(AUTHORS_MIXTURE.values()))

    def size() -> Size:
        short = int(rng.integers(side // 2, side + 1))
        return (short, side) if rng.random() < 0.5 else (side, short)

    sequences = []
    for task in tasks:
        target = size()
        same_size = task in ("edit", "control")
        inputs = [target if same_size else size() for _ in range(INPUT_IMAGES[str(task)])]
        sequences.append(make_sequence(int(rng.integers(24, 97)), inputs, target))
    return sequences


@dataclass
class Trainee:
    """A model with its optimizer."""

    model: OmniGen
    optimizer: torch.optim.Optimizer
    adapter_parameters: int = 0

    def step(self, packs: list[Pack]) -> None:
        """One update on random latents."""
        device = self.model.embed_tokens.weight.device
        for layout in packs:
            inputs, targets = (
                [torch.randn(4, 2 * h, 2 * w, device=device) for h, w in sizes]
                for sizes in (layout.input_sizes, layout.target_sizes)
            )
            timestep = torch.rand(len(targets), device=device)
            pairs = [interpolate(x, torch.randn_like(x), t) for x, t in zip(targets, timestep, strict=True)]
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                predictions = self.model(layout, inputs, [noisy for noisy, _ in pairs], timestep)
            flow_loss(predictions, [velocity for _, velocity in pairs], [None] * len(pairs)).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def measure(step: Callable[[], None], repeats: int, warm_up: int = 2) -> float:
    """Median seconds of a step."""
    seconds = []
    for number in range(warm_up + repeats):
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= warm_up:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def pad_batch(sequences: list[Sequence]) -> Pack:
    """A batch as the public trainer makes it: every condition as long as the longest, every target as the largest.

    Padding is computed like any other row, as there; it only attends within its own sample.
    """
    condition = max(len(sequence.token_ids) for sequence in sequences)
    target = max((sequence.target_size for sequence in sequences), key=lambda size: size[0] * size[1])
    return pack(
        [
            replace(
                sequence,
                token_ids=np.pad(np.asarray(sequence.token_ids), (0, condition - len(sequence.token_ids))),
                target_size=target,
            )
            for sequence in sequences
        ]
    )


def compare_packing(repeats: int) -> None:
    """Print the time of the same samples packed and padded."""
    sequences = mixed_sequences(64, np.random.default_rng(0), side=16)
    lengths = [len(sequence) for sequence in sequences]
    model = OmniGen(OmniGenConfig(**tiny().model.architecture))
    initialise(model, torch.Generator().manual_seed(0))
    trainee = Trainee(model, build_optimizer(model.parameters(), OptimConfig(), 0))
    ways = {
        "packed": [pack([sequences[i] for i in members]) for members in best_fit(lengths, PACKED)],
        "padded": [pad_batch(sequences[start : start + BATCH]) for start in range(0, len(sequences), BATCH)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):  # in turns, so that a change of the machine's speed meets both
        for name, packs in ways.items():
            seconds[name].append(measure(lambda p=packs: trainee.step(p), repeats=1, warm_up=1))  # type: ignore[misc]
    real = sum(lengths)
    print(f"{len(sequences)} samples, {real} tokens, tiny model, CPU, medians of {repeats}\n")
    print("| way | rows | of them tokens | seconds | tokens/s |\n|---|---|---|---|---|")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, packs in ways.items():
        rows = sum(len(layout.token_ids) for layout in packs)
        print(f"| {name} | {rows} | {real / rows:.0%} | {medians[name]:.2f} | {real / medians[name]:,.0f} |")
    ratios = [padded / packed for packed, padded in zip(seconds["packed"], seconds["padded"], strict=True)]
    low, high = min(ratios), max(ratios)
    print(f"\npacked is {statistics.median(ratios):.2f} times as fast ({low:.2f} to {high:.2f})\n")


def full_size_trainees() -> Iterator[tuple[str, Trainee]]:
    """OmniGen-v1 with random weights on the GPU, one after another."""
    device = torch.device("cuda")
    ways = {
        "LoRA r16, bf16 base": (torch.bfloat16, OptimConfig(), False),
        "full, fp32 weights, checkpointing": (torch.float32, OptimConfig(), True),
        "full, bf16 weights, rounding, checkpointing": (torch.bfloat16, OptimConfig(name="adamw_sr"), True),
    }
    for name, (dtype, optim, checkpointing) in ways.items():
        with device:
            torch.set_default_dtype(dtype)
            model = OmniGen(OmniGenConfig())
            torch.set_default_dtype(torch.float32)
        initialise(model, torch.Generator(device).manual_seed(0))
        adapter_parameters = 0
        if name.startswith("LoRA"):
            add_adapter(model, ModelConfig(adapter="lora", adapter_rank=16, adapter_targets=BLOCK_LINEARS), 0)
            adapter_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        model.gradient_checkpointing = checkpointing
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        yield name, Trainee(model, build_optimizer(trained, optim, 0), adapter_parameters)
        del model, trained
        gc.collect()
        torch.cuda.empty_cache()


def full_pack(side: int, task: str, device: str) -> Pack:
    """As many samples of one kind as the budget holds."""
    patches = (side // 16, side // 16)
    sequence = make_sequence(80, [patches] if task == "edit" else [], patches)
    return pack([sequence] * (BUDGET // len(sequence)), pad_to=BUDGET).to(device)


def measure_full_size(repeats: int) -> None:
    """Print tokens/s, MFU and memory of the full-size model."""
    name_of_device = torch.cuda.get_device_name()
    peak = peak_flops(torch.device("cuda"))
    print(f"{name_of_device}, packs of {BUDGET} rows, medians of {repeats}\n")
    print(
        "| training | side | task | attention | s/step | tokens/s | MFU | peak GB |\n|---|---|---|---|---|---|---|---|"
    )
    backends: tuple[Backend, ...] = ("flex", "sdpa")
    for name, trainee in full_size_trainees():
        for side, task, backend in product((512, 1024), ("t2i", "edit"), backends):
            layout = full_pack(side, task, "cuda")
            trainee.model.attention_backend = backend
            torch.cuda.reset_peak_memory_stats()
            row = f"| {name} | {side} | {task} | {backend} "
            try:
                seconds = measure(lambda t=trainee, p=layout: t.step([p]), repeats)  # type: ignore[misc]
            except torch.OutOfMemoryError:
                trainee.optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                print(f"{row}| out of memory | | | |", flush=True)
                continue
            flops = training_flops(
                trainee.model.config, layout.num_tokens, layout.attended_pairs, trainee.adapter_parameters
            )
            mfu = f"{flops / seconds / peak:.1%}" if peak else "unknown peak"
            memory = torch.cuda.max_memory_allocated() / 1e9
            print(f"{row}| {seconds:.3f} | {layout.num_tokens / seconds:,.0f} | {mfu} | {memory:.1f} |", flush=True)
        del trainee


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of a training step.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu-only", action="store_true", help="leave the full-size model out")
    options = parser.parse_args()
    compare_packing(options.repeats)
    if options.cpu_only:
        return
    if not torch.cuda.is_available():
        print("no CUDA device: the full-size model is not measured")
        return
    measure_full_size(options.repeats)


if __name__ == "__main__":
    main()
