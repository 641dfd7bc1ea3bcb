"""Reading a corpus: its shards, its sample index as Arrow tables, the members of a sample, and counts."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.storage import Folder
from schemas.shards import ShardError
from schemas.vocabulary import STREAMS

SAMPLE_INDEX = "meta/samples"
_TAR = re.compile(r"data/(?P<stream>\w+)/(?P=stream)-(?P<number>\d{6})\.tar")
_QUANTILES = (0.05, 0.5, 0.95)


class CorpusError(ValueError):
    """A folder that is no corpus, or not one with what is asked for."""


@dataclass(frozen=True, order=True)
class Shard:
    """Names of one shard's files, relative to the corpus."""

    stream: str
    number: int

    @property
    def stem(self) -> str:
        return f"{self.stream}-{self.number:06d}"

    @property
    def tar(self) -> str:
        return f"data/{self.stream}/{self.stem}.tar"

    @property
    def tar_index(self) -> str:
        """Megatron-Energon's offsets, see `pipelines.publish`."""
        return f"{self.tar}.idx"

    @property
    def sample_index(self) -> str:
        """Parquet with a row per sample, see `schemas.arrow.SAMPLES`."""
        return f"{SAMPLE_INDEX}/{self.stem}.parquet"


def find_shards(corpus: Folder, streams: Iterable[str] | None = None) -> list[Shard]:
    """Shards in order of stream and number; of all streams, unless some are named.

    Raises:
        CorpusError: the corpus has no shard of a named stream, or none at all.
    """
    matches = (_TAR.fullmatch(name) for name in corpus.list("data", ".tar"))
    found = sorted(Shard(m["stream"], int(m["number"])) for m in matches if m and m["stream"] in STREAMS)
    present = {shard.stream for shard in found}
    wanted = present if streams is None else set(streams)
    if unknown := wanted - present:
        have = ", ".join(sorted(present)) or "none"
        raise CorpusError(f"{corpus.url} has no stream {', '.join(sorted(unknown))}; it has {have}")
    if not found:
        raise CorpusError(f"{corpus.url} is no corpus: it has no data/<stream>/<stream>-000000.tar")
    return [shard for shard in found if shard.stream in wanted]


def read_index(corpus: Folder, shard: Shard, columns: Iterable[str] | None = None) -> pa.Table:
    """The index of one shard (`schemas.arrow.SAMPLES`), in shard order."""
    return corpus.read_table(shard.sample_index, columns)


def iter_index(
    corpus: Folder,
    streams: Iterable[str] | None = None,
    columns: Sequence[str] | None = None,
    split: str | None = None,
) -> Iterator[pa.Table]:
    """Sample index, one table per shard.

    Args:
        corpus: the corpus.
        streams: only these; None for all.
        columns: only these; None for all.
        split: only samples of this split.
    """
    for shard in find_shards(corpus, streams):
        if split is None:
            yield read_index(corpus, shard, columns)
            continue
        needed = None if columns is None else [*dict.fromkeys([*columns, "split"])]
        table = read_index(corpus, shard, needed)
        rows = table.filter(pc.equal(table["split"], split))
        yield rows if columns is None else rows.select(list(columns))


def read_members(corpus: Folder, row: Mapping[str, Any]) -> dict[str, bytes]:
    """All members of a sample by name (`input_1.jpg`, `output.jpg`, `txt`, `json`), in one range read.

    Args:
        corpus: the corpus.
        row: an index row with `key, shard, offset, size, members`.

    Raises:
        ShardError: the shard ends before the sample does, or another sample is at that place.
    """
    data = corpus.read_bytes(row["shard"], row["offset"], row["offset"] + row["size"])
    first = f"{row['key']}.{row['members'][0]['name']}".encode()
    if len(data) != row["size"] or not data.startswith(first + b"\0"):
        raise ShardError(f"{row['shard']} has no sample {row['key']} at offset {row['offset']}; run `x2i lint`")
    starts = ((m["name"], m["offset"] - row["offset"], m["size"]) for m in row["members"])
    return {name: data[start : start + size] for name, start, size in starts}


