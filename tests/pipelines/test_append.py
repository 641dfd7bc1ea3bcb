"""A corpus grows: only what is new is made, and shards that were there stay as they were, byte for byte."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import ledger
from pipelines.corpus import find_shards, iter_index
from pipelines.engine import Context
from pipelines.lint import lint
from pipelines.recipes import RECIPE
from pipelines.run import build
from pipelines.stages.ingest import IngestStage
from pipelines.storage import Folder
from schemas.recipe import Recipe

OLD = ("astronaut", "cat", "coffee", "motorcycle", "retina", "rocket")
NEW = ("china", "flower")
PER_UNIT = 2
PER_IMAGE = ("ingest", "score", "build")  # stages with work per image


@pytest.fixture(scope="module")
def photos(photographs: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for folder, names in (("old", OLD), ("new", NEW)):
        (root / folder).mkdir()
        for name in names:
            Image.fromarray(photographs[name]).save(root / folder / f"{name}.jpg", quality=92)
            (root / folder / f"{name}.txt").write_text(f"A photograph called {name}.")
    return root


def recipe(root: Path, sources: Iterable[str]) -> Recipe:
    given = {
        "name": "growing",
        "sources": [{"name": s, "type": "folder", "path": str(root / s), "text_is": "caption"} for s in sources],
        "ingest": {"unit_rows": PER_UNIT, "max_pixels": 16384},
        "score": {"phash": {}},
        "decide": {"dedup": {"perceptual": {"radius": 6}}, "splits": {"val": 0.2}},
        "build": {"captions": {}, "condition_maps": {"maps": ["luminance", "palette"], "per_image": 2}},
        "pack": {"shard_bytes": 1 << 16},
    }
    return RECIPE.model_validate(given)


def make(corpus: Folder, root: Path, *sources: str) -> Folder:
    build(Context(corpus, recipe(root, sources), ""), workers=0)
    assert lint(corpus) == []
    return corpus


@pytest.fixture(scope="module")
def before(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return make(Folder(str(tmp_path_factory.mktemp("before"))), photos, "old")


@pytest.fixture(scope="module")
def after(before: Folder, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    path = tmp_path_factory.mktemp("after") / "corpus"
    shutil.copytree(before.url, path)
    return make(Folder(str(path)), photos, "old", "new")


def digests(corpus: Folder, *prefixes: str) -> dict[str, str]:
    names = [name for prefix in prefixes for name in corpus.list(prefix)]
    return {name: hashlib.sha256(corpus.read_bytes(name)).hexdigest() for name in names}


def work(corpus: Folder) -> dict[tuple[str, str], str]:
    """Digest of the work of every unit."""
    return {(stage, u): m.digest for stage in PER_IMAGE for u, m in ledger.read_markers(corpus, stage).items()}


def test_an_appended_source_makes_new_units_and_new_shards_only(before: Folder, after: Folder) -> None:
    assert work(before).items() <= work(after).items()
    assert {unit.rpartition("-")[0] for _, unit in work(after).keys() - work(before).keys()} == {"new"}
    made = ("work/parts", "work/images")
    assert digests(before, *made).items() <= digests(after, *made).items()
    old, shards = digests(before, "data", "meta/samples"), {*find_shards(after)} - {*find_shards(before)}
    assert {shard.stream for shard in shards} == {shard.stream for shard in find_shards(before)}
    changed = {name for name, digest in digests(after, "data", "meta/samples").items() if old.get(name) != digest}
    lists = {name for name in changed if "/.nv-meta/" in name}  # of all shards
    assert changed - lists == {name for s in shards for name in (s.tar, s.tar_index, s.sample_index)}


def test_a_corpus_that_grew_equals_one_built_at_once(after: Folder, photos: Path, tmp_path: Path) -> None:
    at_once = make(Folder(str(tmp_path / "at_once")), photos, "old", "new")
    published = ("data", "meta", "index", "manifest.json", "README.md", "croissant.json")
    assert digests(after, *published) == digests(at_once, *published)


def test_no_shard_holds_samples_of_two_sources(after: Folder) -> None:
    of_new = {*after.read_table("work/images/new-000000.parquet", ["uid"])["uid"].to_pylist()}
    for table in iter_index(after, columns=["parents"]):
        assert len({uid in of_new for parents in table["parents"].to_pylist() for uid in parents}) == 1


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("zebra", {"old-000003"}),  # after all others: a unit of its own
        ("dune", {"old-000001", "old-000002", "old-000003"}),  # in the middle: what comes after it moves on
    ],
)
def test_a_file_added_to_a_source_changes_the_units_from_there_on(
    photos: Path, tmp_path: Path, name: str, units: set[str]
) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    context = Context(Folder(str(tmp_path / "corpus")), recipe(tmp_path / "photos", ["old"]), "")
    before = {task.unit: task.digest for task in IngestStage(context).tasks()}
    shutil.copy(photos / "new/flower.jpg", tmp_path / f"photos/old/{name}.jpg")
    after = {task.unit: task.digest for task in IngestStage(context).tasks()}
    assert {unit for unit, digest in after.items() if before.get(unit) != digest} == units
