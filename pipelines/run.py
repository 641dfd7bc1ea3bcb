"""A whole build: the stages in order, each checked against the one before, then the corpus is published."""

from __future__ import annotations

import platform
from importlib.metadata import version

import yaml

from pipelines import __version__, engine, ledger
from pipelines.corpus import CorpusError
from pipelines.engine import Context, Stage
from pipelines.forget import finish
from pipelines.preflight import preflight
from pipelines.progress import console, stage_progress
from pipelines.publish import publish, publish_latents
from pipelines.recipes import RECIPE
from pipelines.stages import STAGES
from pipelines.stages.build import BuildStage
from pipelines.stages.decide import DecideStage
from pipelines.stages.group import GroupStage
from pipelines.stages.ingest import IngestStage
from pipelines.stages.latents import LatentsStage
from pipelines.stages.pack import PackStage, packed_digests
from pipelines.stages.score import ScoreStage
from pipelines.storage import Folder
from schemas.latents import Latents

# What decides bytes: a corpus built with other versions of these may differ.
_VERSIONED = ("numpy", "opencv-python-headless", "pillow", "pyarrow", "controlnet_aux")


def build(context: Context, workers: int, address: str | None = None, until: str = "publish") -> None:
    """Bring a corpus up to date with its recipe and sources. An interrupted `forget` is ended first.

    Args:
        context: corpus, recipe and base of relative paths.
        workers: units at a time on Ray; 0 runs everything in this process without Ray.
        address: of a Ray cluster; None starts Ray on this machine.
        until: the last stage to run: ingest, score, neighbours, decide, annotate, pair, build, group, pack, latents
            or publish.

    Raises:
        schemas.recipe.RecipeError: a model that the recipe names is missing; nothing has run.
        pipelines.ledger.ConservationError: a stage lost an input.
    """
    finish(context.corpus)
    has_images = context.corpus.exists("work/images")  # if not: never built, or cleaned up after publishing
    if not has_images and _is_published(context):
        return
    preflight(context)
    if not has_images:
        for stage in (IngestStage.name, BuildStage.name, GroupStage.name):
            context.corpus.remove(f"{ledger.FOLDER}/{stage}")
    if workers:
        engine.connect(address, workers)
    kept: dict[str, int] = {}
    for name, kind in STAGES.items():
        if name == ScoreStage.name:
            preflight(context)  # of images that were not there before
        kept[name] = _run(kind(context), context, workers, _expected(name, context, kept), may_grow=bool(address))
        if name == until:
            return
    _publish(context)


def _expected(stage: str, context: Context, kept: dict[str, int]) -> int | None:
    """How many inputs a stage has to account for, if the stages before it say so.

    `neighbours` and `pair` count pairs, `annotate` leaves out finished samples, `build` makes several attempts per
    image, and `pack` counts samples.
    """
    images = kept.get(IngestStage.name)
    if stage == ScoreStage.name and images is not None:
        return images * len(context.recipe.scorers())
    return images if stage == DecideStage.name else None


def encode_latents(corpus: Folder, wanted: Latents, workers: int, address: str | None = None) -> None:
    """Add latents to a published corpus, which needs neither its recipe nor its sources for that.

    An interrupted `forget` is ended first.

    Raises:
        filters.models.ModelMissing: the VAE is not there.
    """
    sources = [{"name": "none", "type": "folder", "path": "."}]
    parts = {"name": "latents", "sources": sources, "build": {}, "latents": wanted.model_dump()}
    context = Context(corpus, RECIPE.model_validate(parts), ".")
    finish(corpus)
    stage = LatentsStage(context)
    stage.preflight()
    if workers:
        engine.connect(address, workers)
    _run(stage, context, workers, None, may_grow=bool(address))
    publish_latents(corpus)


def publish_parts(context: Context) -> None:
    """Pack the parts that are there and publish them, in this process."""
    finish(context.corpus)
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


def _run(stage: Stage, context: Context, workers: int, expected: int | None, *, may_grow: bool = False) -> int:
    tasks = stage.tasks()
    for warning in stage.warnings:
        console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)
    with stage_progress(stage.name, len(tasks)) as progress:
        markers = engine.run_stage(
            stage, context, tasks, workers, progress=progress, expected=expected, may_grow=may_grow
        )
    return ledger.totals(m.counts for m in markers)["kept"]


def _publish(context: Context) -> None:
    if not context.corpus.list("data", ".tar"):
        raise CorpusError(f"{context.corpus.url}: nothing to publish, as no sample was made. {_losses(context)}")
    publish(
        context.corpus,
        context.recipe.name,
        _recipe_text(context),
        {"x2i": __version__, "python": platform.python_version()} | {name: version(name) for name in _VERSIONED},
        packed_digests(context.corpus),
    )


def _losses(context: Context) -> str:
    """What became of the inputs that were not kept, in words."""
    found = [
        f"{stage} {fate} {sum(reasons.values()):,} ({', '.join(f'{why}: {n:,}' for why, n in reasons.items())})"
        for stage, fates in ledger.reasons(context.corpus).items()
        for fate, reasons in fates.items()
        if fate != "kept"
    ]
    return "; ".join(found) or "No input was refused: are there builders in the recipe that suit these images?"
