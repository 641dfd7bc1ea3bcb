"""Is a published corpus what it says it is? Strict where readers are forgiving, so that all of them agree.

`lint_shard` is a pure function of one shard and what is recorded about it, so shards can be checked in parallel;
`lint_index` sees what no shard can: repeated keys and leaks between splits.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from pydantic import ValidationError

from pipelines.corpus import Shard, find_shards, read_index
from pipelines.findings import Finding
from pipelines.lint_groups import lint_groups
from pipelines.lint_latents import lint_latents
from pipelines.publish import tar_index
from pipelines.storage import Folder
from pipelines.tombstones import PATH, is_pending, read_tombstones
from schemas.identity import KEY_PATTERN
from schemas.instructions import lint_instruction
from schemas.records import SampleRecord
from schemas.shards import END_OF_ARCHIVE, Member, SampleSpan, ShardError, header, iter_samples
from schemas.vocabulary import STREAMS, Stream

_FORMATS = {"jpg": ("JPEG", {"RGB"}), "png": ("PNG", {"L", "RGB"})}


def lint(corpus: Folder) -> list[Finding]:
    """Every finding in a published corpus, in order of shards; an empty list means that it is sound.

    Raises:
        CorpusError: there is no shard at all.
    """
    shards = find_shards(corpus)
    findings = list(_lint_layout(corpus, shards))
    entries = _manifest_entries(corpus)
    complete = [shard for shard in shards if corpus.exists(shard.sample_index)]
    for shard in complete:
        findings += lint_shard(corpus, shard, entries.get(shard.tar))
    return [
        *findings,
        *lint_index(corpus, complete),
        *lint_groups(corpus, complete),
        *lint_latents(corpus, complete),
        *lint_tombstones(corpus, complete),
    ]


def lint_shard(corpus: Folder, shard: Shard, entry: Mapping[str, Any] | None) -> list[Finding]:
    """Findings in one shard and its indexes; holds the bytes of one sample at a time.

    Args:
        corpus: the corpus.
        shard: a shard with a sample index.
        entry: its entry in the manifest, None if there is none.
    """
    rows = read_index(corpus, shard).to_pylist()
    findings: list[Finding] = []
    spans: list[SampleSpan] = []
    digest = hashlib.sha256()
    with cast(BinaryIO, corpus.open(shard.tar)) as file:
        try:
            for i, span in enumerate(iter_samples(file)):
                data = _read_at(file, span.start, span.end - span.start)
                row = rows[i] if i < len(rows) else None
                path = f"{shard.tar}::{span.key}"
                findings += [Finding(path, *problem) for problem in _lint_sample(shard, span, data, i, row)]
                digest.update(data)
                spans.append(span)
        except ShardError as error:
            findings.append(Finding(shard.tar, "tar", str(error)))
        end = spans[-1].end if spans else 0
        tail = _read_at(file, end, -1)
        digest.update(tail)
    problems = [*_lint_whole(spans, tail), *_lint_recorded(rows, spans, entry, end + len(tail), digest.hexdigest())]
    problems += _lint_tar_index(corpus, shard, spans)
    return findings + [Finding(shard.tar, *problem) for problem in problems]


def lint_index(corpus: Folder, shards: Iterable[Shard]) -> list[Finding]:
    """Keys that occur twice in the corpus, and scenes or parent images whose samples are in two splits."""
    tables = [read_index(corpus, s, ("key", "shard", "scene_id", "split", "parents")) for s in shards]
    if not tables:
        return []
    index = pa.concat_tables(tables)
    keys = index.group_by("key").aggregate([("shard", "list")])
    repeated = keys.filter(pc.greater(pc.list_value_length(keys["shard_list"]), 1))
    findings = []
    for row in repeated.to_pylist():
        first, *_, last = sorted(row["shard_list"])  # threads group, in any order
        findings.append(Finding(f"{last}::{row['key']}", "duplicate_key", f"also in {first}"))
    scenes = index.filter(pc.not_equal(index["scene_id"], "")).select(["scene_id", "split"])
    of_parents = index["split"].take(pc.list_parent_indices(index["parents"]))
    parents = pa.table({"parent": pc.list_flatten(index["parents"]), "split": of_parents})
    return sorted([*findings, *_leaks(scenes, "scene_id"), *_leaks(parents, "parent")])


def lint_tombstones(corpus: Folder, shards: Iterable[Shard]) -> list[Finding]:
    """Samples that descend from an image which the corpus has forgotten."""
    forgotten = read_tombstones(corpus)
    findings = []
    if is_pending(corpus):
        findings.append(Finding(PATH, "forgotten", "forgetting has begun and not ended: run `x2i forget` again"))
    for shard in shards if forgotten else ():
        for row in read_index(corpus, shard, ("key", "parents")).to_pylist():
            if gone := sorted(forgotten.keys() & set(row["parents"])):
                findings.append(Finding(f"{shard.tar}::{row['key']}", "forgotten", f"descends from {gone[0]}"))
    return findings


Problem = tuple[str, str]  # rule and detail; the functions above say where


class _Broken(Exception):
    """What keeps a member from being looked at any further; `args` is the problem."""


def _lint_layout(corpus: Folder, shards: list[Shard]) -> Iterator[Finding]:
    """Every file that there should be, and no tar that there should not."""
    known = {shard.tar for shard in shards}
    for stray in sorted({*corpus.list("data", ".tar")} - known):
        yield Finding(stray, "layout", "is not named data/<stream>/<stream>-<6 digits>.tar with a known stream")
    for orphan in sorted({*corpus.list("meta/samples", ".parquet")} - {s.sample_index for s in shards}):
        yield Finding(orphan, "layout", "has no shard")
    for stream in sorted({shard.stream for shard in shards}):
        numbers = [shard.number for shard in shards if shard.stream == stream]
        if numbers != list(range(len(numbers))):
            yield Finding(f"data/{stream}", "layout", f"shard numbers {numbers} are not contiguous from 0")
    for shard in shards:
        if not corpus.exists(shard.sample_index):
            yield Finding(shard.sample_index, "layout", "is missing")
    yield from _lint_manifest(corpus, known)


def _lint_manifest(corpus: Folder, tars: set[str]) -> Iterator[Finding]:
    if not corpus.exists("manifest.json"):
        yield Finding("manifest.json", "manifest", "is missing: the corpus was not published")
        return
    for gone in sorted(_manifest_entries(corpus).keys() - tars):
        yield Finding(gone, "manifest", "is in the manifest, but there is no such shard")
    recipe = hashlib.sha256(corpus.read_bytes("recipe.yaml")).hexdigest()
    if recipe != corpus.read_json("manifest.json")["recipe_sha256"]:
        yield Finding("recipe.yaml", "manifest", "is not the recipe whose sha256 is in the manifest")


def _manifest_entries(corpus: Folder) -> dict[str, dict[str, Any]]:
    """Manifest entries by path of the shard."""
    if not corpus.exists("manifest.json"):
        return {}
    streams = corpus.read_json("manifest.json")["streams"]
    return {f"data/{name}/{entry['name']}": entry for name, s in streams.items() for entry in s["shards"]}


def _read_at(file: BinaryIO, start: int, size: int) -> bytes:
    """Read without moving the position that the tar reader relies on."""
    position = file.tell()
    file.seek(start)
    data = file.read(size)
    file.seek(position)
    return data


def _lint_sample(shard: Shard, span: SampleSpan, data: bytes, i: int, row: dict[str, Any] | None) -> Iterator[Problem]:
    stream = STREAMS[shard.stream]
    if not KEY_PATTERN.fullmatch(span.key):
        yield "key", f"does not match {KEY_PATTERN.pattern}"
    yield from _lint_blocks(span, data)
    if tuple(span.members) != stream.members:
        yield "members", f"has {', '.join(span.members)} instead of {', '.join(stream.members)}"
        return
    contents = {name: data[m.offset - span.start :][: m.size] for name, m in span.members.items()}
    images, problems = _decode_images(contents, stream)
    yield from problems
    place = {"key": span.key, "shard": shard.tar, "index": i, "offset": span.start, "size": span.end - span.start}
    try:
        record = _parse_record(contents["json"], span.key, stream)
        place |= record.model_dump(mode="json")
        if contents["txt"] != record.instruction.encode():
            yield "instruction", f"txt {contents['txt']!r} differs from the record's {record.instruction!r}"
        if len(images) == len(stream.image_members):
            yield from _lint_sizes(images, record, stream)
    except _Broken as broken:
        yield broken.args
    if row is None:
        yield "index", "is not in the sample index"
    else:
        yield from _lint_row(row, place, span, images)


def _lint_blocks(span: SampleSpan, data: bytes) -> Iterator[Problem]:
    """Headers are byte for byte those of our writer (USTAR, mtime 0, no extensions), and padding is zero."""
    position = span.start
    for extension, member in span.members.items():
        name = f"{span.key}.{extension}"
        if member.header != position or member.offset != position + 512:
            yield "header", f"{name} has an extended header or a gap before it"
        elif member.name != name or _header_of(member) != data[position - span.start :][:512]:
            yield "header", f"{name} is not plain USTAR with mtime, uid and gid 0 and mode 0644"
        if any(data[member.offset + member.size - span.start : member.end - span.start]):
            yield "padding", f"{name} is not padded with zeros"
        position = member.end


def _header_of(member: Member) -> bytes | None:
    try:
        return header(member.name, member.size)
    except ShardError:
        return None


def _parse_record(data: bytes, key: str, stream: Stream) -> SampleRecord:
    try:
        plain = json.loads(data, parse_constant=_no_constant)
    except ValueError as error:
        raise _Broken("json", f"is not JSON: {error}") from error
    if not isinstance(plain, dict) or list(plain) != list(SampleRecord.model_fields):
        raise _Broken("json_keys", "the keys are not those of the sample record, in its order")
    for path, value in _leaves(plain):
        if value is None:
            raise _Broken("json_null", f"null at {path}")
        is_instruction = path.startswith("instruction") and isinstance(value, str)
        if is_instruction and (problems := lint_instruction(value, len(stream.inputs))):
            raise _Broken("placeholder", f"{value!r}: {'; '.join(problems)}")
    try:
        record = SampleRecord.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        raise _Broken("record", f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if (record.key, record.stream) != (key, stream.name):
        raise _Broken("record", f"says key {record.key}, stream {record.stream}")
    if record.to_json() != data:
        raise _Broken("json_form", "is not in canonical form (no spaces, floats with a decimal point)")
    return record


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Scalars of a JSON value with their dotted paths."""
    if not isinstance(value, dict | list):
        yield path, value
        return
    for name, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(item, f"{path}.{name}" if path else str(name))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _decode_images(contents: Mapping[str, bytes], stream: Stream) -> tuple[dict[str, Image.Image], list[Problem]]:
    images: dict[str, Image.Image] = {}
    problems: list[Problem] = []
    for name in stream.image_members:
        form, modes = _FORMATS[name.rpartition(".")[2]]
        try:
            image = Image.open(io.BytesIO(contents[name]))
            image.load()
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            problems.append(("decode", f"{name}: {error}"))
            continue
        images[name] = image
        if image.format != form:
            problems.append(("image_format", f"{name} is {image.format}"))
        elif image.mode not in modes:
            problems.append(
                ("image_mode", f"{name} has mode {image.mode}; readers expect {' or '.join(sorted(modes))}")
            )
    mask = images.get("edit_mask.png")
    if mask and not (mask.mode == "L" and np.isin(np.asarray(mask), (0, 255)).all()):
        problems.append(("mask", "edit_mask.png is not 8-bit grey with values 0 and 255 only"))
    return images, problems


