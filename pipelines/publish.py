"""What turns packed shards into a corpus that every WebDataset reader opens: indexes, manifest and card.

All of it is derived from the sample index; a shard is read only if pack did not hand over its digest. Everything is
a pure function of the corpus and the arguments, so publishing twice gives the same bytes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import IO, Any

import numpy as np
import pyarrow.compute as pc
import yaml

from pipelines.cards import render_card, shards_by_split
from pipelines.corpus import Shard, find_shards, read_index, summary
from pipelines.croissant import render_croissant
from pipelines.storage import Folder
from pipelines.tombstones import tombstones_digest
from schemas import latents
from schemas.shards import END_OF_ARCHIVE, ShardError
from schemas.vocabulary import STREAMS

FORMAT_VERSION = 1  # of the shards, the sample index and the manifest
ENERGON_VERSION = "7.4.1"  # whose on-disk layout is written here
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Digest:
    """Size and checksums of a shard; md5 is what `wids` compares, sha256 what the manifest promises."""

    bytes: int
    sha256: str
    md5: str


def digest_of_file(file: IO[bytes]) -> Digest:
    """Both checksums in one pass."""
    size, sha256, md5 = 0, hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    while chunk := file.read(_CHUNK):
        size += len(chunk)
        sha256.update(chunk)
        md5.update(chunk)
    return Digest(size, sha256.hexdigest(), md5.hexdigest())


def publish(
    corpus: Folder,
    name: str,
    recipe_text: str,
    versions: Mapping[str, str],
    digests: Mapping[str, Digest] | None = None,
) -> None:
    """Write everything beside the shards. `manifest.json` comes last: a corpus that has one is complete.

    Args:
        corpus: a folder with packed shards and their sample index.
        name: of the corpus, for the card and the indexes.
        recipe_text: the recipe, published as it is.
        versions: of x2i, the image encoders and other libraries that decide bytes.
        digests: of shards, by path relative to the corpus, where pack knows them; others are computed.

    Raises:
        CorpusError: there is no shard.
        ShardError: a shard does not have the size that its index or its digest implies, or is empty.
    """
    known = digests or {}
    shards = find_shards(corpus)
    streams: dict[str, dict[str, Any]] = {}
    for shard in shards:
        stream = streams.setdefault(shard.stream, _new_stream(shard.stream))
        stream["shards"].append(_publish_shard(corpus, shard, known.get(shard.tar)))
    for stream in streams.values():
        stream |= {total: sum(s[total] for s in stream["shards"]) for total in ("samples", "bytes")}
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "recipe_sha256": hashlib.sha256(recipe_text.encode()).hexdigest(),
        "versions": dict(versions),
        "samples": sum(s["samples"] for s in streams.values()),
        "bytes": sum(s["bytes"] for s in streams.values()),
        "streams": streams,
        "latents": list_latents(corpus),
    }
    if forgotten := tombstones_digest(corpus):
        manifest["tombstones_sha256"] = forgotten
    _remove_stale(corpus, shards)
    for stream_name, stream in streams.items():
        _write_energon(corpus.sub(f"data/{stream_name}"), stream)
        corpus.write_json(_wids_path(stream_name), _wids(name, stream_name, stream))
    corpus.write_bytes("recipe.yaml", recipe_text.encode())
    if not corpus.exists("manifest.json") or corpus.read_json("manifest.json") != manifest:
        corpus.remove("report.html")  # it shows what was here before
    counts = summary(corpus)
    corpus.write_bytes("README.md", render_card(manifest, counts).encode())
    corpus.write_json("croissant.json", render_croissant(manifest, counts))
    corpus.write_json("manifest.json", manifest)


def publish_latents(corpus: Folder) -> None:
    """List the latents that a published corpus has by now in its manifest and card."""
    manifest = corpus.read_json("manifest.json") | {"latents": list_latents(corpus)}
    corpus.write_bytes("README.md", render_card(manifest, summary(corpus)).encode())
    corpus.write_json("manifest.json", manifest)


def list_latents(corpus: Folder) -> list[dict[str, Any]]:
    """Manifest entries of cached latents: one per VAE and side, from what their tables say of themselves."""
    sets: dict[str, dict[str, Any]] = {}
    for path in corpus.list(latents.FOLDER, ".parquet"):
        made = {k.decode(): v.decode() for k, v in (corpus.read_table(path).schema.metadata or {}).items()}
        folder = path.rpartition("/")[0]
        about = {name: made[name] for name in ("vae", "vae_name", "rule", "dtype")}
        entry = sets.setdefault(folder, {"folder": folder, "side": int(made["side"]), **about, "shards": {}})
        counts = {name: int(made[name]) for name in ("images", "bytes")}
        digests = {name: made[name] for name in ("sha256", "shard_sha256")}
        entry["shards"][latents.stem_of(path)] = counts | digests
    return list(sets.values())


def tar_index(offsets: np.ndarray, end: int) -> bytes:
    """Energon's `X.tar.idx`: little-endian uint64 offset of each sample's first header, then of the end."""
    return np.append(offsets, end).astype("<u8").tobytes()


def _new_stream(name: str) -> dict[str, Any]:
    return {"task": STREAMS[name].task, "members": list(STREAMS[name].members), "shards": []}


def _publish_shard(corpus: Folder, shard: Shard, digest: Digest | None) -> dict[str, Any]:
    """Write the shard's `.tar.idx`; return its manifest entry."""
    index = read_index(corpus, shard, ["offset", "size", "split"])
    if not len(index):
        raise ShardError(f"{shard.tar} is empty; readers fail on empty shards")
    end = pc.max(pc.add(index["offset"], index["size"])).as_py()
    if digest is None:
        with corpus.open(shard.tar) as file:
            digest = digest_of_file(file)
    if not end + len(END_OF_ARCHIVE) == digest.bytes == corpus.size(shard.tar):
        raise ShardError(
            f"{shard.tar} has {corpus.size(shard.tar)} bytes, its digest says {digest.bytes} and "
            f"{shard.sample_index} implies {end + len(END_OF_ARCHIVE)}; pack this shard again"
        )
    corpus.write_bytes(shard.tar_index, tar_index(index["offset"].to_numpy(), end))
    splits = Counter(index["split"].to_pylist())
    return {"name": f"{shard.stem}.tar", "samples": len(index), **asdict(digest), "splits": dict(splits)}


