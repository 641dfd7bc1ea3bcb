"""A whole build: the stages in order, each checked against the one before, then the corpus is published."""

from __future__ import annotations

import platform
from importlib.metadata import version

import yaml

from pipelines import __version__, engine, ledger
from pipelines.engine import Context, Stage
from pipelines.preflight import preflight
from pipelines.progress import console, stage_progress
from pipelines.publish import Digest, publish
from pipelines.stages import STAGES
from pipelines.stages.build import BuildStage
from pipelines.stages.decide import DecideStage
from pipelines.stages.ingest import IngestStage
from pipelines.stages.pack import PackStage
from pipelines.stages.score import ScoreStage

# What decides bytes: a corpus built with other versions of these may differ.
_VERSIONED = ("numpy", "opencv-python-headless", "pillow", "pyarrow", "controlnet_aux")


def build(context: Context, workers: int, address: str | None = None, until: str = "publish") -> None:
    """Bring a corpus up to date with its recipe and sources.

    Args:
        context: corpus, recipe and base of relative paths.
        workers: units at a time on Ray; 0 runs everything in this process without Ray.
        address: of a Ray cluster; None starts Ray on this machine.
        until: the last stage to run: ingest, score, neighbours, decide, annotate, build, pack or publish.

    Raises:
        schemas.recipe.RecipeError: a model that the recipe names is missing; nothing has run.
        pipelines.ledger.ConservationError: a stage lost an input.
    """
    has_images = context.corpus.exists("work/images")  # if not: never built, or cleaned up after publishing
    if not has_images and _is_published(context):
        return
    preflight(context)
    if not has_images:
        for stage in (IngestStage.name, BuildStage.name):
            context.corpus.remove(f"{ledger.FOLDER}/{stage}")
    if workers:
        engine.connect(address, workers)
    kept: dict[str, int] = {}
    for name, kind in STAGES.items():
        if name == ScoreStage.name:
            preflight(context)  # of images that were not there before
        kept[name] = _run(kind(context), context, workers, _expected(name, context, kept))
        if name == until:
            return
    _publish(context)


def _expected(stage: str, context: Context, kept: dict[str, int]) -> int | None:
    """How many inputs a stage has to account for, if the stages before it say so.

    `neighbours` counts pairs, `annotate` leaves out finished samples, `build` makes several attempts per image, and
    `pack` counts samples.
    """
    images = kept.get(IngestStage.name)
    if stage == ScoreStage.name and images is not None:
        return images * len(context.recipe.scorers())
    return images if stage == DecideStage.name else None


def publish_parts(context: Context) -> None:
    """Pack the parts that are there and publish them, in this process."""
    _run(PackStage(context), context, 0, None)
    _publish(context)


def _is_published(context: Context) -> bool:
    """Whether the published corpus is what the recipe and its sources would give again."""
    if not context.corpus.exists("manifest.json"):
        return False
    recipe = context.corpus.read_bytes("recipe.yaml").decode()
    stages = (kind(context) for name, kind in STAGES.items() if name != PackStage.name)
    return recipe == _recipe_text(context) and all(engine.is_done(stage) for stage in stages)


def _recipe_text(context: Context) -> str:
    return yaml.safe_dump(context.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _run(stage: Stage, context: Context, workers: int, expected: int | None) -> int:
    tasks = stage.tasks()
    for warning in stage.warnings:
        console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)
    with stage_progress(stage.name, len(tasks)) as progress:
        markers = engine.run_stage(stage, context, tasks, workers, progress=progress, expected=expected)
    return ledger.totals(m.counts for m in markers)["kept"]


def _publish(context: Context) -> None:
    markers = ledger.read_markers(context.corpus, PackStage.name).values()
    shards = {name: made for m in markers for name, made in m.outputs.items() if name.endswith(".tar")}
    publish(
        context.corpus,
        context.recipe.name,
        _recipe_text(context),
        {"x2i": __version__, "python": platform.python_version()} | {name: version(name) for name in _VERSIONED},
        {name: Digest(**made) for name, made in shards.items()},
    )
