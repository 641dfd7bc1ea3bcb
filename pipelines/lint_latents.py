"""Are the cached latents of a corpus complete, those of its shards as they are, and where their tables say?"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from pipelines.corpus import Shard, read_index
from pipelines.engine import describe
from pipelines.findings import Finding
from pipelines.storage import TEMPORARY, Folder
from schemas.latents import FACTOR, FOLDER, ITEM_BYTES, RULE, image_names, stem_of

_EXPONENT_BITS = {"bfloat16": (np.uint16, 0x7F80), "float16": (np.uint16, 0x7C00), "float32": (np.uint32, 0x7F800000)}


def lint_latents(corpus: Folder, shards: Iterable[Shard]) -> list[Finding]:
    """Findings in all latents of a published corpus; none if it has no latents.

    Args:
        corpus: the corpus.
        shards: those with a sample index.
    """
    manifest = corpus.read_json("manifest.json") if corpus.exists("manifest.json") else {"streams": {}}
    entries = manifest.get("latents", [])
    by_stem = {shard.stem: shard for shard in shards}
    digests = {stem_of(s["name"]): s["sha256"] for stream in manifest["streams"].values() for s in stream["shards"]}
    findings = list(_lint_files(corpus, entries))
    for entry in entries:
        if entry["rule"] != RULE:
            findings.append(Finding(entry["folder"], "latents", "made by another rule for fitting images"))
        for stem in sorted(by_stem.keys() - entry["shards"].keys()):
            findings.append(Finding(f"{entry['folder']}/{stem}", "latents", "are missing: run `x2i latents` again"))
        for stem, made in entry["shards"].items():
            path = f"{entry['folder']}/{stem}"
            if made["shard_sha256"] != digests.get(stem):
                findings.append(Finding(path, "latents", "are stale: their shard has changed or is gone"))
            elif stem in by_stem and corpus.exists(f"{path}.safetensors"):
                problems = _lint_shard(corpus, by_stem[stem], entry, made)
                findings += [Finding(path, "latents", problem) for problem in problems]
    return findings


def _lint_files(corpus: Folder, entries: Iterable[Mapping[str, Any]]) -> Iterator[Finding]:
    known = {f"{entry['folder']}/{stem}{end}" for entry in entries for stem in entry["shards"] for end in _ENDS}
    found = {path for path in corpus.list(FOLDER) if not path.rpartition("/")[2].startswith(TEMPORARY)}
    for path in sorted(known - found):
        yield Finding(path, "latents", "is in the manifest, but there is no such file")
    for path in sorted(found - known):
        yield Finding(path, "latents", "is not in the manifest")


_ENDS = (".parquet", ".safetensors")


def _lint_shard(corpus: Folder, shard: Shard, entry: Mapping[str, Any], made: Mapping[str, Any]) -> Iterator[str]:
    path = f"{entry['folder']}/{shard.stem}"
    described = describe(corpus, f"{path}.safetensors")
    if described != {name: made[name] for name in described}:
        yield f"the manifest says {made['bytes']} bytes with sha256 {made['sha256']}, the file has {described}"
        return
    rows = corpus.read_table(f"{path}.parquet").to_pylist()
    samples = read_index(corpus, shard, ["key", "members", "edit_source_index"]).to_pylist()
    wanted = [(sample["key"], name) for sample in samples for name in image_names(sample["members"])]
    if [(row["key"], row["member"]) for row in rows] != wanted:
        yield "the table has other rows than the inputs and targets of the sample index"
        return
    yield from _lint_places(corpus, path, rows, entry["dtype"])
    yield from _lint_shapes(rows, samples, entry["side"])


def _lint_places(corpus: Folder, path: str, rows: list[dict[str, Any]], dtype: str) -> Iterator[str]:
    """The table and the header of the file agree on every tensor, and all values are finite."""
    data = corpus.read_bytes(f"{path}.safetensors")
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    kind, infinite = _EXPONENT_BITS[dtype]
    for row in (row for row in rows if row["offset"] >= 0):
        name, end = f"{row['key']}.{row['member']}", row["offset"] + math.prod(row["shape"]) * ITEM_BYTES[dtype]
        stored = header.get(name, {"data_offsets": (), "shape": []})
        if (stored["shape"], list(stored["data_offsets"])) != (row["shape"], [row["offset"] - start, end - start]):
            yield f"{name} is at another place than the table says"
        elif ((np.frombuffer(data[row["offset"] : end], kind) & infinite) == infinite).any():
            yield f"{name} has values that are not finite"


def _lint_shapes(rows: list[dict[str, Any]], samples: list[dict[str, Any]], side: int) -> Iterator[str]:
    """Sizes are those to which the trainer brings the images."""
    from fine_tune.index import SampleError, fitted_sizes

    remaining = iter(rows)
    for sample in samples:
        of_sample = [next(remaining) for _ in image_names(sample["members"])]
        if any(row["offset"] < 0 for row in of_sample):
            continue
        try:
            expected = fitted_sizes(sample, len(of_sample) - 1, side)
        except SampleError as error:
            yield f"{sample['key']} has latents, but cannot be trained on: {error}"
            continue
        if expected != [(row["shape"][1] * FACTOR, row["shape"][2] * FACTOR) for row in of_sample]:
            yield f"{sample['key']} has latents of other sizes than it is trained at"