def _lint_sizes(images: Mapping[str, Image.Image], record: SampleRecord, stream: Stream) -> Iterator[Problem]:
    """Images that are compared pixel by pixel have the size of the output."""
    inputs = [name for name in images if name.startswith("input_")]
    same = inputs if stream.task in ("control", "perceive") else []
    if record.aligned and record.edit_source_index >= 0:
        same = [inputs[record.edit_source_index]]
    if stream.edit_mask:
        same = [*same, "edit_mask.png"]
    output = images[f"output.{stream.output}"].size
    for name in same:
        if images[name].size != output:
            yield "size", f"{name} is {images[name].size}, the output {output} (width, height)"


def _lint_row(
    row: Mapping[str, Any], actual: Mapping[str, Any], span: SampleSpan, images: Mapping[str, Image.Image]
) -> Iterator[Problem]:
    """The index row says the same as the shard. `actual` is the record and the place of the sample."""
    for name, value in actual.items():
        if row[name] != value:
            yield "index", f"{name} is {row[name]!r} in the sample index, {value!r} in the shard"
    if [m["name"] for m in row["members"]] != list(span.members):
        yield "index", "lists other members"
        return
    for member, (name, found) in zip(row["members"], span.members.items(), strict=True):
        if (member["offset"], member["size"]) != (found.offset, found.size):
            yield "index", f"{name} is at another place than the sample index says"
        size = images[name].size if name in images else (-1, -1)
        if (member["width"], member["height"]) != size and (name in images or name in ("txt", "json")):
            yield "index", f"{name} is {size}, the sample index says {(member['width'], member['height'])}"


