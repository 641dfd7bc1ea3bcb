"""The linter finds nothing in a sound corpus, and each planted defect under its rule."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from builders.base import Sample
from pipelines.corpus import Shard, find_shards, read_index
from pipelines.lint import Finding, lint
from pipelines.publish import publish
from pipelines.storage import Folder
from schemas.arrow import SAMPLES
from schemas.codec import decode_rgb, encode_jpeg, encode_png
from schemas.shards import END_OF_ARCHIVE, encode_member
from schemas.vocabulary import STREAMS
from tests.corpora import NAME, RECIPE, VERSIONS, make_corpus, make_samples, write_shard

EDIT, PERCEIVE, TEXT = Shard("edit", 0), Shard("perceive", 0), Shard("text_to_image", 0)
Members = dict[str, bytes]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return make_corpus(tmp_path_factory.mktemp("sound"), ("edit", "perceive", "text_to_image"))


@pytest.fixture
def corpus(sound: Folder, tmp_path: Path) -> Folder:
    """A copy to damage."""
    shutil.copytree(sound.path(), tmp_path / "corpus")
    return Folder(str(tmp_path / "corpus"))


def republish(corpus: Folder) -> None:
    """Bring manifest and tar index up to date, so that only the planted defect is left."""
    publish(corpus, NAME, RECIPE, VERSIONS)


def rules(corpus: Folder) -> set[str]:
    return {finding.rule for finding in lint(corpus)}


def rewrite_members(corpus: Folder, shard: Shard, change: Callable[[str, Members], Members], nth: int = 1) -> str:
    """Replace the members of the n-th sample, keeping the tar sound and its places in the index right."""
    rows = read_index(corpus, shard).to_pylist()
    data, tar = corpus.read_bytes(shard.tar), bytearray()
    for i, row in enumerate(rows):
        members = {m["name"]: data[m["offset"] :][: m["size"]] for m in row["members"]}
        if i == nth:
            members = change(row["key"], members)
        row["offset"] = len(tar)
        by_name = {m["name"]: m for m in row["members"]}
        row["members"] = []
        for name, content in members.items():
            place = {"name": name, "offset": len(tar) + 512, "size": len(content)}
            row["members"].append({"width": -1, "height": -1} | by_name.get(name, {}) | place)
            tar += encode_member(f"{row['key']}.{name}", content)
        row["size"] = len(tar) - row["offset"]
    corpus.write_bytes(shard.tar, bytes(tar) + END_OF_ARCHIVE)
    corpus.write_table(shard.sample_index, pa.Table.from_pylist(rows, SAMPLES))
    republish(corpus)
    return str(rows[nth]["key"])


def rewrite_index(corpus: Folder, shard: Shard, change: Callable[[dict[str, Any]], None], nth: int = 1) -> None:
    rows = read_index(corpus, shard).to_pylist()
    change(rows[nth])
    corpus.write_table(shard.sample_index, pa.Table.from_pylist(rows, SAMPLES))


def edit_record(change: Callable[[dict[str, Any]], Any]) -> Callable[[str, Members], Members]:
    """A change of the JSON member; written compactly, as ours are."""

    def apply(_: str, members: Members) -> Members:
        record = json.loads(members["json"])
        record = change(record) or record
        return {**members, "json": json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()}

    return apply


def test_a_sound_corpus_has_no_findings(sound: Folder) -> None:
    assert lint(sound) == []


def test_a_finding_names_file_key_and_rule(corpus: Folder) -> None:
    key = rewrite_members(corpus, TEXT, edit_record(lambda r: r.update(severity=None)))
    (finding,) = lint(corpus)
    assert finding == Finding(f"{TEXT.tar}::{key}", "json_null", "null at severity")
    assert str(finding) == f"{TEXT.tar}::{key}: json_null: null at severity"


RECORD_DEFECTS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "null deep inside": ("json_null", lambda r: r["ops"][0].update(seed=None)),
    "missing key": ("json_keys", lambda r: r.pop("scores") and None),
    "extra key": ("json_keys", lambda r: r.update(extra=1)),
    "other key order": ("json_keys", lambda r: dict(sorted(r.items()))),
    "not an object": ("json_keys", lambda r: [r]),
    "integer for a float": ("json_form", lambda r: r.update(severity=1)),
    "not a number": ("json", lambda r: r.update(severity=float("nan"))),
    "text for a number": ("record", lambda r: r.update(severity="high")),
    "unknown split": ("record", lambda r: r.update(split="dev")),
    "no parent": ("record", lambda r: r.update(parents=[])),
    "key of another sample": ("record", lambda r: r.update(key="another")),
    "stream of another task": ("record", lambda r: r.update(stream="style")),
    "no placeholder": ("placeholder", lambda r: r.update(instruction="Tint it blue.")),
    "gap in placeholders": ("placeholder", lambda r: r.update(instruction="<img><|image_2|></img> in blue")),
    "malformed tag": ("placeholder", lambda r: r.update(instruction="<img><|image_1|><\\img> in blue")),
    "bad variant": ("placeholder", lambda r: r.update(instruction_variants=["Tint it blue."])),
    "reserved token": ("placeholder", lambda r: r.update(instruction="<img><|image_1|></img> <cfg>")),
}


@pytest.mark.parametrize(("rule", "change"), RECORD_DEFECTS.values(), ids=RECORD_DEFECTS)
def test_defects_of_the_record(corpus: Folder, rule: str, change: Callable[[dict[str, Any]], Any]) -> None:
    rewrite_members(corpus, EDIT, edit_record(change))
    assert rules(corpus) == {rule}


def swap(name: str, convert: Callable[[bytes], bytes], source: str = "") -> Callable[[str, Members], Members]:
    """Replace a member by what `convert` makes of it, or of another one."""
    return lambda _, members: {**members, name: convert(members[source or name])}


def as_png(data: bytes) -> bytes:
    return encode_png(decode_rgb(data))


def as_grey_png(data: bytes) -> bytes:
    return encode_png(decode_rgb(data)[..., 0])


def as_deep_png(data: bytes) -> bytes:
    return encode_png(decode_rgb(data)[..., 0].astype(np.uint16))


def as_grey_jpeg(data: bytes) -> bytes:
    return encode_jpeg(decode_rgb(data)[..., 0])


def smaller_jpeg(data: bytes) -> bytes:
    return encode_jpeg(decode_rgb(data)[:-16, :-16])


def smaller_png(data: bytes) -> bytes:
    return encode_png(decode_rgb(data)[:-16, :-16, 0])


def without_mask(_: str, members: Members) -> Members:
    return {name: data for name, data in members.items() if name != "edit_mask.png"}


MEMBER_DEFECTS: dict[str, tuple[Shard, set[str], Callable[[str, Members], Members]]] = {
    "broken JSON": (EDIT, {"json"}, swap("json", lambda _: b"{")),
    "txt differs": (EDIT, {"instruction"}, swap("txt", lambda _: b"something else")),
    "missing member": (EDIT, {"members"}, without_mask),
    "foreign member": (EDIT, {"members"}, lambda _, members: {**members, "depth.npy": b"x"}),
    "other member order": (EDIT, {"members"}, lambda _, members: dict(reversed(members.items()))),
    "cut JPEG": (EDIT, {"decode"}, swap("output.jpg", lambda data: data[:2000])),
    "not an image": (EDIT, {"decode"}, swap("output.jpg", lambda _: b"<html>404</html>")),
    "PNG named jpg": (EDIT, {"image_format"}, swap("output.jpg", as_png)),
    "JPEG named png": (PERCEIVE, {"image_format"}, swap("output.png", bytes, "input_1.jpg")),
    "grey photo": (PERCEIVE, {"image_mode"}, swap("input_1.jpg", as_grey_jpeg)),
    "16-bit map": (PERCEIVE, {"image_mode"}, swap("output.png", as_deep_png)),
    "grey mask": (EDIT, {"mask"}, swap("edit_mask.png", as_grey_png, "input_1.jpg")),
    "colour mask": (EDIT, {"mask"}, swap("edit_mask.png", as_png)),
    "mask of another size": (EDIT, {"size", "index"}, swap("edit_mask.png", smaller_png)),
    "source of another size": (EDIT, {"size", "index"}, swap("input_1.jpg", smaller_jpeg)),
    "map of another size": (PERCEIVE, {"size", "index"}, swap("output.png", smaller_png)),
}


@pytest.mark.parametrize(("shard", "expected", "change"), MEMBER_DEFECTS.values(), ids=MEMBER_DEFECTS)
def test_defects_of_members(
    corpus: Folder, shard: Shard, expected: set[str], change: Callable[[str, Members], Members]
) -> None:
    rewrite_members(corpus, shard, change)
    assert rules(corpus) == expected


def test_an_unaligned_source_may_have_another_size(corpus: Folder) -> None:
    rewrite_members(corpus, EDIT, edit_record(lambda r: r.update(aligned=False)))
    rewrite_index(corpus, EDIT, lambda row: row.update(aligned=False))
    rewrite_members(corpus, EDIT, swap("input_1.jpg", smaller_jpeg))
    assert rules(corpus) == {"index"}


INDEX_DEFECTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "shifted sample": lambda row: row.update(offset=row["offset"] + 512),
    "shifted member": lambda row: row["members"][0].update(offset=row["members"][0]["offset"] + 1),
    "wrong member size": lambda row: row["members"][0].update(size=1),
    "wrong image size": lambda row: row["members"][0].update(width=1),
    "other instruction": lambda row: row.update(instruction="<img><|image_1|></img> in red"),
    "other licence": lambda row: row.update(license="MIT"),
    "other position": lambda row: row.update(index=7),
    "other shard": lambda row: row.update(shard="data/edit/edit-000001.tar"),
}


@pytest.mark.parametrize("change", INDEX_DEFECTS.values(), ids=INDEX_DEFECTS)
def test_defects_of_the_index(corpus: Folder, change: Callable[[dict[str, Any]], None]) -> None:
    rewrite_index(corpus, EDIT, change)
    assert rules(corpus) == {"index"}


def test_an_index_row_too_few(corpus: Folder) -> None:
    corpus.write_table(EDIT.sample_index, read_index(corpus, EDIT).slice(0, 3))
    details = {f.detail for f in lint(corpus) if f.rule == "index"}
    assert details == {"has 4 samples, the sample index 3", "is not in the sample index"}


def rewrite_tar(
    corpus: Folder, shard: Shard, write: Callable[[tarfile.TarFile, tarfile.TarInfo, bytes], None], form: int
) -> None:
    """The same members through Python's own writer."""
    source, target = io.BytesIO(corpus.read_bytes(shard.tar)), io.BytesIO()
    with tarfile.open(fileobj=source) as old, tarfile.open(fileobj=target, mode="w", format=form) as new:
        for info in old:
            file = old.extractfile(info)
            assert file is not None
            write(new, info, file.read())
    corpus.write_bytes(shard.tar, target.getvalue())


