"""pack: concatenates the parts of a stream, in unit order, into shards of a target size.

A sample belongs to shard `offset // shard_bytes`, where `offset` is its place in the concatenation of all parts: a
prefix sum over part sizes, so shards can be written in parallel and never depend on who writes them. Sample bytes are
copied as ranges; nothing is decoded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import ledger
from pipelines.corpus import Shard
from pipelines.engine import Stage, Task, describe
from pipelines.ledger import Marker
from pipelines.stages.build import BuildStage, part_index_path, part_path
from pipelines.stages.ingest import in_source_order
from schemas.arrow import SAMPLES
from schemas.identity import digest_of
from schemas.shards import END_OF_ARCHIVE
from schemas.vocabulary import STREAMS


@dataclass(frozen=True)
class Slice:
    """Consecutive samples of one part: rows [first, last) of its index, bytes [start, end) of its tar."""

    unit: str
    first: int
    last: int
    start: int
    end: int


class PackStage(Stage):
    name = "pack"
    version = "1"

    def tasks(self) -> list[Task]:
        markers = in_source_order(self.recipe, ledger.read_markers(self.corpus, BuildStage.name))
        return [task for stream in STREAMS for task in self._stream_tasks(stream, markers)]

    def _stream_tasks(self, stream: str, markers: dict[str, Marker]) -> Iterator[Task]:
        parts = {
            u: m.outputs[part_path(stream, u)]["sha256"]
            for u, m in markers.items()
            if part_path(stream, u) in m.outputs
        }
        for number, slices in enumerate(self._shards(stream, list(parts))):
            work = [self.version, [(asdict(s), parts[s.unit]) for s in slices]]
            payload = {"stream": stream, "number": number, "slices": [asdict(s) for s in slices]}
            yield Task(Shard(stream, number).stem, digest_of(work), payload)

    def _shards(self, stream: str, units: list[str]) -> Iterator[list[Slice]]:
        current, shard, base = list[Slice](), 0, 0
        for unit in units:
            table = self.corpus.read_table(part_index_path(stream, unit), ["offset", "size"])
            offset, size = table["offset"].to_numpy(), table["size"].to_numpy()
            shard_of = (base + offset) // self.recipe.pack.shard_bytes
            for number in np.unique(shard_of):
                rows = np.flatnonzero(shard_of == number)
                first, last = int(rows[0]), int(rows[-1])
                if number != shard and current:  # numbers without a sample are skipped, names stay contiguous
                    yield current
                    current = []
                shard = number
                current.append(Slice(unit, first, last + 1, int(offset[first]), int(offset[last] + size[last])))
            base += int(size.sum())
        if current:
            yield current

    def run(self, task: Task) -> Marker:
        stream, number = task.payload["stream"], task.payload["number"]
        slices = [Slice(**s) for s in task.payload["slices"]]
        names = Shard(stream, number)
        shard, index = names.tar, names.sample_index
        table = self._index(stream, shard, slices)
        digests = self._copy(stream, shard, slices)
        self.corpus.write_table(index, table)
        outputs = {shard: digests, index: describe(self.corpus, index)}
        counts = {"inputs": len(table), "kept": len(table), "dropped": 0, "quarantined": 0}
        return Marker(self.name, task.unit, task.digest, counts, outputs)

    def _copy(self, stream: str, shard: str, slices: list[Slice]) -> dict[str, Any]:
        sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
        with self.corpus.writing(shard) as local, local.open("wb") as file:
            for chunk in chain(self._ranges(stream, slices), [END_OF_ARCHIVE]):
                file.write(chunk)
                sha256.update(chunk)
                md5.update(chunk)
                size += len(chunk)
        return {"bytes": size, "sha256": sha256.hexdigest(), "md5": md5.hexdigest()}

    def _ranges(self, stream: str, slices: list[Slice]) -> Iterator[bytes]:
        step = 1 << 24
        for piece in slices:
            for start in range(piece.start, piece.end, step):
                yield self.corpus.read_bytes(part_path(stream, piece.unit), start, min(start + step, piece.end))

    def _index(self, stream: str, shard: str, slices: list[Slice]) -> pa.Table:
        rows, base = list[dict[str, Any]](), 0
        for piece in slices:
            part = self.corpus.read_table(part_index_path(stream, piece.unit)).slice(
                piece.first, piece.last - piece.first
            )
            shift = base - piece.start
            for row in part.to_pylist():
                members = [m | {"offset": m["offset"] + shift} for m in row["members"]]
                place = {"shard": shard, "index": len(rows), "offset": row["offset"] + shift, "members": members}
                rows.append(row | place)
            base += piece.end - piece.start
        return pa.Table.from_pylist(rows, SAMPLES)
