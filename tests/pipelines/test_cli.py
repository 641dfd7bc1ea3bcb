"""The command line as its user meets it: what it prints, what it refuses, and how it says so."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from pipelines.cli import app


def x2i(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_build_status_stats_lint_preview(recipe_file, tmp_path):
    corpus = tmp_path / "corpus"
    code, out = x2i("plan", recipe_file, "-c", corpus)
    assert code == 0 and "photos" in out and "captions, condition_maps, restoration" in out
    code, out = x2i("build", recipe_file, "-c", corpus, "--workers", 0, "--until", "build")
    assert code == 0
    code, out = x2i("status", corpus)
    assert code == 0 and "not published" in out and "build" in out
    code, out = x2i("stats", corpus)
    assert code == 2 and "not published" in out
    code, out = x2i("publish", recipe_file, "-c", corpus)
    assert code == 0 and "samples in" in out
    code, out = x2i("stats", corpus, "--json")
    stats = json.loads(out)
    assert stats["samples"] == sum(s["samples"] for s in stats["streams"].values())
    assert stats["ledger"]["ingest"]["kept"] == {"": 8}
    code, out = x2i("lint", corpus)
    assert code == 0 and "no problems" in out
    code, out = x2i("preview", corpus, "--out", tmp_path / "sheets", "--per-subtask", 2)
    assert code == 0 and all((tmp_path / "sheets").joinpath(line.split("/")[-1]).exists() for line in out.split())
    code, out = x2i("export", corpus, "--out", tmp_path / "x2i", "--stream", "restore")
    assert code == 0 and (tmp_path / "x2i/x2i.jsonl").exists()
    shard = next((corpus / "data/restore").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1024])
    code, out = x2i("lint", corpus)
    assert code == 1 and shard.name in out


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("per_image: 3}\npack", "per_imge: 3}\npack", "did you mean 'per_image'"),
        ("type: folder", "type: floder", "'floder' is not one of"),
        ("maps: [lines", "maps: [line", "lines"),
    ],
)
def test_a_bad_recipe_line_is_named_before_anything_starts(recipe_file, tmp_path, old, new, message):
    bad = tmp_path / "bad.yaml"
    bad.write_text(recipe_file.read_text().replace(old, new))
    code, out = x2i("build", bad, "-c", tmp_path / "corpus")
    assert code == 2 and "bad.yaml:" in out and message in out
    assert not (tmp_path / "corpus").exists()


def test_missing_things_are_named(recipe_file, tmp_path):
    code, out = x2i("status", tmp_path / "nowhere")
    assert code == 2 and "no such corpus" in out
    lost = tmp_path / "lost.yaml"
    lost.write_text(recipe_file.read_text().replace("path: ", "path: /nowhere/").replace('"', ""))
    code, out = x2i("build", lost, "-c", tmp_path / "corpus", "--workers", 0)
    assert code == 2 and "/nowhere/" in out
    code, out = x2i("build", recipe_file, "-c", tmp_path / "corpus", "--until", "tomorrow")
    assert code == 2 and "tomorrow" in out
    code, out = x2i("publish", recipe_file, "-c", tmp_path / "empty")
    assert code == 2 and "nothing is built yet" in out


def test_exports_of_nothing_are_named(corpus_path, tmp_path):
    for options in (["--split", "tset"], ["--stream", "edit"]):
        code, out = x2i("export", corpus_path, "--out", tmp_path / "out", *options)
        assert code == 2 and options[1] in out


def test_a_build_that_keeps_nothing_says_where_it_went(recipe_file, tmp_path):
    strict = tmp_path / "strict.yaml"
    strict.write_text(recipe_file.read_text().replace("min: 32", "min: 4000"))
    code, out = x2i("build", strict, "-c", tmp_path / "corpus", "--workers", 0)
    assert code == 2 and "nothing to publish" in out and "decide dropped 8 (min_side" in out
