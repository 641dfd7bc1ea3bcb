"""pack: concatenates the parts of a stream, in unit order, into shards of a target size.

A sample belongs to shard `offset // shard_bytes` of its source, where `offset` is its place in the concatenation of all
parts of the source: a prefix sum over part sizes, so shards can be written in parallel and never depend on who writes
them. No shard holds samples of two sources: one that is appended to the recipe makes new shards, and the old ones stay
as they are. Sample bytes are copied as ranges; nothing is decoded.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, groupby
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import ledger
from pipelines.corpus import Shard
from pipelines.engine import Stage, Task, describe
from pipelines.ledger import Marker
from pipelines.parts import part_index_path, part_path
from pipelines.publish import Digest
from pipelines.stages.build import BuildStage
from pipelines.stages.group import GroupStage
from pipelines.stages.ingest import in_source_order, source_of
from pipelines.storage import Folder
from schemas.arrow import SAMPLES
from schemas.identity import digest_of
from schemas.shards import END_OF_ARCHIVE
from schemas.vocabulary import STREAMS


@dataclass(frozen=True)
class Slice:
    """Adjacent samples of one part: rows [first, last) of its index, bytes [start, end) of its tar."""

    unit: str
    first: int
    last: int
    start: int
    end: int


class PackStage(Stage):
    name = "pack"
    version = "2"

    def tasks(self) -> list[Task]:
        made = [ledger.read_markers(self.corpus, stage.name) for stage in (BuildStage, GroupStage)]
        markers = in_source_order(self.recipe, made[0] | made[1])
        return [task for stream in STREAMS for task in self._stream_tasks(stream, markers)]

    def _stream_tasks(self, stream: str, markers: dict[str, Marker]) -> Iterator[Task]:
        paths = {unit: part_path(stream, unit) for unit in markers}
        parts = {unit: m.outputs[paths[unit]] for unit, m in markers.items() if paths[unit] in m.outputs}
        for number, slices in enumerate(self._shards(stream, {unit: made["bytes"] for unit, made in parts.items()})):
            work = [self.version, [(asdict(s), parts[s.unit]["sha256"]) for s in slices]]
            payload = {"stream": stream, "number": number, "slices": [asdict(s) for s in slices]}
            yield Task(Shard(stream, number).stem, digest_of(work), payload)

    def _shards(self, stream: str, sizes: dict[str, int]) -> Iterator[list[Slice]]:
        """What stands in each shard, given the bytes of every part. Shards that would hold no sample are left out."""
        for _, units in groupby(sizes, key=source_of):
            shards, base = defaultdict[int, list[Slice]](list), 0
            for unit in units:
                for number, piece in self._pieces(stream, unit, base):
                    shards[number].append(piece)
                base += sizes[unit]
            yield from shards.values()

    def _pieces(self, stream: str, unit: str, base: int) -> Iterator[tuple[int, Slice]]:
        """Slices of a part, with the number of the shard; a part has a hole where a sample was forgotten."""
        table = self.corpus.read_table(part_index_path(stream, unit), ["offset", "size"])
        start = table["offset"].to_numpy()
        end = start + table["size"].to_numpy()
        number = (base + start) // self.recipe.pack.shard_bytes
        breaks = (np.diff(number) != 0) | (start[1:] != end[:-1])
        for rows in np.split(np.arange(len(start)), np.flatnonzero(breaks) + 1):
            if len(rows):
                first, last = int(rows[0]), int(rows[-1])
                yield int(number[first]), Slice(unit, first, last + 1, int(start[first]), int(end[last]))

    def run(self, task: Task) -> Marker:
        stream, number = task.payload["stream"], task.payload["number"]
        slices = [Slice(**s) for s in task.payload["slices"]]
        shard = Shard(stream, number)
        table = self._index(stream, shard.tar, slices)
        digests = write_shard(self.corpus, shard.tar, self._ranges(stream, slices))
        self.corpus.write_table(shard.sample_index, table)
        return packed(self.corpus, shard, task.digest, len(table), digests)

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


def write_shard(corpus: Folder, name: str, chunks: Iterable[bytes]) -> dict[str, Any]:
    """Write encoded samples and the end of the archive; the fields of `pipelines.publish.Digest`."""
    sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    with corpus.writing(name) as local, local.open("wb") as file:
        for chunk in chain(chunks, [END_OF_ARCHIVE]):
            file.write(chunk)
            sha256.update(chunk)
            md5.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": sha256.hexdigest(), "md5": md5.hexdigest()}


def packed(corpus: Folder, shard: Shard, work: str, samples: int, digests: dict[str, Any]) -> Marker:
    """The marker of a shard whose index is written."""
    outputs = {shard.tar: digests, shard.sample_index: describe(corpus, shard.sample_index)}
    counts = {"inputs": samples, "kept": samples, "dropped": 0, "quarantined": 0}
    return Marker(PackStage.name, shard.stem, work, counts, outputs)


def packed_digests(corpus: Folder) -> dict[str, Digest]:
    """Sizes and checksums of the shards by path, as their markers have them."""
    markers = ledger.read_markers(corpus, PackStage.name).values()
    made = {name: outputs for marker in markers for name, outputs in marker.outputs.items()}
    return {name: Digest(**digests) for name, digests in made.items() if name.endswith(".tar")}
