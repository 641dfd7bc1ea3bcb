"""The recipe reference and JSON Schema say what the recipe model accepts."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from pipelines.recipes import RECIPE
from pipelines.reference import markdown

ROOT = Path(__file__).parents[2]
RECIPES = sorted([*ROOT.glob("recipes/*.yaml"), *ROOT.glob("recipes/*/recipe.yaml")])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_recipes_here_pass_the_json_schema_that_editors_use(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text()), RECIPE.model_json_schema())


def test_the_json_schema_finds_an_unknown_key() -> None:
    recipe = yaml.safe_load(RECIPES[0].read_text()) | {"packk": {}}
    with pytest.raises(jsonschema.ValidationError, match="packk"):
        jsonschema.validate(recipe, RECIPE.model_json_schema())


def test_the_page_lists_every_section_with_its_keys_and_what_it_does() -> None:
    page = markdown()
    for section in ("### `build.restoration`", "### `score.caption`", "#### `decide.dedup.perceptual`", "## `pack`"):
        assert section in page
    assert "| `radius` | whole number | `6` |" in page
    assert "Attempts are subtask names" in page  # of the builder, which its parameters do not repeat


def test_the_page_in_the_docs_is_current() -> None:
    assert (ROOT / "docs/recipe.md").read_text() == markdown(), "x2i schema --markdown > docs/recipe.md"
