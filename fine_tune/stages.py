"""Progressive training: the stages of a run, those of the paper, and how they are scaled to what one has."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage: what takes the place of the settings of these names in it.

    Attributes:
        steps: of this stage alone, and so is `warmup_steps`.
    """

    steps: int
    max_side: int
    other_sides: tuple[int, ...] = ()
    budget: int
    packs_per_step: int
    lr: float
    warmup_steps: int = 0
    __pydantic_config__ = STRICT


@dataclass(frozen=True, kw_only=True)
class StagesConfig:
    """Stages that follow one another in one run.

    A step takes the same samples on any number of devices, as each accumulates its share. What does change the batch
    changes the learning rate by the square root of the same factor (the rule for Adam of arXiv:2205.10287; its changes
    of beta and epsilon are left out).

    Attributes:
        table: the stages by number, from "1" on; without any, the other settings are the one stage there is.
        scale_steps: factor of the steps of all stages.
        scale_batch: factor of the packs per step of all stages.
        ranks: number of devices; packs per step are rounded to a multiple of it.
    """

    table: dict[str, StageConfig] = field(default_factory=dict)
    scale_steps: float = 1.0
    scale_batch: float = 1.0
    ranks: int = 1
    __pydantic_config__ = STRICT

    def scaled(self) -> list[StageConfig]:
        """The stages in order, after the factors."""
        return [self._scaled(stage) for stage in self.table.values()]

    def _scaled(self, stage: StageConfig) -> StageConfig:
        packs = max(1, round(stage.packs_per_step * self.scale_batch / self.ranks)) * self.ranks
        return replace(
            stage,
            steps=max(1, round(stage.steps * self.scale_steps)),
            warmup_steps=round(stage.warmup_steps * self.scale_steps),
            packs_per_step=packs,
            lr=stage.lr * math.sqrt(packs / stage.packs_per_step),
        )


def _paper(steps: int, global_batch: int, lr: float, max_side: int, *other_sides: int) -> StageConfig:
    """A row of arXiv:2409.11340, table 1; the batch, in samples there, is the tokens of as many text-to-image ones."""
    budget = 16_896 if max_side <= 1024 else 21_120
    tokens = sum((side // 16) ** 2 + 128 for side in (max_side, *other_sides)) / (1 + len(other_sides))
    return StageConfig(
        steps=steps,
        max_side=max_side,
        other_sides=other_sides,
        budget=budget,
        packs_per_step=math.ceil(global_batch * tokens / budget),
        lr=lr,
    )


# The paper does not say which resolutions its last stage has; here it has all of those before, in equal shares.
PAPER = {
    "1": _paper(500_000, 1040, 1e-4, 256),
    "2": _paper(300_000, 520, 1e-4, 512),
    "3": _paper(100_000, 208, 4e-5, 1024),
    "4": _paper(30_000, 104, 2e-5, 2240),
    "5": _paper(80_000, 104, 2e-5, 2240, 256, 512, 1024),
}


def _tiny(steps: int, lr: float, max_side: int, *other_sides: int) -> StageConfig:
    return StageConfig(steps=steps, max_side=max_side, other_sides=other_sides, budget=384, packs_per_step=1, lr=lr)


TINY = {
    "1": _tiny(20, 1e-3, 32),
    "2": _tiny(20, 1e-3, 48),
    "3": _tiny(20, 4e-4, 64),
    "4": _tiny(20, 2e-4, 96),
    "5": _tiny(20, 2e-4, 96, 32, 48, 64),
}
"""The same at toy sizes."""
