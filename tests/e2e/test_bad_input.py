"""Broken files of every kind among good ones: each is normalised or quarantined with its reason; the run goes on."""

from __future__ import annotations

import json
import shutil
import tarfile

import pytest

from pipelines import ledger
from pipelines.engine import Context
from pipelines.lint import lint
from pipelines.recipes import RECIPE
from pipelines.run import build
from pipelines.stages import STAGES
from pipelines.storage import Folder
from tests.bad_images import cases


@pytest.fixture(scope="module")
def sources(tmp_path_factory, photo_folder):
    """A folder of broken images, broken captions, a manifest with bad paths, and a tar cut in the middle."""
    root = tmp_path_factory.mktemp("bad")
    images = root / "images"
    images.mkdir()
    for case in cases().values():
        (images / case.name).write_bytes(case.data)
    good = photo_folder / "coffee.jpg"
    captions = root / "captions"
    captions.mkdir()
    texts = {"utf8": b"caf\xe9 \xff\xfe", "nul": b"A cup\x00 of coffee on a table", "long": b"word " * 20_000}
    for name, text in texts.items():
        shutil.copy(photo_folder / "rocket.jpg", captions / f"{name}.jpg")
        (captions / f"{name}.txt").write_bytes(text)
    rows = [{"image": "good.jpg", "caption": "A cup of coffee."}, {"image": "missing.jpg"}, {"image": "../secret.jpg"}]
    (root / "manifest.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    shutil.copy(good, root / "good.jpg")
    (root / "tars").mkdir()
    with tarfile.open(root / "tars/whole.tar", "w") as tar:
        for i in range(6):
            tar.add(photo_folder / "flower.jpg", f"{i:04d}.jpg")
            tar.add(photo_folder / "flower.txt", f"{i:04d}.txt")
    whole = (root / "tars/whole.tar").read_bytes()
    (root / "tars/whole.tar").unlink()
    (root / "tars/cut.tar").write_bytes(whole[: len(whole) * 2 // 3])
    return root


@pytest.fixture(scope="module")
def corpus(sources):
    recipe = {
        "name": "bad",
        "sources": [
            {"name": "images", "type": "folder", "path": str(sources / "images")},
            {"name": "captions", "type": "folder", "path": str(sources / "captions"), "text_is": "caption"},
            {"name": "manifest", "type": "manifest", "path": str(sources / "manifest.jsonl")},
            {"name": "tars", "type": "webdataset", "path": str(sources / "tars")},
        ],
        "ingest": {"unit_rows": 10},
        "decide": {"filters": [{"column": "min_side", "min": 100}]},
        "build": {"captions": {}, "restoration": {"per_image": 2, "min_side": 64}},
    }
    folder = Folder(str(sources / "corpus"))
    build(Context(folder, RECIPE.model_validate(recipe), ""), workers=0)
    return folder


def ledger_rows(corpus, stage):
    return [r for n in corpus.list(f"meta/ledger/{stage}", ".parquet") for r in corpus.read_table(n).to_pylist()]


def test_every_broken_image_has_its_fate(corpus):
    fates = {r["input"].rpartition("/")[2]: r for r in ledger_rows(corpus, "ingest") if r["unit"].startswith("images-")}
    assert set(fates) == set(cases())
    for name, case in cases().items():
        expected = ("quarantined", case.reason) if case.reason else ("kept", "")
        assert (fates[name]["status"], fates[name]["reason"]) == expected, name


def test_tiny_and_extreme_images_are_dropped_with_the_value_that_decided(corpus):
    fates = {r["input"].rpartition("/")[2]: r for r in ledger_rows(corpus, "decide")}
    for name in ("one_pixel.png", "one_pixel.jpg", "thread.png"):
        assert (fates[name]["status"], fates[name]["reason"], fates[name]["value"]) == ("dropped", "min_side", 1.0)


def test_broken_captions_paths_and_tars_are_named(corpus):
    reasons = {r["input"].rpartition("/")[2]: r["reason"] for r in ledger_rows(corpus, "ingest")}
    assert reasons["utf8.jpg"] == "caption_encoding"
    assert reasons["long.jpg"] == "caption_too_long"
    assert reasons["nul.jpg"] == ""
    manifest = [r for r in ledger_rows(corpus, "ingest") if r["unit"].startswith("manifest-")]
    assert [r["reason"] for r in manifest] == ["", "missing_file", "unsafe_path"]
    tar = [r for r in ledger_rows(corpus, "ingest") if r["unit"].startswith("tars-")]
    assert tar[-1]["reason"] == "truncated_tar" and tar[0]["status"] == "kept"


def test_duplicate_uids_stay_once(corpus):
    kept = [r["uid"] for r in ledger_rows(corpus, "decide") if r["status"] == "kept"]
    assert len(kept) == len(set(kept))
    assert any(r["reason"] == "duplicate" for r in ledger_rows(corpus, "decide"))


def test_inputs_are_conserved_and_the_corpus_is_clean(corpus):
    for stage in STAGES:
        counts = ledger.totals(m.counts for m in ledger.read_markers(corpus, stage).values())
        ledger.check_conservation(stage, counts)
    images = sum(1 for r in ledger_rows(corpus, "ingest") if r["status"] == "kept")
    assert len(ledger_rows(corpus, "decide")) == images
    assert lint(corpus) == []
    instructions = [
        t for n in corpus.list("meta/samples", ".parquet") for t in corpus.read_table(n)["instruction"].to_pylist()
    ]
    assert "A cup of coffee on a table" in instructions and not any("\x00" in t for t in instructions)
