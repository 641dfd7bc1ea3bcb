"""Before a build starts: is everything there that the recipe names? Nothing is loaded and nothing is written."""

from __future__ import annotations

from builders.annotators.crop_features import CropFeatures
from builders.annotators.same_subject import SameSubject
from filters.models import ModelMissing
from pipelines import ledger
from pipelines.engine import Context
from pipelines.stages.annotate import AnnotateStage
from pipelines.stages.build import BuildStage
from pipelines.stages.decide import DecideStage, open_blocklists
from pipelines.stages.ingest import IngestStage, in_source_order
from pipelines.stages.latents import LatentsStage
from pipelines.stages.score import ScoreStage
from schemas.recipe import RecipeError


def preflight(context: Context) -> None:
    """Check the block lists, and the models of all scorers, annotators and builders that have work to do.

    A scorer that has seen every ingested image needs no model: thresholds can be changed where there is none.

    Raises:
        RecipeError: with the recipe's line of everything that is missing.
    """
    problems = [*_missing_models(context), *_missing_annotators(context)]
    problems += [*_missing_in_pairs(context), *_missing_in_builders(context)]
    try:
        LatentsStage(context).preflight()
    except ModelMissing as error:
        problems.append(str(context.recipe.error(("latents", error.parameter), error.message)))
    try:
        open_blocklists(context.recipe, context.base)
    except RecipeError as error:
        problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(problems))


def _missing_models(context: Context) -> list[str]:
    stage = ScoreStage(context)
    contents = {u: m.content for u, m in ledger.read_markers(context.corpus, IngestStage.name).items()}
    digests = {u: m.digest for u, m in ledger.read_markers(context.corpus, ScoreStage.name).items()}
    problems = []
    for name, scorer in stage.scorers.items():
        try:
            tasks = stage.scorer_tasks(name, contents)
            if not tasks or any(digests.get(t.unit) != t.digest for t in tasks):
                scorer.preflight()
        except ModelMissing as error:
            problems.append(str(context.recipe.error(("score", name, error.parameter), error.message)))
    return problems


def _missing_annotators(context: Context) -> list[str]:
    stage, recipe, problems = AnnotateStage(context), context.recipe, []
    digests = {u: m.digest for u, m in ledger.read_markers(context.corpus, AnnotateStage.name).items()}
    tasks = stage.tasks() if _is_decided(context) else []
    for name, annotator in stage.annotators.items():
        own = [task for task in tasks if task.payload["annotator"] == name]
        try:
            if not own or any(digests.get(t.unit) != t.digest for t in own):
                annotator.preflight()
        except ModelMissing as error:
            problems.append(str(recipe.error(("annotate", name, *error.parameter.split(".")), error.message)))
    return problems


def _is_decided(context: Context) -> bool:
    """Whether there is a verdict on every image; not so before the first build, and when a source was added."""
    verdicts = ledger.read_markers(context.corpus, DecideStage.name).get("all")
    units = in_source_order(context.recipe, ledger.read_markers(context.corpus, IngestStage.name))
    return verdicts is not None and all(ledger.ledger_path(DecideStage.name, u) in verdicts.outputs for u in units)


def _missing_in_pairs(context: Context) -> list[str]:
    recipe, rules = context.recipe, context.recipe.pair
    if rules is None:
        return []
    problems = []
    if CropFeatures.name not in recipe.annotators():
        problem = f"this needs the annotator {CropFeatures.name}; give it a section under `annotate:`"
        problems.append(str(recipe.error(("pair",), problem)))
    try:
        if rules.judge:
            SameSubject(rules.judge).preflight()
    except ModelMissing as error:
        problems.append(str(recipe.error(("pair", "judge", error.parameter), error.message)))
    return problems


def _missing_in_builders(context: Context) -> list[str]:
    recipe, problems = context.recipe, []
    for name, builder in BuildStage(context).builders.items():
        if missing := sorted(builder.required_annotators() - recipe.annotators().keys()):
            problem = f"this needs the annotator {' and '.join(missing)}; give it a section under `annotate:`"
            problems.append(str(recipe.error(("build", name), problem)))
        try:
            builder.preflight()
        except ModelMissing as error:
            problems.append(str(recipe.error(("build", name, *error.parameter.split(".")), error.message)))
    return problems