def test_headers_with_a_time_and_pax_headers(corpus: Folder) -> None:
    def stamp(mtime: float) -> Callable[[tarfile.TarFile, tarfile.TarInfo, bytes], None]:
        def write(tar: tarfile.TarFile, info: tarfile.TarInfo, data: bytes) -> None:
            info.mtime = mtime  # type: ignore[assignment]
            tar.addfile(info, io.BytesIO(data))

        return write

    rewrite_tar(corpus, TEXT, stamp(1_700_000_000), tarfile.USTAR_FORMAT)
    details = [f.detail for f in lint(corpus) if f.rule == "header"]
    assert "is not plain USTAR" in details[0]
    assert len(details) == 4 * len(STREAMS["text_to_image"].members)
    rewrite_tar(corpus, TEXT, stamp(1_700_000_000.5), tarfile.PAX_FORMAT)
    assert "has an extended header" in next(f.detail for f in lint(corpus) if f.rule == "header")


@pytest.mark.parametrize("name", ["v1.5-0000", "Upper"])
def test_unsafe_keys(corpus: Folder, name: str) -> None:
    def write(tar: tarfile.TarFile, info: tarfile.TarInfo, data: bytes) -> None:
        info.name = f"{name}.{info.name.partition('.')[2]}"
        tar.addfile(info, io.BytesIO(data))

    one = next(make_samples("text_to_image"))
    write_shard(corpus, TEXT, [one])
    rewrite_tar(corpus, TEXT, write, tarfile.USTAR_FORMAT)
    assert rules(corpus) >= {"members" if "." in name else "key"}


