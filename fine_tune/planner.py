"""Whether a run fits the memory of its devices, known before anything is loaded, and what to change if it does not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch

from fine_tune import packing
from fine_tune.index import Corpus, CountRule, fitted_sizes, open_index
from fine_tune.memory import Memory, measure
from fine_tune.model import Checkpointing
from fine_tune.order import Draw, Plan, stream_shares
from fine_tune.presets import Config, ConfigError, override
from fine_tune.state import load_tokenizer
from schemas.vocabulary import STREAMS

USABLE = 0.92
"""Share of a device's memory that a plan may fill; the rest is for the CUDA context, workspaces and fragments."""

TEXT_TOKENS = 128
"""Of a sample where no corpus says how many; few prompts are longer."""

_STEP = 256  # rows by which a pack is lengthened to see what a row takes
_ADAPTER_WAYS: tuple[tuple[str, ...], ...] = (("model.dtype=bfloat16",),)
_FULL_WAYS: tuple[tuple[str, ...], ...] = (
    ("model.dtype=float32", "optim.name=adamw", "optim.offload=false"),
    ("model.dtype=bfloat16", "optim.name=adamw8bit", "optim.offload=false"),
    ("model.dtype=bfloat16", "optim.name=adamw_sr", "optim.offload=false"),
    ("model.dtype=bfloat16", "optim.name=adamw", "optim.offload=true"),
)


@dataclass(frozen=True)
class Candidate:
    """One way to train.

    Attributes:
        settings: what differs from the configuration, as assignments; empty for the configuration itself.
        budget: tokens per pack, at most, that fit; 0 if nothing does.
    """

    settings: tuple[str, ...]
    memory: Memory
    budget: int

    @property
    def fits(self) -> bool:
        return self.budget > 0


@dataclass(frozen=True)
class Planner:
    """Tries ways to train on given devices.

    Attributes:
        sequences: of the largest pack.
        limit: bytes of memory of each device.
        device: `cuda` or `cpu`, whether it is there or not.
    """

    config: Config
    sequences: Sequence[packing.Sequence]
    limit: int
    device: str = "cuda"
    ranks: int = 1

    @property
    def usable(self) -> int:
        """Bytes that a plan may fill."""
        return int(self.limit * USABLE)

    def propose(self) -> list[Candidate]:
        """The configured way first; then the others, each up to the least recomputation with which it fits."""
        candidates = [self._try(self.config)]
        for way in self.ways():
            for level in get_args(Checkpointing):
                changed = override(self.config, [*way, f"model.gradient_checkpointing={level}"])
                if changed == self.config:
                    candidate = candidates[0]
                else:
                    candidate = self._try(changed)
                    candidates.append(candidate)
                if candidate.fits:
                    break
        return candidates

    def ways(self) -> tuple[tuple[str, ...], ...]:
        """Dtypes and optimizers, as assignments, the best first. Of those for one device, several take the first."""
        ways = _FULL_WAYS if self.config.model.adapter == "none" else _ADAPTER_WAYS
        return ways[:1] if self.ranks > 1 else ways

    def measure(self, config: Config | None = None, more_rows: int = 0) -> Memory:
        """Of the configuration, or another one."""
        rows = sum(map(len, self.sequences))
        if self.device == "cuda":  # where packs are padded
            rows = max(rows, self.config.data.budget)
        return measure(config or self.config, self.sequences, self.device, self.ranks, rows + more_rows)

    def _try(self, config: Config) -> Candidate:
        memory = self.measure(config)
        budget = 0
        if memory.total <= self.usable:
            # Rows cost what they add while the network runs; encoding and updating do not grow with them.
            network = memory.peaks["network"]
            per_row = (self.measure(config, _STEP).peaks["network"] - network) / _STEP
            budget = config.data.budget + int((self.usable - memory.static - network) / per_row)
        return Candidate(_changes(self.config, config), memory, budget)


def _changes(base: Config, config: Config) -> tuple[str, ...]:
    before, after = base.to_dict(), config.to_dict()
    return tuple(
        f"{section}.{key}={str(value).lower() if isinstance(value, bool) else value}"
        for section in ("model", "optim")
        for key, value in after[section].items()
        if value != before[section][key]
    )


