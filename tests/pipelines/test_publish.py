"""Publishing: indexes, manifest and card derived from packed shards, and what `corpus` reads back from them."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipelines.corpus import Shard, _quantiles, find_shards, iter_index, read_index, read_members, summary
from pipelines.publish import Digest, digest_of_file, publish
from pipelines.storage import Folder
from schemas.shards import ShardError
from tests.corpora import NAME, RECIPE, STREAM_NAMES, VERSIONS, make_corpus, make_samples, write_shard, write_stream


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def files(corpus: Folder) -> dict[str, bytes]:
    return {name: corpus.read_bytes(name) for name in corpus.list()}


def test_publishing_again_changes_no_byte(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, ("edit", "text_to_image"))
    before = files(corpus)
    publish(corpus, NAME, RECIPE, VERSIONS)
    assert files(corpus) == before


def test_an_object_store_gets_the_same_bytes(tmp_path: Path) -> None:
    local, remote = make_corpus(tmp_path, ("edit",)), Folder("memory://test-publish")
    write_stream(remote, "edit", list(make_samples("edit")), per_shard=4)
    publish(remote, NAME, RECIPE, VERSIONS)
    assert files(remote) == files(local)


def test_tar_index_holds_the_offsets_that_tarfile_finds(corpus: Folder) -> None:
    for shard in find_shards(corpus):
        with tarfile.open(fileobj=io.BytesIO(corpus.read_bytes(shard.tar))) as tar:
            members = tar.getmembers()
            end = tar.offset
        first = f".{read_index(corpus, shard)['members'][0].as_py()[0]['name']}"
        expected = [m.offset for m in members if m.name.endswith(first)] + [end]
        assert np.frombuffer(corpus.read_bytes(shard.tar_index), "<u8").tolist() == expected


def test_manifest_describes_every_shard(corpus: Folder) -> None:
    manifest = corpus.read_json("manifest.json")
    assert sorted(manifest["streams"]) == sorted(STREAM_NAMES)
    assert manifest["recipe_sha256"] == hashlib.sha256(corpus.read_bytes("recipe.yaml")).hexdigest()
    for name, stream in manifest["streams"].items():
        assert [s["samples"] for s in stream["shards"]] == [4, 2]
        assert [s["splits"] for s in stream["shards"]] == [{"train": 4}, {"val": 1, "test": 1}]
        for shard in stream["shards"]:
            data = corpus.read_bytes(f"data/{name}/{shard['name']}")
            assert shard["sha256"] == hashlib.sha256(data).hexdigest()
            assert (shard["md5"], shard["bytes"]) == (hashlib.md5(data).hexdigest(), len(data))


def test_digests_that_pack_knows_are_used_instead_of_reading(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, ("edit",))
    tar = Shard("edit", 0).tar
    known = Digest(corpus.size(tar), "0" * 64, "f" * 32)
    publish(corpus, NAME, RECIPE, VERSIONS, {tar: known})
    first, second = corpus.read_json("manifest.json")["streams"]["edit"]["shards"]
    assert (first["sha256"], first["md5"]) == (known.sha256, known.md5)
    with corpus.open(Shard("edit", 1).tar) as file:
        assert second["sha256"] == digest_of_file(file).sha256


def test_a_shard_of_another_size_is_refused(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, ("edit",))
    tar = Shard("edit", 0).tar
    with pytest.raises(ShardError, match=r"edit-000000\.tar has .* its digest says 7"):
        publish(corpus, NAME, RECIPE, VERSIONS, {tar: Digest(7, "", "")})
    corpus.write_bytes(tar, corpus.read_bytes(tar)[:-1024])
    with pytest.raises(ShardError, match="pack this shard again"):
        publish(corpus, NAME, RECIPE, VERSIONS)


def test_an_empty_shard_is_refused(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, ("edit",))
    write_shard(corpus, Shard("edit", 2), [])
    with pytest.raises(ShardError, match=r"edit-000002\.tar is empty"):
        publish(corpus, NAME, RECIPE, VERSIONS)


def test_indexes_of_removed_shards_and_streams_go(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, ("edit", "control"))
    gone = Shard("edit", 1)
    for name in (gone.tar, gone.sample_index, *corpus.list("data/control", ".tar")):
        corpus.remove(name)
    publish(corpus, NAME, RECIPE, VERSIONS)
    left = corpus.list("data") + corpus.list("index")
    assert gone.tar_index not in left
    assert not [name for name in left if "control" in name]
    assert "index/edit-wids.json" in left


def test_shards_of_one_split_are_offered_as_that_split(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, ("edit",), per_shard=1)
    names = [f"edit-{i:06d}.tar" for i in range(6)]
    parts = yaml.safe_load(corpus.read_bytes("data/edit/.nv-meta/split.yaml"))["split_parts"]
    assert parts == {"train": names[:4], "val": names[4:5], "test": names[5:]}
    front = yaml.safe_load(corpus.read_bytes("README.md").decode().split("---\n")[1])
    data_files = front["configs"][0]["data_files"]
    assert {d["split"]: [Path(p).name for p in d["path"]] for d in data_files} == parts


def test_mixed_shards_are_all_train_and_the_card_says_so(corpus: Folder) -> None:
    parts = yaml.safe_load(corpus.read_bytes("data/edit/.nv-meta/split.yaml"))["split_parts"]
    assert parts == {"train": ["edit-000000.tar", "edit-000001.tar"], "val": [], "test": []}
    assert "select by the record's `split`" in corpus.read_bytes("README.md").decode()


def test_members_come_from_the_places_in_the_index(corpus: Folder) -> None:
    for stream in STREAM_NAMES:
        rows = [row for table in iter_index(corpus, [stream]) for row in table.to_pylist()]
        expected = {s.record.key: s.members for s in make_samples(stream)}
        assert {row["key"]: read_members(corpus, row) for row in rows} == expected


def test_a_wrong_place_is_an_error(corpus: Folder) -> None:
    first, second = read_index(corpus, Shard("edit", 0)).to_pylist()[:2]
    with pytest.raises(ShardError, match=f"no sample {first['key']}"):
        read_members(corpus, {**first, "offset": second["offset"]})


def test_the_index_is_filtered_by_stream_split_and_column(corpus: Folder) -> None:
    tables = list(iter_index(corpus, ["edit", "control"], ["key"], split="val"))
    assert [t.column_names for t in tables] == [["key"]] * 4
    assert sum(len(t) for t in tables) == 2
    with pytest.raises(ValueError, match="has no stream style; it has control, edit"):
        find_shards(corpus, ["style"])
    with pytest.raises(ValueError, match="is no corpus"):
        find_shards(corpus.sub("nowhere"))


def test_summary_counts_what_was_written(corpus: Folder) -> None:
    counts = summary(corpus)
    assert (counts["samples"], counts["shards"]) == (6 * len(STREAM_NAMES), 2 * len(STREAM_NAMES))
    tars = sum(corpus.size(s.tar) for s in find_shards(corpus))
    assert counts["bytes"] == tars - 1024 * counts["shards"]
    edit = counts["streams"]["edit"]["subtasks"]["recolor"]
    assert edit["splits"] == {"train": 4, "val": 1, "test": 1}
    assert edit["licenses"] == {"CC-BY-4.0": 3, "CC0-1.0": 3}
    assert (edit["aligned"], edit["real_output"], edit["output_width"]) == (6, 0, 192)
    assert edit["severity"] == {"p5": 0.25, "p50": 0.25, "p95": 0.75}
    areas = [s.record.edit_area_ratio for s in make_samples("edit")]
    assert edit["edit_area_ratio"]["p95"] == pytest.approx(max(areas), abs=5e-4)
    assert counts["streams"]["control"]["subtasks"]["canny"]["severity"] is None


@given(st.lists(st.integers(0, 1000).map(lambda i: i / 1000), min_size=1))
def test_quantiles_of_counts_are_those_of_the_values(values: list[float]) -> None:
    expected = np.quantile(values, [0.05, 0.5, 0.95], method="inverted_cdf")
    assert list((_quantiles(Counter(values)) or {}).values()) == pytest.approx(expected)
