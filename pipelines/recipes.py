"""The recipe model with the builders, scorers and annotators that exist, and how to load a recipe with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from builders.annotators.registry import ANNOTATORS
from builders.registry import BUILDERS
from filters.scorers.registry import SCORERS
from schemas.arrow import IMAGES
from schemas.decide import EmbeddingList, PHashList
from schemas.recipe import Recipe, RecipeError, did_you_mean, load_recipe, recipe_model

RECIPE = recipe_model(
    {name: builder.Params for name, builder in BUILDERS.items()},
    {name: scorer.Params for name, scorer in SCORERS.items()},
    {name: annotator.Params for name, annotator in ANNOTATORS.items()},
)

_OF_IMAGES = ("width", "height", "source_width", "source_height", "license")
_DERIVED = {"min_side": pa.int32(), "aspect": pa.float64(), "pixels": pa.int64()}
_KINDS = {
    "numeric": lambda t: pa.types.is_integer(t) or pa.types.is_floating(t) or pa.types.is_boolean(t),
    "phash": pa.types.is_uint64,
    "embedding": lambda t: hasattr(t, "value_type") and pa.types.is_floating(t.value_type),
}


def load(path: str | Path) -> Recipe:
    """Read and check a recipe file.

    Raises:
        schemas.recipe.RecipeError: with the line of every mistake.
    """
    recipe = load_recipe(path, RECIPE)
    check_columns(recipe)
    return recipe


def with_images(recipe: Recipe, path: str) -> Recipe:
    """The recipe with another path of its only source.

    Raises:
        RecipeError: it has several.
    """
    if len(recipe.sources) > 1:
        names = ", ".join(source.name for source in recipe.sources)
        problem = f"images are given for one source, and there are {names}; write the paths into the recipe"
        raise recipe.error(("sources",), problem)
    return recipe.model_copy(update={"sources": (recipe.sources[0].model_copy(update={"path": path}),)})


def columns_of(recipe: Recipe) -> dict[str, pa.DataType]:
    """Every column that `decide` can judge by: of the images, derived from them, and of the recipe's scorers."""
    columns = {name: IMAGES.field(name).type for name in _OF_IMAGES} | _DERIVED
    for name, params in recipe.scorers().items():
        columns |= SCORERS[name](params).columns
    return columns


def check_columns(recipe: Recipe) -> None:
    """Check that every column which `decide` names, or `group` needs, exists and is of the right kind.

    Raises:
        RecipeError: with the line of each one that does not.
    """
    columns = columns_of(recipe)
    problems = []
    for path, name, kind in _wanted(recipe):
        if name not in columns or not _KINDS[kind](columns[name]):
            problems.append(str(recipe.error(path, _explain(name, kind, columns, recipe))))
    if problems:
        raise RecipeError("\n".join(problems))


def _wanted(recipe: Recipe) -> Iterator[tuple[tuple[Any, ...], str, str]]:
    """Where `decide` names a column or `group` needs one, its name, and of what kind it has to be."""
    rules = recipe.decide
    if recipe.group is not None:
        yield ("group", "few_shot"), "phash", "phash"
    for i, one in enumerate(rules.filters):
        yield ("decide", "filters", i, "column"), one.column, "numeric"
    for i, listed in enumerate(rules.blocklists):
        if isinstance(listed, EmbeddingList):
            yield ("decide", "blocklists", i, "column"), listed.column, "embedding"
        elif isinstance(listed, PHashList):
            yield ("decide", "blocklists", i, "kind"), "phash", "phash"
    if rules.dedup.perceptual:
        yield ("decide", "dedup", "perceptual"), "phash", "phash"
    if rules.dedup.semantic:
        yield ("decide", "dedup", "semantic", "column"), rules.dedup.semantic.column, "embedding"
    for i, name in enumerate(rules.dedup.prefer if rules.dedup.perceptual or rules.dedup.semantic else ()):
        yield ("decide", "dedup", "prefer", i), name, "numeric"


def _explain(name: str, kind: str, columns: dict[str, pa.DataType], recipe: Recipe) -> str:
    if name in columns:
        return f"column {name!r} is {columns[name]}, not {kind}"
    able = [known for known, of_type in columns.items() if _KINDS[kind](of_type)]
    known = f"its {kind} columns are {', '.join(able)}" if able else f"it has no {kind} column"
    further = ", ".join(scorer for scorer in SCORERS if scorer not in recipe.scorers())
    remedy = did_you_mean(name, able) or f"; more come with the scorers {further}"
    return f"this recipe has no column {name!r}; {known}{remedy}"
