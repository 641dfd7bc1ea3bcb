"""Time of a training step, packed against padded.

    python benchmarks/train_step.py [--repeats 5]

The same 64 samples of the authors' mixture, at sizes and prompt lengths drawn once, through the same tiny model:
forward, backward and AdamW. *Padded* runs batches of eight in which every condition is as long as the longest and every
target as large as the largest; *packed* runs packs of 2,048 tokens. Both attend within samples only. Medians after
warm-up.

`official_way.py` compares with all that the public trainer does, `full_size.py` measures the full-size model on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from fine_tune.flow import flow_loss, interpolate
from fine_tune.model import OmniGen, OmniGenConfig
from fine_tune.optim import build_optimizer
from fine_tune.order import AUTHORS_MIXTURE, best_fit
from fine_tune.packing import Pack, Sequence, Size, pack
from fine_tune.presets import OptimConfig, tiny
from fine_tune.state import initialise

INPUT_IMAGES = {"text_to_image": 0, "subject": 2, "control": 1, "edit": 1, "other": 1}
PACKED = 2048  # tokens of a pack
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

    def step(self, packs: list[Pack]) -> None:
        """One update on random latents."""
        for layout in packs:
            inputs, targets = (
                [torch.randn(4, 2 * h, 2 * w) for h, w in sizes] for sizes in (layout.input_sizes, layout.target_sizes)
            )
            timestep = torch.rand(len(targets))
            pairs = [interpolate(x, torch.randn_like(x), t) for x, t in zip(targets, timestep, strict=True)]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    compare_packing(parser.parse_args().repeats)


if __name__ == "__main__":
    main()
