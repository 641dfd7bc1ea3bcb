"""The recipe model with the builders that exist, and how to load a recipe with it."""

from __future__ import annotations

from pathlib import Path

from builders.registry import BUILDERS
from schemas.recipe import Recipe, load_recipe, recipe_model

RECIPE = recipe_model({name: builder.Params for name, builder in BUILDERS.items()})


def load(path: str | Path) -> Recipe:
    """Read and check a recipe file.

    Raises:
        schemas.recipe.RecipeError: with the line of every mistake.
    """
    return load_recipe(path, RECIPE)
