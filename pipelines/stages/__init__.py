"""The stages of a build, in the order in which they run."""

from __future__ import annotations

from typing import Any

from pipelines.engine import Context, Stage
from pipelines.recipes import RECIPE
from pipelines.stages.annotate import AnnotateStage
from pipelines.stages.build import BuildStage
from pipelines.stages.decide import DecideStage
from pipelines.stages.group import GroupStage
from pipelines.stages.ingest import IngestStage
from pipelines.stages.latents import LatentsStage
from pipelines.stages.neighbours import NeighboursStage
from pipelines.stages.pack import PackStage
from pipelines.stages.pair import PairStage
from pipelines.stages.score import ScoreStage
from pipelines.storage import Folder

STAGES: dict[str, type[Stage]] = {
    s.name: s
    for s in (
        *(IngestStage, ScoreStage, NeighboursStage, DecideStage, AnnotateStage, PairStage),
        *(BuildStage, GroupStage, PackStage, LatentsStage),
    )
}


def make_stage(name: str, corpus_url: str, recipe: dict[str, Any], base: str) -> Stage:
    """A stage from plain values: how a worker gets its own."""
    return STAGES[name](Context(Folder(corpus_url), RECIPE.model_validate(recipe), base))
