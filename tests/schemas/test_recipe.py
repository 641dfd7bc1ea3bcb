import pytest
from pydantic import BaseModel, ConfigDict

from schemas.recipe import RecipeError, load_recipe, parse_recipe, recipe_model


class BlurParams(BaseModel):
    model_config = ConfigDict(extra="forbid")
    radius: int = 3


class SharpnessParams(BaseModel):
    model_config = ConfigDict(extra="forbid")
    side: int = 512


MODEL = recipe_model({"blur": BlurParams}, {"sharpness": SharpnessParams})
GOOD = """\
name: demo
seed: 7
sources:
  - name: photos
    type: folder
    path: photos
build:
  blur:
    radius: 5
pack:
  shard_bytes: 8MiB
"""


def test_a_recipe_is_typed_down_to_the_builders():
    recipe = parse_recipe(GOOD, MODEL)
    assert recipe.builders() == {"blur": BlurParams(radius=5)}
    assert recipe.pack.shard_bytes == 8 << 20
    again = MODEL.model_validate(recipe.model_dump(mode="json"))
    assert again.model_dump() == recipe.model_dump()


def test_scorers_are_typed_as_builders_are():
    assert parse_recipe(GOOD, MODEL).scorers() == {}
    assert parse_recipe(GOOD + "score:\n", MODEL).scorers() == {}
    assert parse_recipe(GOOD + "score: {sharpness: }\n", MODEL).scorers() == {"sharpness": SharpnessParams()}
    with pytest.raises(RecipeError, match=r"recipe:14: score.sharpness.sied: unknown key; did you mean 'side'"):
        parse_recipe(GOOD + "score:\n  sharpness:\n    sied: 3\n", MODEL)
    with pytest.raises(RecipeError, match=r"recipe:12: score: "):
        parse_recipe(GOOD + "score: [sharpness]\n", MODEL)


def test_later_checks_name_lines_too():
    recipe = parse_recipe(GOOD + "score:\n  sharpness:\n    side: 3\n", MODEL, "demo.yaml")
    assert str(recipe.error(("score", "sharpness", "side"), "odd")) == "demo.yaml:14: score.sharpness.side: odd"
    # What stands nowhere is found at the innermost key that does.
    assert str(recipe.error(("score", "sharpness", "model"), "absent")) == "demo.yaml:13: score.sharpness: absent"
    made = MODEL.model_validate(recipe.model_dump())
    assert str(made.error(("score", "sharpness", "side"), "odd")) == "recipe: score.sharpness.side: odd"


def test_a_builder_with_nothing_behind_it_takes_its_defaults():
    text = GOOD.replace("  blur:\n    radius: 5\n", "  blur:\n")
    assert parse_recipe(text, MODEL).builders() == {"blur": BlurParams()}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    radius: 5", "    radus: 5", "r.yaml:9: build.blur.radus: unknown key; did you mean 'radius'"),
        ("  blur:", "  blurr:", "r.yaml:8: build.blurr: unknown key; did you mean 'blur'"),
        ("type: folder", "type: foldr", "r.yaml:4: sources.0: 'foldr' is not one of"),
        ("    path: photos\n", "", "r.yaml:4: sources.0: key 'path' is missing"),
        ("    path: photos", "    pth: photos", "r.yaml:6: sources.0.pth: unknown key; did you mean 'path'"),
        ("seed: 7", "seed: minus", "r.yaml:2: seed: Input should be a valid integer"),
        ("shard_bytes: 8MiB", "shard_bytes: 8 parsecs", "r.yaml:11: pack.shard_bytes:"),
        ("seed: 7", "seed: 7\nseed: 8", "r.yaml:3: key 'seed' is given twice"),
        ("seed: 7", "seed: [", "r.yaml: not YAML"),
    ],
)
def test_mistakes_are_named_with_their_line(old, new, message):
    with pytest.raises(RecipeError) as error:
        parse_recipe(GOOD.replace(old, new), MODEL, "r.yaml")
    assert message in str(error.value)


def test_every_mistake_is_reported_at_once():
    text = GOOD.replace("seed: 7", "sed: 7").replace("radius: 5", "radius: wide")
    with pytest.raises(RecipeError) as error:
        parse_recipe(text, MODEL, "r.yaml")
    assert "r.yaml:2: sed" in str(error.value) and "r.yaml:9: build.blur.radius" in str(error.value)


def test_two_sources_of_one_name_are_refused():
    twice = GOOD.replace("build:", "  - {name: photos, type: folder, path: more}\nbuild:")
    with pytest.raises(RecipeError, match="two sources are named photos"):
        parse_recipe(twice, MODEL)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"nope\.yaml: cannot read"):
        load_recipe(tmp_path / "nope.yaml", MODEL)