def check_memory(config: Config, device: torch.device, ranks: int = 1) -> None:
    """Refuse a run that will not fit the device, or `run.memory_gb` where that is given.

    Raises:
        ConfigError: names what would fit.
    """
    if device.type != "cuda" and not config.run.memory_gb:
        return
    config = largest_stage(config)
    planner = Planner(config, typical_pack(config), device_memory(config), device.type, ranks)
    memory = planner.measure()
    if memory.total <= planner.usable:
        return
    found = [candidate for candidate in planner.propose() if candidate.fits]
    remedy = "; ".join(f"{' '.join(c.settings)} ({c.memory.total / 1e9:.3g} GB)" for c in found)
    remedy = remedy or "nothing with this data.max_side and data.budget"
    raise ConfigError(
        f"a step takes {memory.total / 1e9:.3g} GB on each device, and {planner.usable / 1e9:.3g} of its "
        f"{planner.limit / 1e9:.3g} GB are usable. What fits: {remedy}. "
        "`x2i train --plan` shows more."
    )


def device_memory(config: Config) -> int:
    """Bytes that a device has, or may use.

    Raises:
        ConfigError: nobody says.
    """
    if config.run.memory_gb:
        return int(config.run.memory_gb * 1e9)
    if not torch.cuda.is_available():
        raise ConfigError("no CUDA device to plan for: give --memory, as 80GB")
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def largest_stage(config: Config) -> Config:
    """The settings of the stage with the longest packs; of a run without stages its own."""
    return max((config.at_stage(n + 1) for n in range(config.num_stages)), key=lambda stage: stage.data.budget)


def typical_pack(config: Config) -> list[packing.Sequence]:
    """A pack full of text-to-image samples of the largest size, for want of a corpus.

    Raises:
        ConfigError: none fits.
    """
    side = config.data.max_side // 16
    sequence = packing.Sequence(np.ones(TEXT_TOKENS, np.int64), [], [], (side, side), config.flow.draws)
    number = config.data.budget // len(sequence)
    if not number:
        raise ConfigError(
            f"an image of data.max_side={config.data.max_side} takes {len(sequence)} tokens with its prompt, more than "
            f"data.budget={config.data.budget}: raise the budget or lower the side"
        )
    return [sequence] * number


def largest_pack(config: Config) -> list[packing.Sequence]:
    """The longest of the first packs of a run on its corpus.

    Raises:
        CorpusError: there is nothing to train on.
    """
    data = config.data
    corpus = Corpus(data.corpus)
    draws = config.flow.draws
    rule = CountRule(load_tokenizer(config.model), data.max_side, data.budget, data.other_sides, draws)
    index = open_index(corpus, data.split, rule)
    plan = Plan(index, stream_shares(index, data.mixture), data.seed, data.budget, data.block)
    longest = max(plan.block(0), key=lambda pack: sum(draw.tokens for draw in pack))
    return [_sequence(corpus, draw, data.max_side, draws) for draw in longest]


def _sequence(corpus: Corpus, draw: Draw, max_side: int, draws: int) -> packing.Sequence:
    """What the index knows of a sample, each of its images shown once."""
    inputs = len(STREAMS[draw.stream.name].inputs)
    sizes = fitted_sizes(corpus.row(draw.stream, draw.item), inputs, draw.side or max_side)
    *shown, target = [packing.patches_of(height, width) for height, width in sizes]
    spans, stop = [], 0
    for height, width in shown:
        spans.append((stop, stop + height * width))
        stop += height * width
    condition = draw.tokens - draws * (1 + target[0] * target[1])
    return packing.Sequence(np.ones(condition, np.int64), spans, shown, target, draws)


def parse_memory(text: str) -> int:
    """`80GB` or `40GiB` in bytes; ConfigError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB)", text.strip())
    if not match:
        raise ConfigError(f"--memory {text!r} is not a size such as 80GB or 40GiB")
    return int(float(match[1]) * (1e9 if match[2] == "GB" else 2**30))
