"""Parquet files that hold images, or finished samples, as Hugging Face writes them.

A row group is the smallest piece that is read.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.images import BadInput
from pipelines.sources.base import BadRow, C, Item, Reader, ReadySample, Row, SourceRow
from pipelines.sources.fields import require_columns
from pipelines.sources.files import SourceError, extension_of, list_files, no_files, printable
from pipelines.sources.records import iter_rows, open_parquet
from pipelines.sources.x2i import with_placeholders
from schemas.sources import ParquetSamplesSource, ParquetSource
from schemas.vocabulary import normalise_task, stream_for


class RowGroupReader(Reader[C]):
    """One item per row group."""

    @property
    @abstractmethod
    def columns(self) -> dict[str, str]:
        """Columns that there must be, and what they are: `image` or anything else."""

    @abstractmethod
    def row(self, name: str, values: dict[str, Any]) -> Row:
        """What a row is, from the values of its columns.

        Raises:
            BadInput: it cannot be used.
        """

    def list(self) -> Iterator[Item]:
        files = [file for file in list_files(self.url, self.root) if extension_of(file.name) == "parquet"]
        if not files:
            raise SourceError(f"no .parquet file in {self.url}")
        for file in files:
            with self.root.open(file.name) as stream:
                table = open_parquet(stream, file.name)
                self._check(file.name, table.schema_arrow)
                for group in range(table.num_row_groups):
                    yield _item(file.name, file.version, group, table.metadata.row_group(group))

    def _check(self, name: str, schema: pa.Schema) -> None:
        try:
            self.check_columns(schema.names)
        except SourceError as error:
            raise SourceError(f"{name}: {error}") from error
        for column in (column for column, what in self.columns.items() if what == "image"):
            kind = schema.field(column).type
            if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                kind = kind.field("bytes").type
            if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
                raise SourceError(f"{name}: column {column!r} is {kind}, neither binary nor struct<bytes, path>")

    def check_columns(self, found: Sequence[str]) -> None:
        """Raise SourceError if a column is missing."""
        require_columns(found, self.config.fields)

    def read(self, items: Iterable[Item]) -> Iterator[Row]:
        extras = ((item.locator, json.loads(item.extra)) for item in items)
        for path, groups in groupby(extras, key=lambda pair: pair[1]["path"]):
            with self.root.open(path) as stream:
                table = open_parquet(stream, path)
                wanted = {*self.parser.names, *self.columns}
                columns = [name for name in table.schema_arrow.names if name in wanted]
                for locator, extra in groups:
                    for number, row in enumerate(iter_rows(table, extra["group"], columns)):
                        yield self._row(f"{locator}:{number}", row)

    def _row(self, name: str, row: dict[str, Any] | Exception) -> Row:
        if isinstance(row, UnicodeDecodeError):
            return BadRow(name, "caption_encoding", str(row))
        if isinstance(row, Exception):
            return BadRow(name, "corrupt_row_group", str(row))
        try:
            return self.row(name, row)
        except BadInput as error:
            return BadRow(name, error.reason, error.detail)


class ParquetReader(RowGroupReader[ParquetSource]):
    """One image per row."""

    @property
    def columns(self) -> dict[str, str]:
        return {self.config.fields.get("image", "image"): "image"}

    def check_columns(self, found: Sequence[str]) -> None:
        require_columns(found, {"image": next(iter(self.columns)), **self.config.fields})

    def row(self, name: str, values: dict[str, Any]) -> SourceRow:
        fields = self.parser.rename(values)
        image, path = _image(fields.pop("image"), next(iter(self.columns)))
        return SourceRow(
            name, image, extension_of(path), **self.parser.fields(fields, no_files, path.rpartition("/")[0])
        )


class ParquetSamplesReader(RowGroupReader[ParquetSamplesSource]):
    """One finished sample per row."""

    @property
    def columns(self) -> dict[str, str]:
        config = self.config
        others = [column for column in (config.instruction, config.task_column) if column]
        return dict.fromkeys(others, "text") | dict.fromkeys((*config.inputs, config.output), "image")

    def check_columns(self, found: Sequence[str]) -> None:
        super().check_columns(found)
        if missing := [column for column in self.columns if column not in found]:
            remedy = "name the right ones with `inputs`, `instruction`, `output` and `task_column`"
            raise SourceError(f"no column {' and '.join(map(repr, missing))} among {', '.join(found)}: {remedy}")

    def row(self, name: str, values: dict[str, Any]) -> ReadySample:
        config = self.config
        *inputs, output = (_image(values[column], column)[0] for column in (*config.inputs, config.output))
        given = values.get(config.task_column) if config.task_column else None
        task, subtask = normalise_task(config.tasks.get(str(given), config.task))
        texts = values[config.instruction]
        said = texts if isinstance(texts, list) and texts else [texts]
        limit = config.max_caption_chars
        instruction, *variants = (
            with_placeholders(text, len(inputs), limit) for text in said if text or text is said[0]
        )
        return ReadySample(
            input=name,
            stream=stream_for(task, len(inputs)).name,
            task=task,
            subtask=subtask,
            instruction=instruction,
            inputs=tuple(inputs),
            output=output,
            variants=tuple(variant for variant in dict.fromkeys(variants) if variant != instruction),
            **self.parser.provenance(self.parser.rename(values)),
        )


def _image(value: Any, column: str) -> tuple[bytes, str]:
    """Bytes and path of an image; both as Hugging Face has them."""
    image = value if isinstance(value, dict) else {"bytes": value}
    path = image.get("path") or ""
    if image.get("bytes") is None:
        raise BadInput("missing_file", f"column {column!r} holds no image bytes, only the path {path!r}")
    return image["bytes"], path


def _item(name: str, version: str, group: int, metadata: pq.RowGroupMetaData) -> Item:
    columns = (metadata.column(i) for i in range(metadata.num_columns))
    return Item(
        locator=f"{printable(name)}#{group}",
        size=sum(column.total_compressed_size for column in columns),
        version=version,
        rows=metadata.num_rows,
        extra=json.dumps({"path": name, "group": group}),
    )
