"""`croissant.json` is valid, and the reference library loads every record and image with it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import mlcroissant
import numpy as np
import pytest
from PIL import Image

from pipelines.corpus import find_shards, iter_index, read_members
from pipelines.storage import Folder
from schemas.vocabulary import STREAMS
from tests.corpora import STREAM_NAMES, make_corpus

_RECOMMENDED = ("citeAs", "datePublished", "version")  # for whoever publishes it; a build knows no date


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def dataset(corpus: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> mlcroissant.Dataset:
    monkeypatch.setenv("CROISSANT_CACHE", str(tmp_path))  # where it unpacks tars
    return mlcroissant.Dataset(jsonld=corpus.path("croissant.json"))


def test_it_is_valid(corpus: Folder, dataset: mlcroissant.Dataset) -> None:
    issues = dataset.metadata.ctx.issues
    assert not issues.errors
    assert all(any(f'{name}" is recommended' in warning for name in _RECOMMENDED) for warning in issues.warnings)
    assert dataset.metadata.license == ["CC-BY-4.0", "CC0-1.0"]
    shards = {node.content_url: node.sha256 for node in dataset.metadata.file_objects}
    manifest = corpus.read_json("manifest.json")["streams"]
    assert shards == {f"data/{s}/{e['name']}": e["sha256"] for s, entry in manifest.items() for e in entry["shards"]}
    assert len(shards) == len(find_shards(corpus))


@pytest.mark.parametrize("stream", STREAM_NAMES)
def test_records_are_those_of_the_sample_index(corpus: Folder, dataset: mlcroissant.Dataset, stream: str) -> None:
    names = ("key", "instruction", "task", "subtask", "split", "license", "scene_id", "edit_area_ratio", "aligned")
    want = [row for table in iter_index(corpus, [stream], names) for row in table.to_pylist()]
    found = [
        {name.partition("/")[2]: v.decode() if isinstance(v, bytes) else v for name, v in record.items()}
        for record in dataset.records(stream)
    ]
    assert sorted(found, key=lambda row: row["key"]) == sorted(want, key=lambda row: row["key"])


@pytest.mark.parametrize("stream", ["edit", "few_shot_1"])
def test_images_are_those_of_the_shards(corpus: Folder, dataset: mlcroissant.Dataset, stream: str) -> None:
    rows = [row for table in iter_index(corpus, [stream]) for row in table.to_pylist()]
    for member in STREAMS[stream].image_members:
        name = f"{stream}-images-{member}"
        found = {r[f"{name}/key"].decode(): r[f"{name}/image"] for r in dataset.records(name)}
        assert found.keys() == {row["key"] for row in rows}
        for row in rows:
            stored = Image.open(io.BytesIO(read_members(corpus, row)[member]))
            np.testing.assert_array_equal(np.asarray(found[row["key"]]), np.asarray(stored))


def test_it_is_a_function_of_the_corpus(corpus: Folder, tmp_path: Path) -> None:
    again = make_corpus(tmp_path)
    assert again.read_bytes("croissant.json") == corpus.read_bytes("croissant.json")
    assert str(tmp_path) not in json.dumps(again.read_json("croissant.json"))