def _write_energon(folder: Folder, stream: Mapping[str, Any]) -> None:
    """`.nv-meta`, as `energon prepare` would leave it for crude samples (`__key__`, and bytes by member name)."""
    counts = {shard["name"]: shard["samples"] for shard in stream["shards"]}
    splits = shards_by_split(stream["shards"])
    parts = {split: splits.get(split, []) for split in ("train", "val", "test")}
    dataset = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    folder.write_json(".nv-meta/.info.json", {"energon_version": ENERGON_VERSION, "shard_counts": counts})
    folder.write_bytes(".nv-meta/split.yaml", yaml.safe_dump({"split_parts": parts, "exclude": []}).encode())
    folder.write_bytes(".nv-meta/dataset.yaml", yaml.safe_dump(dataset).encode())


def _wids(name: str, stream_name: str, stream: Mapping[str, Any]) -> dict[str, Any]:
    """Shard index of `wids`; URLs are relative to the index file."""
    return {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": f"{name}/{stream_name}",
        "shardlist": [
            {
                "url": f"../data/{stream_name}/{shard['name']}",
                "md5sum": shard["md5"],
                "nsamples": shard["samples"],
                "filesize": shard["bytes"],
            }
            for shard in stream["shards"]
        ],
    }


def _wids_path(stream: str) -> str:
    return f"index/{stream}-wids.json"


def _remove_stale(corpus: Folder, shards: Iterable[Shard]) -> None:
    """Drop indexes of shards and streams that are gone, which `forget` can leave behind."""
    streams = {shard.stream for shard in shards}
    tar_indexes = {shard.tar_index for shard in shards}
    for path in corpus.list("data"):
        is_energon_meta = "/.nv-meta/" in path and path.split("/")[1] not in streams
        if is_energon_meta or (path.endswith(".tar.idx") and path not in tar_indexes):
            corpus.remove(path)
    for path in {*corpus.list("index", "-wids.json")} - {_wids_path(stream) for stream in streams}:
        corpus.remove(path)
