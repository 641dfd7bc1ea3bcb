"""Listings that are files themselves: rows of CSV, JSONL and Parquet, and what is known of the files they name."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import posixpath
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.images import BadInput
from pipelines.sources.base import Item
from pipelines.sources.files import FileInfo, SourceError, extension_of, list_files, printable, resolve
from pipelines.storage import Folder


@dataclass(frozen=True)
class Record:
    """One row. `position` is its line in the file (CSV, JSONL; from 1) or `group:row` (Parquet; from 0)."""

    position: str
    row: dict[str, Any]
    error: str = ""


def read_records(folder: Folder, name: str) -> Iterator[Record]:
    """Rows of a `.csv`, `.jsonl` or `.parquet` file. A row that cannot be parsed has an `error` instead of values.

    Bytes that are not UTF-8 become lone surrogates, which every text field refuses later, row by row.

    Raises:
        SourceError: the file has another extension, or no readable Parquet footer.
    """
    readers = {"csv": _csv, "jsonl": _jsonl, "ndjson": _jsonl, "parquet": _parquet}
    read = readers.get(extension_of(name))
    if read is None:
        raise SourceError(f"{name} is none of .{', .'.join(readers)}")
    with folder.open(name) as file:
        yield from read(file, name)


def _csv(file: IO[bytes], name: str) -> Iterator[Record]:
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.DictReader(text, strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(str(reader.reader.line_num), {}, str(error))
            continue
        excess = row.pop(None, None)  # type: ignore[call-overload]
        problem = f"{len(excess)} cells more than the header has" if excess else ""
        yield Record(str(reader.reader.line_num), row, problem)


def _jsonl(file: IO[bytes], name: str) -> Iterator[Record]:
    for number, line in enumerate(io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Record(str(number), {}, str(error))
            continue
        if isinstance(row, dict):
            yield Record(str(number), row)
        else:
            yield Record(str(number), {}, f"a {type(row).__name__}, not an object")


def _parquet(file: IO[bytes], name: str) -> Iterator[Record]:
    table = open_parquet(file, name)
    for group in range(table.num_row_groups):
        for number, row in enumerate(iter_rows(table, group, table.schema_arrow.names)):
            if isinstance(row, dict):
                yield Record(f"{group}:{number}", row)
            else:
                yield Record(f"{group}:{number}", {}, str(row))


def open_parquet(file: IO[bytes], name: str) -> pq.ParquetFile:
    """A Parquet file whose footer has been read.

    Raises:
        SourceError: there is none.
    """
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise SourceError(f"{name} is not a Parquet file: {error}") from error


def iter_rows(table: pq.ParquetFile, group: int, columns: Iterable[str]) -> Iterator[dict[str, Any] | Exception]:
    """Rows of a row group, one at a time; in place of a row that cannot be read, why not."""
    remaining = table.metadata.row_group(group).num_rows
    try:
        for batch in table.iter_batches(batch_size=16, row_groups=[group], columns=list(columns)):
            for index in range(batch.num_rows):
                remaining -= 1
                try:
                    yield {name: batch.column(i)[index].as_py() for i, name in enumerate(batch.schema.names)}
                except UnicodeDecodeError as error:
                    yield error
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the storage failed, not the file
            raise
        yield from [error] * remaining


class FileIndex:
    """Size and version of the files below a folder, from one listing."""

    def __init__(self, root: Folder) -> None:
        self._files: dict[str, FileInfo] = {file.name: file for file in list_files(root.url, root)}

    def size(self, names: Iterable[str]) -> int:
        """Bytes of all files together, -1 if one is unknown."""
        files = self._find(names)
        return sum(file.size for file in files if file) if all(files) else -1

    def version(self, names: Iterable[str], row: str) -> str:
        """Digest of a row and of the versions of its files."""
        versions = [file.version if file else "" for file in self._find(names)]
        return hashlib.sha256("\0".join([row, *versions]).encode()).hexdigest()[:16]

    def _find(self, names: Iterable[str]) -> list[FileInfo | None]:
        return [self._files.get(posixpath.normpath(name)) for name in names]


def listed(file: str, record: Record, values: dict[str, Any], names: Collection[str], index: FileIndex) -> Item:
    """The item of a row of the listing `file` that says `values` and names the files `names`."""
    error = record.error
    try:
        row = json.dumps(values, sort_keys=True)
    except TypeError as problem:
        row, error = "{}", str(problem)
    return Item(
        locator=f"{printable(file)}#{record.position}",
        size=index.size(names),
        version=index.version(names, row),
        extra=json.dumps({"file": file, "row": row, "error": error}),
    )


def record_values(extra: dict[str, Any]) -> dict[str, Any]:
    """The values of an item made by `listed`.

    Raises:
        BadInput: `bad_row`, the listing's row could not be parsed.
    """
    if extra["error"]:
        raise BadInput("bad_row", extra["error"])
    return dict(json.loads(extra["row"]))


def folder_of_images(root: Folder, file: str, image_root: str) -> Folder:
    """Where the paths in a listing start: at `image_root` if the recipe gives one, else beside the listing."""
    folder = file.rpartition("/")[0]
    beside = root.sub(folder) if folder else root
    return Folder(resolve(image_root, beside.url)) if image_root else beside