def _lint_whole(spans: list[SampleSpan], tail: bytes) -> Iterator[Problem]:
    if not spans:
        yield "empty", "has no sample"
    starts = [span.start for span in spans]
    if starts != [0, *(span.end for span in spans)][: len(spans)]:
        yield "tar", "has gaps between samples"
    if tail != END_OF_ARCHIVE:
        yield "tar", f"ends with {len(tail)} bytes instead of two zero blocks"


def _lint_recorded(
    rows: list[dict[str, Any]], spans: list[SampleSpan], entry: Mapping[str, Any] | None, size: int, sha256: str
) -> Iterator[Problem]:
    if len(rows) != len(spans):
        yield "index", f"has {len(spans)} samples, the sample index {len(rows)}"
    if entry is None:
        yield "manifest", "is not in the manifest"
        return
    if (entry["samples"], entry["bytes"]) != (len(spans), size):
        recorded = f"{entry['samples']} samples in {entry['bytes']} bytes"
        yield "manifest", f"has {len(spans)} samples in {size} bytes, the manifest says {recorded}"
    if entry["sha256"] != sha256:
        yield "sha256", f"is {sha256}, the manifest says {entry['sha256']}"


def _lint_tar_index(corpus: Folder, shard: Shard, spans: list[SampleSpan]) -> Iterator[Problem]:
    expected = tar_index(np.array([span.start for span in spans], np.int64), spans[-1].end if spans else 0)
    if not corpus.exists(shard.tar_index):
        yield "tar_index", f"{shard.tar_index} is missing"
    elif corpus.read_bytes(shard.tar_index) != expected:
        yield "tar_index", f"{shard.tar_index} does not hold the offsets of the samples"


def _leaks(table: pa.Table, name: str) -> list[Finding]:
    groups = table.group_by(name).aggregate([("split", "distinct")])
    leaks = groups.filter(pc.greater(pc.list_value_length(groups["split_distinct"]), 1))
    return [
        Finding("meta/samples", "split_leak", f"{name} {row[name]} is in {', '.join(sorted(row['split_distinct']))}")
        for row in leaks.to_pylist()
    ]
