"""Units, markers, digests: what runs again after which change, and that every input is accounted for."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import yaml

from pipelines import ledger
from pipelines.engine import Context
from pipelines.recipes import RECIPE
from pipelines.run import build
from pipelines.stages import STAGES
from pipelines.storage import Folder


class Corpus:
    """A small corpus that a test builds again and again."""

    def __init__(self, root: Path, recipe: dict, photos: Path) -> None:
        self.path, self.recipe = root / "corpus", recipe
        self.photos = root / "photos"
        shutil.copytree(photos, self.photos)
        recipe["sources"][0]["path"] = str(self.photos)

    def build(self, until: str = "publish") -> dict[str, set[str]]:
        """Build, and return the units that ran, by stage."""
        before = self.written()
        build(Context(Folder(str(self.path)), RECIPE.model_validate(self.recipe), ""), 0, until=until)
        after = self.written()
        ran = {name for name in after if after[name] != before.get(name)}
        return {s: {n.split("/")[3][:-5] for n in ran if n.startswith(f"meta/ledger/{s}/")} for s in STAGES}

    def written(self) -> dict[str, int]:
        files = self.path.glob("meta/ledger/*/*.json")
        return {str(f.relative_to(self.path)): f.stat().st_mtime_ns for f in files}

    def bytes(self) -> dict[str, str]:
        """sha256 of every published file and ledger."""
        files = [f for f in self.path.rglob("*") if f.is_file() and "work" not in f.relative_to(self.path).parts]
        return {str(f.relative_to(self.path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture
def corpus(tmp_path, recipe_file, photo_folder):
    return Corpus(tmp_path, yaml.safe_load(recipe_file.read_text()), photo_folder)


def nothing_ran(ran):
    return not any(ran.values())


def test_a_second_build_runs_nothing_and_changes_nothing(corpus):
    first = corpus.build()
    assert first["ingest"] == {"photos-000000", "photos-000001", "photos-000002"}
    assert first["build"] == first["ingest"] and first["decide"] == {"all"} and first["pack"]
    before = corpus.bytes()
    assert nothing_ran(corpus.build())
    assert corpus.bytes() == before


def test_a_new_threshold_rebuilds_only_the_units_it_changes(corpus):
    corpus.build()
    images = [corpus.path / "work/images" / f"photos-00000{i}.parquet" for i in range(3)]
    import pyarrow.parquet as pq

    aspects = [
        [max(r["width"], r["height"]) / min(r["width"], r["height"]) for r in pq.read_table(p).to_pylist()]
        for p in images
    ]
    widest = max(max(unit) for unit in aspects)
    changed = {f"photos-00000{i}" for i, unit in enumerate(aspects) if max(unit) == widest}
    corpus.recipe["decide"]["filters"] = [{"column": "aspect", "max": widest - 0.001}]
    ran = corpus.build()
    assert ran["ingest"] == set() and ran["decide"] == {"all"} and ran["build"] == changed


def test_a_new_seed_ingests_nothing_again(corpus):
    corpus.build()
    before = corpus.bytes()
    corpus.recipe["seed"] = 99
    ran = corpus.build()
    assert ran["ingest"] == ran["decide"] == set() and len(ran["build"]) == 3
    after = corpus.bytes()
    data = [name for name in after if name.startswith("data/")]
    assert any(after[name] != before.get(name) for name in data)


def test_a_builder_parameter_rebuilds_without_ingest(corpus):
    corpus.build()
    corpus.recipe["build"]["restoration"]["per_image"] = 1
    ran = corpus.build()
    assert ran["ingest"] == set() and len(ran["build"]) == 3


def test_changed_and_removed_files_are_noticed(corpus):
    corpus.build()
    (corpus.photos / "cat.txt").write_text("Another caption of exactly that cat, seen from the front.")
    assert "photos-000000" in corpus.build()["ingest"]
    for name in ("rocket", "retina"):
        (corpus.photos / f"{name}.jpg").unlink()
        (corpus.photos / f"{name}.txt").unlink()
    corpus.build()
    assert not (corpus.path / "meta/ledger/ingest/photos-000002.json").exists()
    assert not (corpus.path / "meta/ledger/build/photos-000002.json").exists()
    rows = corpus.path.glob("meta/ledger/ingest/*.parquet")
    assert sum(len(Folder(str(corpus.path)).read_table(str(p.relative_to(corpus.path)))) for p in rows) == 6


def test_a_shrunken_corpus_equals_one_built_from_scratch(corpus, tmp_path):
    corpus.build()
    corpus.recipe["build"] = {"captions": {}}
    corpus.build()
    shrunk = corpus.bytes()
    shutil.rmtree(corpus.path)
    corpus.build()
    assert shrunk == corpus.bytes()


def test_the_work_folder_can_be_deleted(corpus):
    corpus.build()
    before = corpus.bytes()
    shutil.rmtree(corpus.path / "work")
    assert nothing_ran(corpus.build()) and corpus.bytes() == before
    shutil.rmtree(corpus.path / "work")
    corpus.recipe["pack"]["shard_bytes"] = 1 << 20
    corpus.build()
    after = corpus.bytes()
    assert len([n for n in after if n.endswith(".tar")]) < len([n for n in before if n.endswith(".tar")])


def test_every_input_has_a_fate(corpus):
    (corpus.photos / "broken.jpg").write_bytes(b"\xff\xd8\xff not a jpeg")
    shutil.copy(corpus.photos / "coffee.jpg", corpus.photos / "zz_copy.jpg")
    corpus.build()
    folder = Folder(str(corpus.path))
    counts = {s: ledger.totals(m.counts for m in ledger.read_markers(folder, s).values()) for s in STAGES}
    assert counts["ingest"] == {"inputs": 10, "kept": 9, "dropped": 0, "quarantined": 1}
    assert counts["decide"] == {"inputs": 9, "kept": 8, "dropped": 1, "quarantined": 0}
    for stage in STAGES:
        assert counts[stage]["inputs"] == sum(counts[stage][f] for f in ("kept", "dropped", "quarantined"))
    rows = [r for n in folder.list("meta/ledger/decide", ".parquet") for r in folder.read_table(n).to_pylist()]
    assert [(r["input"].rpartition("/")[2], r["reason"]) for r in rows if r["status"] == "dropped"] == [
        ("zz_copy.jpg", "duplicate")
    ]
    samples = sum(len(folder.read_table(n)) for n in folder.list("meta/samples", ".parquet"))
    outputs = [
        k
        for n in folder.list("meta/ledger/build", ".parquet")
        for r in folder.read_table(n).to_pylist()
        for k in r["outputs"]
    ]
    assert samples == counts["pack"]["kept"] == len(outputs) == len(set(outputs))


def test_losing_an_input_is_an_error():
    with pytest.raises(ledger.ConservationError, match="are not kept"):
        ledger.check_conservation("x", {"inputs": 3, "kept": 1, "dropped": 1, "quarantined": 0})
    with pytest.raises(ledger.ConservationError, match="kept 4"):
        ledger.check_conservation("x", {"inputs": 3, "kept": 3, "dropped": 0, "quarantined": 0}, 4)


def test_an_interrupted_write_leaves_nothing_behind(tmp_path):
    folder = Folder(str(tmp_path))
    with pytest.raises(RuntimeError), folder.writing("a/b.bin") as local:
        local.write_bytes(b"half")
        raise RuntimeError
    assert not any(f for f in tmp_path.rglob("*") if f.is_file())
    with pytest.raises(ValueError, match="leaves"):
        folder.path("../x")
