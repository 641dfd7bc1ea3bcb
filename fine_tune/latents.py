"""Cached latents: moments that the `latents` stage has stored beside the shards (`schemas.latents`).

Those of another VAE, of another side or of a shard that has changed since are not used.
"""

from __future__ import annotations

import io
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from fine_tune.data import SampleImages
from fine_tune.index import Corpus, Index, SampleError, fitted_sizes
from fine_tune.vae import FrozenVAE
from schemas.arrow import LATENTS
from schemas.latents import FACTOR, RULE, image_names, stem_of

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class LatentCache:
    """The cached moments at one side. Safe to use from many threads.

    Args:
        folder: of the moments, relative to the corpus.
        dtype: in which they are stored.
        shards: stems of the shards that they may be used for.
    """

    def __init__(self, corpus: Corpus, folder: str, side: int, dtype: torch.dtype, shards: frozenset[str]) -> None:
        self.corpus, self.folder, self.side, self.dtype, self.shards = corpus, folder, side, dtype, shards
        self._table = lru_cache(maxsize=256)(self._read_table)

    def read(self, row: Mapping[str, Any]) -> SampleImages | None:
        """Moments of the inputs and the target of a sample, in one range read. None if they are not cached.

        Args:
            row: of the sample index.

        Raises:
            SampleError: they are cut short, or are not of this sample at the size that it is trained at.
        """
        stem = stem_of(row["shard"])
        if stem not in self.shards:
            return None
        names = image_names(row["members"])
        places = self._table(stem).slice(row["index"] * len(names), len(names)).to_pylist()
        if [(place["key"], place["member"]) for place in places] != [(row["key"], name) for name in names]:
            raise SampleError("latents changed", f"{self.folder}/{stem} has other samples than the sample index")
        if any(place["offset"] < 0 for place in places):
            return None
        sizes = [(place["shape"][1] * FACTOR, place["shape"][2] * FACTOR) for place in places]
        if sizes != fitted_sizes(row, len(names) - 1, self.side):
            raise SampleError("latents changed", f"{self.folder}/{stem} has {row['key']} at other sizes: {sizes}")
        return SampleImages(self._read_tensors(stem, places), sizes, encoded=True)

    def _read_tensors(self, stem: str, places: list[dict[str, Any]]) -> list[Tensor]:
        counts = [math.prod(place["shape"]) for place in places]
        first, last = places[0]["offset"], places[-1]["offset"] + counts[-1] * self.dtype.itemsize
        data = bytearray(self.corpus.read(f"{self.folder}/{stem}.safetensors", first, last))
        if len(data) != last - first:
            raise SampleError("latents changed", f"{self.folder}/{stem}.safetensors is cut short")
        return [
            torch.frombuffer(data, dtype=self.dtype, count=count, offset=place["offset"] - first).view(place["shape"])
            for place, count in zip(places, counts, strict=True)
        ]

    def _read_table(self, stem: str) -> pa.Table:
        path = f"{self.corpus.root}/{self.folder}/{stem}.parquet"
        return pq.read_table(io.BytesIO(self.corpus.fs.cat_file(path)), schema=LATENTS)


@dataclass(frozen=True)
class Coverage:
    """For how much of an index the moments at one side are cached.

    Attributes:
        cache: None if there are none.
        samples: of the index.
        cached: of them.
        reasons: why the others are not, with their numbers of samples.
    """

    side: int
    cache: LatentCache | None
    samples: int
    cached: int
    reasons: Mapping[str, int]

    def __str__(self) -> str:
        done = f"latents at {self.side} px: {self.cached:,} of {self.samples:,} samples cached"
        if self.cache and self.cached:
            done += f" in {self.cache.folder} ({str(self.cache.dtype).removeprefix('torch.')})"
        why = "; ".join(f"{count:,} are encoded as they come: {reason}" for reason, count in self.reasons.items())
        return f"{done}; {why}" if why else f"{done}; no image of them is decoded or encoded"

    def to_json(self) -> dict[str, Any]:
        folder = self.cache.folder if self.cache else ""
        counts = {"samples": self.samples, "cached": self.cached, "encoded": dict(self.reasons)}
        return {"side": self.side, "folder": folder, **counts}


def open_latents(corpus: Corpus, index: Index, vae: FrozenVAE, sides: Iterable[int]) -> list[Coverage]:
    """What of an index is cached for a VAE, at each side."""
    manifest = _manifest(corpus)
    digest = vae.digest if manifest.get("latents") else ""  # it takes a while
    return [_open_side(corpus, index, manifest, digest, side) for side in sides]


def _open_side(corpus: Corpus, index: Index, manifest: Mapping[str, Any], vae_digest: str, side: int) -> Coverage:
    entry, problem = _choose(manifest, vae_digest, side)
    streams = manifest.get("streams", {}).values()
    shards = {stem_of(shard["name"]): shard["sha256"] for stream in streams for shard in stream["shards"]}
    made_of = {stem: made["shard_sha256"] for stem, made in entry["shards"].items()} if entry else {}
    files = _files(corpus, entry["folder"]) if entry else set()
    fresh, reasons = set(), Counter[str]()
    for stream in index.streams:
        for table, start, stop in zip(stream.tables, stream.starts, stream.starts[1:], strict=False):
            stem = stem_of(table)
            reason = problem or _staleness(made_of.get(stem), shards.get(stem))
            if not reason and not {f"{stem}.parquet", f"{stem}.safetensors"} <= files:
                reason = "their latents are in the manifest, but their files are missing"
            if reason:
                reasons[reason] += int(stop - start)
            else:
                fresh.add(stem)
    cached = len(index) - reasons.total()
    cache = LatentCache(corpus, entry["folder"], side, DTYPES[entry["dtype"]], frozenset(fresh)) if entry else None
    return Coverage(side, cache, len(index), cached, reasons)


def _manifest(corpus: Corpus) -> dict[str, Any]:
    path = f"{corpus.root}/manifest.json"
    return json.loads(corpus.fs.cat_file(path)) if corpus.fs.exists(path) else {}


def _files(corpus: Corpus, folder: str) -> set[str]:
    path = f"{corpus.root}/{folder}"
    return {name.rsplit("/", 1)[-1] for name in corpus.fs.ls(path, detail=False)} if corpus.fs.exists(path) else set()


def _choose(manifest: Mapping[str, Any], vae_digest: str, side: int) -> tuple[dict[str, Any] | None, str]:
    """The entry of the manifest to use; or None and why there is none."""
    entries = manifest.get("latents", [])
    if not entries:
        return None, "the corpus has no latents (`x2i latents` makes them)"
    by_vae = [entry for entry in entries if entry["vae"] == vae_digest]
    if not by_vae:
        names = ", ".join(sorted({entry["vae_name"] for entry in entries}))
        return None, f"the latents of the corpus are of another VAE or revision ({names})"
    if not (at_side := [entry for entry in by_vae if entry["side"] == side]):
        have = ", ".join(str(entry["side"]) for entry in by_vae)
        return None, f"the corpus has latents at {have} px (`x2i latents --side {side}` adds those)"
    if at_side[0]["rule"] != RULE:
        return None, "the latents were made by another rule for fitting images; make them again"
    return at_side[0], ""


def _staleness(made_of: str | None, shard: str | None) -> str:
    """Why the moments of a shard cannot be used, given the sha256 of the shard they were made of and of the one now."""
    if made_of is None:
        return "their shards have no latents"
    return "" if made_of == shard else "their shards have changed since the latents were made"
