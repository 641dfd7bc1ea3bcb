"""Parquet files that hold images, as Hugging Face writes them. A row group is the smallest piece that is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.images import BadInput
from pipelines.sources.base import BadRow, Item, Reader, Row, SourceRow
from pipelines.sources.fields import RowParser, require_columns
from pipelines.sources.files import SourceError, extension_of, list_files, no_files, printable
from pipelines.sources.records import iter_rows, open_parquet
from schemas.sources import ParquetSource


class ParquetReader(Reader[ParquetSource]):
    """One item per row group."""

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
        column = self.config.fields.get("image", "image")
        try:
            require_columns(schema.names, {"image": column, **self.config.fields})
        except SourceError as error:
            raise SourceError(f"{name}: {error}") from error
        kind = schema.field(column).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise SourceError(f"{name}: column {column!r} is {kind}, neither binary nor struct<bytes, path>")

    def read(self, items: Iterable[Item]) -> Iterator[Row]:
        extras = ((item.locator, json.loads(item.extra)) for item in items)
        for path, groups in groupby(extras, key=lambda pair: pair[1]["path"]):
            with self.root.open(path) as stream:
                table = open_parquet(stream, path)
                columns = [name for name in self.parser.names if name in table.schema_arrow.names]
                for locator, extra in groups:
                    for number, row in enumerate(iter_rows(table, extra["group"], columns)):
                        yield _row(f"{locator}:{number}", row, self.parser)


def _row(name: str, row: dict[str, Any] | Exception, parser: RowParser) -> Row:
    if isinstance(row, UnicodeDecodeError):
        return BadRow(name, "caption_encoding", str(row))
    if isinstance(row, Exception):
        return BadRow(name, "corrupt_row_group", str(row))
    values = parser.rename(row)
    image = values.pop("image")
    image = image if isinstance(image, dict) else {"bytes": image}
    path = image.get("path") or ""
    if image.get("bytes") is None:
        return BadRow(name, "missing_file", f"the row holds no image bytes, only the path {path!r}")
    try:
        fields = parser.fields(values, no_files, path.rpartition("/")[0])
    except BadInput as error:
        return BadRow(name, error.reason, error.detail)
    return SourceRow(name, image["bytes"], extension_of(path), **fields)


def _item(name: str, version: str, group: int, metadata: pq.RowGroupMetaData) -> Item:
    columns = (metadata.column(i) for i in range(metadata.num_columns))
    return Item(
        locator=f"{printable(name)}#{group}",
        size=sum(column.total_compressed_size for column in columns),
        version=version,
        rows=metadata.num_rows,
        extra=json.dumps({"path": name, "group": group}),
    )