def summary(corpus: Folder) -> dict[str, Any]:
    """What is in a corpus, from its sample index alone.

    Returns:
        Plain JSON: `samples`, `bytes`, `shards`, and under `streams` the same per stream with its `subtasks`, each with
        `samples, bytes, output_width, output_height` (means, px), `real_output` and `aligned` (samples),
        `splits`, `licenses`, `directions` (samples by value), and the quantiles 5 %, 50 %, 95 % of `severity`
        and `edit_area_ratio` (None where no sample has a value; exact to 0.001).
    """
    shards = Counter(shard.stream for shard in find_shards(corpus))
    tallies: dict[str, dict[str, _Tally]] = {stream: defaultdict(_Tally) for stream in sorted(shards)}
    for table in iter_index(corpus, columns=_Tally.COLUMNS):
        for subtask in pc.unique(table["subtask"]).to_pylist():
            rows = table.filter(pc.equal(table["subtask"], subtask))
            tallies[rows["stream"][0].as_py()][subtask].add(rows)
    streams: dict[str, dict[str, Any]] = {
        stream: {
            "samples": sum(t.samples for t in by_subtask.values()),
            "bytes": sum(t.bytes for t in by_subtask.values()),
            "shards": shards[stream],
            "subtasks": {subtask: by_subtask[subtask].report() for subtask in sorted(by_subtask)},
        }
        for stream, by_subtask in tallies.items()
    }
    total = {name: sum(s[name] for s in streams.values()) for name in ("samples", "bytes", "shards")}
    return {**total, "streams": streams}


@dataclass
class _Tally:
    """Running counts of one subtask; memory does not grow with the number of samples."""

    COLUMNS = (
        *("stream", "subtask", "direction", "split", "license", "size", "members"),
        *("real_output", "aligned", "severity", "edit_area_ratio"),
    )
    samples: int = 0
    bytes: int = 0
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(2))
    flags: Counter[str] = field(default_factory=Counter)
    counts: dict[str, Counter[Any]] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, rows: pa.Table) -> None:
        self.samples += len(rows)
        self.bytes += pc.sum(rows["size"]).as_py()
        output = pc.list_element(rows["members"], output_position(rows["stream"][0].as_py()))
        self.pixels += [pc.sum(pc.struct_field(output, side)).as_py() for side in ("width", "height")]
        for flag in ("real_output", "aligned"):
            self.flags[flag] += pc.sum(rows[flag]).as_py()
        for name in ("split", "license", "direction"):
            self._count(name, rows[name])
        for name in ("severity", "edit_area_ratio"):
            self._count(name, pc.round(rows[name].filter(pc.greater_equal(rows[name], 0)), 3))

    def _count(self, name: str, values: pa.ChunkedArray) -> None:
        self.counts[name].update({v["values"]: v["counts"] for v in pc.value_counts(values).to_pylist()})

    def report(self) -> dict[str, Any]:
        width, height = (round(float(total / self.samples), 1) for total in self.pixels)
        return {
            "samples": self.samples,
            "bytes": self.bytes,
            "output_width": width,
            "output_height": height,
            **self.flags,
            **{f"{name}s": dict(sorted(self.counts[name].items())) for name in ("split", "license", "direction")},
            **{name: _quantiles(self.counts[name]) for name in ("severity", "edit_area_ratio")},
        }


def output_position(stream: str) -> int:
    """Where the output stands among the members of a sample."""
    members = STREAMS[stream].members
    return members.index(f"output.{STREAMS[stream].output}")


def _quantiles(counts: Counter[float]) -> dict[str, float] | None:
    """Nearest-rank quantiles of a multiset."""
    if not counts:
        return None
    values = sorted(counts)
    cumulative = np.cumsum([counts[v] for v in values])
    ranks = np.ceil(np.array(_QUANTILES) * cumulative[-1])
    return {f"p{q * 100:g}": values[i] for q, i in zip(_QUANTILES, np.searchsorted(cumulative, ranks), strict=True)}