def damage(corpus: Folder, shard: Shard, change: Callable[[bytes], bytes]) -> set[str]:
    corpus.write_bytes(shard.tar, change(corpus.read_bytes(shard.tar)))
    return rules(corpus)


def test_damaged_tars(corpus: Folder) -> None:
    intact = corpus.read_bytes(TEXT.tar)
    second = read_index(corpus, TEXT)["offset"][1].as_py()
    assert damage(corpus, TEXT, lambda d: d[:-1024]) == {"tar", "manifest", "sha256"}
    assert damage(corpus, TEXT, lambda _: intact[: second + 700]) >= {"tar", "index", "sha256", "tar_index"}
    assert damage(corpus, TEXT, lambda _: intact + b"\0" * 8192) == {"tar", "manifest", "sha256"}
    assert damage(corpus, TEXT, lambda _: b"") >= {"tar", "empty", "index"}
    # An unused byte of the padding: everything still decodes.
    first = read_index(corpus, TEXT).to_pylist()[0]["members"][-1]
    end = first["offset"] + first["size"]
    assert damage(corpus, TEXT, lambda _: intact[:end] + b"!" + intact[end + 1 :]) == {"padding", "sha256"}


def test_an_empty_shard(corpus: Folder) -> None:
    write_shard(corpus, Shard("text_to_image", 2), [])
    findings = [f for f in lint(corpus) if f.path == Shard("text_to_image", 2).tar]
    assert {f.rule for f in findings} == {"empty", "manifest", "tar_index"}


