"""Parts: the samples of one unit and stream, as they will stand in a shard, with their index beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import pyarrow as pa

from builders.base import Sample
from pipelines.engine import describe
from pipelines.storage import Folder
from schemas.arrow import SAMPLES
from schemas.shards import encode_sample, iter_bytes
from schemas.vocabulary import STREAMS


def part_path(stream: str, unit: str) -> str:
    """Samples of one unit and stream as they will stand in a shard, without the end of an archive."""
    return f"work/parts/{stream}/{unit}.tar"


def part_index_path(stream: str, unit: str) -> str:
    return f"work/parts/{stream}/{unit}.parquet"


def part_rows(corpus: Folder, stream: str, unit: str) -> Iterator[dict[str, Any]]:
    """Index rows of a part, which name it as their shard, so that `pipelines.corpus.read_members` reads from it."""
    for row in corpus.read_table(part_index_path(stream, unit)).to_pylist():
        yield row | {"shard": part_path(stream, unit)}


class PartWriter:
    """Appends samples to one tar part per stream, and writes the index of each when the unit is complete."""

    def __init__(self, corpus: Folder, unit: str) -> None:
        self.corpus, self.unit = corpus, unit
        self.outputs: dict[str, dict[str, Any]] = {}
        self._files: dict[str, Any] = {}
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._keys: set[str] = set()
        self._stack = ExitStack()

    def __enter__(self) -> PartWriter:
        return self

    def add(self, index: int, row: Any, samples: Iterable[Sample]) -> None:
        """What a row of the unit, of that number, became."""
        for sample in samples:
            self.write(sample)

    def write(self, sample: Sample) -> None:
        """Append one sample.

        Raises:
            ValueError: there is one with its key already.
        """
        key, stream = sample.record.key, sample.record.stream
        if key in self._keys:
            raise ValueError(f"key {key} was made twice in unit {self.unit}")
        self._keys.add(key)
        data = encode_sample(key, sample.members, STREAMS[stream])
        self._file(stream).write(data)
        self._append_row(sample, data)

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
        if error[0] is not None:
            return
        for stream, rows in self._rows.items():
            self.corpus.write_table(part_index_path(stream, self.unit), pa.Table.from_pylist(rows, SAMPLES))
            for name in (part_path(stream, self.unit), part_index_path(stream, self.unit)):
                self.outputs[name] = describe(self.corpus, name)

    def _file(self, stream: str) -> Any:
        if stream not in self._files:
            path = self._stack.enter_context(self.corpus.writing(part_path(stream, self.unit)))
            self._files[stream] = self._stack.enter_context(path.open("wb"))
            self._rows[stream] = []
        return self._files[stream]

    def _append_row(self, sample: Sample, data: bytes) -> None:
        rows = self._rows[sample.record.stream]
        start = rows[-1]["offset"] + rows[-1]["size"] if rows else 0
        sizes = sample.image_sizes
        members = [
            {"name": name, "offset": start + m.offset, "size": m.size, **sizes.get(name, {"width": -1, "height": -1})}
            for span in iter_bytes(data)
            for name, m in span.members.items()
        ]
        place = {"shard": "", "index": len(rows), "offset": start, "size": len(data), "members": members}
        rows.append({**sample.record.model_dump(mode="json"), **place})
