"""A published corpus opens, complete and undamaged, in every WebDataset reader that people use."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.corpus import find_shards, iter_index, read_members
from pipelines.engine import connect
from pipelines.publish import digest_of_file
from pipelines.storage import Folder
from schemas.codec import encode_jpeg, encode_png
from schemas.identity import sample_key
from schemas.records import SampleRecord
from schemas.shards import END_OF_ARCHIVE, ShardError, encode_sample, header
from schemas.vocabulary import STREAMS
from tests.corpora import STREAM_NAMES, make_corpus, make_samples, photos

# No, one (with mask; map in; map out), two and three inputs.
streams = pytest.mark.parametrize("stream", STREAM_NAMES)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def local_ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    connect(None, 1)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()


@cache
def expected(corpus: Folder, stream: str) -> dict[str, dict[str, bytes]]:
    """Members by key, as the sample index finds them; checked against the source in test_publish."""
    return {r["key"]: read_members(corpus, r) for t in iter_index(corpus, [stream]) for r in t.to_pylist()}


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def tar_members(data: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()


def paths(corpus: Folder, stream: str) -> list[str]:
    return [corpus.path(shard.tar) for shard in find_shards(corpus, [stream])]


@streams
def test_webdataset(corpus: Folder, stream: str) -> None:
    wds = pytest.importorskip("webdataset")
    want = expected(corpus, stream)
    raw = list(wds.WebDataset(paths(corpus, stream), shardshuffle=False))
    assert {s["__key__"]: {m: s[m] for m in STREAMS[stream].members} for s in raw} == want
    decoded = list(wds.WebDataset(paths(corpus, stream), shardshuffle=False).decode("pil"))
    assert len(decoded) == len(want)
    for sample in decoded:
        members = want[sample["__key__"]]
        assert sample["txt"] == members["txt"].decode()
        assert SampleRecord.model_validate(sample["json"]).to_json() == members["json"]
        for name in STREAMS[stream].image_members:
            rgb = Image.open(io.BytesIO(members[name])).convert("RGB")
            np.testing.assert_array_equal(np.asarray(sample[name]), np.asarray(rgb))


@streams
@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
def test_hugging_face_datasets(corpus: Folder, stream: str, streaming: bool, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(corpus.path(), stream, split="train", streaming=streaming, cache_dir=str(tmp_path))
    assert list(loaded.features) == [*STREAMS[stream].members, "__key__", "__url__"]
    want = expected(corpus, stream)
    samples = list(loaded)
    assert len(samples) == len(want)
    for sample in samples:
        members = want[sample["__key__"]]
        assert sample["txt"] == members["txt"].decode()
        assert sample["json"] == json.loads(members["json"])
        for name in STREAMS[stream].image_members:
            np.testing.assert_array_equal(np.asarray(sample[name]), pixels(members[name]))


@pytest.mark.slow
@streams
def test_ray_data(corpus: Folder, stream: str, local_ray: Any) -> None:
    loaded = local_ray.data.read_webdataset(corpus.path(f"data/{stream}"), file_extensions=["tar"])
    want = expected(corpus, stream)
    samples = loaded.take_all()
    assert len(samples) == len(want)
    for sample in samples:
        members = want[sample["__key__"]]
        assert sample["txt"] == members["txt"].decode()
        assert sample["json"]["key"] == sample["__key__"]
        for name in STREAMS[stream].image_members:
            np.testing.assert_array_equal(np.asarray(sample[name]), pixels(members[name]))


@streams
@pytest.mark.parametrize("image_decode", [None, "pil"])
def test_megatron_energon_without_prepare(corpus: Folder, stream: str, image_decode: str | None) -> None:
    energon = pytest.importorskip("megatron.energon")

    def cook(crude: dict[str, Any]) -> Any:
        cooked = energon.Sample(**energon.basic_sample_keys(crude))
        cooked.members = {name: crude[name] for name in STREAMS[stream].members}
        return cooked

    class Encoder(energon.DefaultTaskEncoder):  # type: ignore[misc, name-defined]
        cookers = (energon.Cooker(energon.stateless(cook)),)
        decoder = energon.SampleDecoder(image_decode=image_decode) if image_decode else None

    dataset = energon.get_val_dataset(
        corpus.path(f"data/{stream}"),
        split_part="train",
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        task_encoder=Encoder(),
    )
    samples = {s.__key__: s.members for s in energon.get_loader(dataset)}
    want = expected(corpus, stream)
    if image_decode is None:
        assert samples == want
        return
    assert samples.keys() == want.keys()
    for key, members in samples.items():
        assert members["txt"] == want[key]["txt"].decode()
        assert members["json"] == json.loads(want[key]["json"])
        for name in STREAMS[stream].image_members:
            rgb = Image.open(io.BytesIO(want[key][name])).convert("RGB")
            np.testing.assert_array_equal(np.asarray(members[name].convert("RGB")), np.asarray(rgb))


@streams
def test_wids_index(corpus: Folder, stream: str) -> None:
    """`wids` resolves URLs against the index file, and compares md5 and sample counts."""
    path = Path(corpus.path(f"index/{stream}-wids.json"))
    index = json.loads(path.read_text())
    assert (index["__kind__"], index["wids_version"]) == ("wids-shard-index-v1", 1)
    resolved = [(path.parent / shard["url"]).resolve() for shard in index["shardlist"]]
    assert [str(p) for p in resolved] == paths(corpus, stream)
    for shard, tar in zip(index["shardlist"], resolved, strict=True):
        with tar.open("rb") as file:
            digest = digest_of_file(file)
        assert (shard["md5sum"], shard["filesize"]) == (digest.md5, digest.bytes)
        assert shard["nsamples"] * len(STREAMS[stream].members) == len(tar_members(tar.read_bytes()))


@pytest.mark.slow
def test_the_code_in_the_card_runs(corpus: Folder, local_ray: Any) -> None:
    blocks = re.findall(r"```python\n(.*?)```", corpus.read_bytes("README.md").decode(), re.DOTALL)
    assert len(blocks) == 5
    for code in blocks:
        names: dict[str, Any] = {"root": corpus.path(), "__name__": "__main__"}
        exec(compile(code, "README.md", "exec", dont_inherit=True), names)
        if "index" in names:
            assert len(names["index"]) == 6 * len(STREAM_NAMES)
        else:
            samples = names["samples"].iter_rows() if "ray" in names else names["samples"]
            assert next(iter(samples))


def test_sixteen_bits_survive_as_raw_bytes(tmp_path: Path) -> None:
    """Decoders of some readers reduce them to 8 bits, so depth is read as bytes."""
    wds, datasets = pytest.importorskip("webdataset"), pytest.importorskip("datasets")
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    sample = next(make_samples("perceive"))
    members = {**sample.members, "output.png": encode_png(ramp)}
    tar = tmp_path / "perceive-000000.tar"
    tar.write_bytes(encode_sample(sample.record.key, members, STREAMS["perceive"]) + END_OF_ARCHIVE)
    (raw,) = wds.WebDataset(str(tar), shardshuffle=False)
    assert raw["output.png"] == members["output.png"]
    loaded = datasets.load_dataset("webdataset", data_files=str(tar), split="train", streaming=True)
    (undecoded,) = loaded.cast_column("output.png", datasets.Image(decode=False))
    np.testing.assert_array_equal(pixels(undecoded["output.png"]["bytes"]), ramp)


# What broke a reader in the matrix of pitfalls, and where the writer stops it.


@pytest.mark.parametrize("key", ["v1.5-0000", "UPPER", "ключ", "a/b", "", "-lead", "k" * 65], ids=repr)
def test_keys_that_readers_split_or_mangle_are_refused(key: str) -> None:
    sample = next(make_samples("text_to_image"))
    with pytest.raises(ValueError, match="does not match"):
        encode_sample(key, sample.members, STREAMS["text_to_image"])
    with pytest.raises(ValueError, match="does not match"):
        SampleRecord.model_validate({**sample.record.model_dump(), "key": key})


@pytest.mark.parametrize("name", ["OUTPUT.JPG", "output.jpeg", "output.webp", "input_1.jpg", "__meta__"])
def test_members_foreign_to_the_stream_are_refused(name: str) -> None:
    members = next(make_samples("text_to_image")).members
    with pytest.raises(ShardError, match="needs members"):
        encode_sample("key", {**members, name: b"data"}, STREAMS["text_to_image"])


@pytest.mark.parametrize("name", STREAMS["edit"].members)
def test_missing_and_empty_members_are_refused(name: str) -> None:
    members = next(make_samples("edit")).members
    with pytest.raises(ShardError, match="needs members"):
        encode_sample("key", {m: d for m, d in members.items() if m != name}, STREAMS["edit"])
    with pytest.raises(ShardError, match="is empty"):
        encode_sample("key", {**members, name: b""}, STREAMS["edit"])


def test_long_names_and_overlong_keys_are_refused() -> None:
    with pytest.raises(ShardError, match="100 bytes"):
        header("k" * 64 + "." + "x" * 36, 1)
    with pytest.raises(ValueError, match="does not match"):
        sample_key("0" * 64, "text_to_image", "s" * 40)


def test_no_shard_has_extended_headers_or_foreign_members(corpus: Folder) -> None:
    """PAX headers double the reading time; directories and metadata members count as samples in some readers."""
    for shard in find_shards(corpus):
        data = corpus.read_bytes(shard.tar)
        found, members = tar_members(data), STREAMS[shard.stream].members
        assert {data[m.offset + 156 : m.offset + 157] for m in found} == {b"0"}
        assert [m.name.partition(".")[2] for m in found] == [*members] * (len(found) // len(members))


@streams
def test_records_keep_keys_and_types_and_hold_no_null(corpus: Folder, stream: str) -> None:
    """Readers infer types from the first records: `-1` for a float, or a null, fails or drops a field later."""
    records = [json.loads(members["json"]) for members in expected(corpus, stream).values()]
    assert {tuple(r) for r in records} == {tuple(SampleRecord.model_fields)}
    assert "null" not in {str(t) for r in records for t in pa.array([_leaves(r)]).type}
    assert {type(r["severity"]) for r in records} == {float}
    with pytest.raises(ValueError, match="severity"):
        SampleRecord.model_validate({**records[0], "severity": None})


def _leaves(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if not isinstance(value, list)}


def test_two_samples_never_share_a_key() -> None:
    keys = [s.record.key for stream in STREAM_NAMES for s in make_samples(stream)]
    assert len(keys) == len(set(keys)) == len(STREAM_NAMES) * len(photos())
    assert len({encode_jpeg(p) for p in photos().values()}) == len(photos())
