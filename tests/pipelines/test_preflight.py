"""What a recipe names and is not there is an error with its line, before anything is read or written."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.recipes import load
from schemas.recipe import RecipeError
from tests.pipelines.test_cli import x2i

RECIPE = """\
name: small
sources:
  - {{name: photos, type: folder, path: {photos}}}
score:
  pixels:
  phash:
{score}
decide:
{decide}
build: {{captions: }}
"""


def write(path: Path, score: str = "", decide: str = "  licenses: []") -> Path:
    path.write_text(RECIPE.format(photos=path.parent, score=score, decide=decide))
    return path


@pytest.mark.parametrize(
    ("decide", "message"),
    [
        ("  filters:\n    - {column: sharpnes, min: 1}", r":10: decide.filters.0.column: .* did you mean 'sharpness'"),
        ("  filters:\n    - {column: clip_score, min: 1}", r":10: .*no column 'clip_score'; its numeric columns are "),
        ("  filters:\n    - {column: clip_score, min: 1}", r"more come with the scorers .*clip"),
        ("  filters:\n    - {column: license, min: 1}", r":10: .*column 'license' is string, not numeric"),
        (
            "  dedup: {semantic: {column: features_embedding}}",
            r":9: .*no column 'features_embedding'; it has no embedd",
        ),
        ("  dedup: {semantic: {column: phash}}", r":9: .*'phash' is uint64, not embedding"),
        ("  dedup:\n    perceptual:\n    prefer: [pixls]", r":11: decide.dedup.prefer.0: .*did you mean 'pixels'"),
        ("  blocklists:\n    - {kind: embedding, path: x, column: y}", r":10: decide.blocklists.0.column: .*'y'"),
    ],
)
def test_a_column_that_nothing_gives_is_named_with_its_line(tmp_path, decide, message):
    with pytest.raises(RecipeError, match=message):
        load(write(tmp_path / "r.yaml", decide=decide))


def test_perceptual_hashes_have_to_be_asked_for(tmp_path):
    rules = "  dedup: {perceptual: }\n  blocklists:\n    - {kind: phash, path: x}"
    load(write(tmp_path / "r.yaml", decide=rules))
    text = (tmp_path / "r.yaml").read_text().replace("  phash:\n", "")
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError) as error:
        load(tmp_path / "r.yaml")
    lines = str(error.value).splitlines()
    assert [line.split(": ")[0].rpartition(":")[2] for line in lines] == ["10", "8"]
    assert all("no column 'phash'" in line for line in lines)


def test_columns_that_are_there_pass(tmp_path):
    filters = "".join(
        f"    - {{column: {name}, min: 0}}\n" for name in ("min_side", "aspect", "pixels", "width", "sharpness")
    )
    load(write(tmp_path / "r.yaml", decide=f"  filters:\n{filters}  dedup: {{perceptual: , prefer: [sharpness]}}"))


def test_a_missing_model_and_a_missing_list_are_errors_of_their_lines(tmp_path):
    score = "  nsfw:\n    model: /nowhere/nsfw\n    label: nsfw"
    blocked = "  blocklists:\n    - {kind: sha256, path: nowhere.txt}"
    recipe = write(tmp_path / "r.yaml", score, blocked)
    for command in ("plan", "build"):
        code, out = x2i(command, recipe, "-c", tmp_path / "corpus")
        assert code == 2
        assert "r.yaml:8: score.nsfw.model: " in out and "/nowhere/nsfw" in out
        assert "r.yaml:12: decide.blocklists.0.path: " in out and "nowhere.txt" in out
        assert not (tmp_path / "corpus").exists()