def test_wrong_checksum_recipe_and_tar_index(corpus: Folder) -> None:
    manifest = corpus.read_json("manifest.json")
    manifest["streams"]["edit"]["shards"][0]["sha256"] = "0" * 64
    corpus.write_json("manifest.json", manifest)
    corpus.write_bytes("recipe.yaml", b"seed: 8\n")
    corpus.write_bytes(PERCEIVE.tar_index, corpus.read_bytes(PERCEIVE.tar_index)[8:])
    corpus.remove(TEXT.tar_index)
    assert [(f.path, f.rule) for f in lint(corpus)] == [
        ("recipe.yaml", "manifest"),
        (EDIT.tar, "sha256"),
        (PERCEIVE.tar, "tar_index"),
        (TEXT.tar, "tar_index"),
    ]


def test_missing_and_stray_files(corpus: Folder) -> None:
    corpus.write_bytes("data/edit/extra.tar", END_OF_ARCHIVE)
    corpus.remove(EDIT.tar)
    corpus.remove(PERCEIVE.sample_index)
    assert {(f.path, f.rule) for f in lint(corpus)} == {
        ("data/edit/extra.tar", "layout"),
        (EDIT.sample_index, "layout"),
        ("data/edit", "layout"),
        (PERCEIVE.sample_index, "layout"),
        (EDIT.tar, "manifest"),
    }
    corpus.remove("manifest.json")
    assert Finding("manifest.json", "manifest", "is missing: the corpus was not published") in lint(corpus)


def test_a_key_in_two_shards(corpus: Folder) -> None:
    first, *_ = make_samples("text_to_image")
    write_shard(corpus, Shard("text_to_image", 2), [first])
    republish(corpus)
    (finding,) = lint(corpus)
    assert finding.rule == "duplicate_key"
    assert finding.path == f"{Shard('text_to_image', 2).tar}::{first.record.key}"
    assert finding.detail == f"also in {TEXT.tar}"


def test_a_scene_and_a_parent_in_two_splits(corpus: Folder) -> None:
    def leak(sample: Sample) -> Sample:
        return replace(sample, record=sample.record.model_copy(update={"split": "test"}))

    samples = list(make_samples("text_to_image"))
    write_shard(corpus, TEXT, [leak(samples[0]), *samples[1:4]])
    republish(corpus)
    scene, parent = samples[0].record.scene_id, samples[0].record.parents[0]
    details = {f.detail for f in lint(corpus) if f.rule == "split_leak"}
    assert details == {f"scene_id {scene} is in test, train", f"parent {parent} is in test, train"}


def test_every_shard_is_checked(corpus: Folder) -> None:
    for shard in find_shards(corpus):
        rewrite_index(corpus, shard, lambda row: row.update(author="someone else"))
    assert [f.path.partition("::")[0] for f in lint(corpus)] == [s.tar for s in find_shards(corpus)]
