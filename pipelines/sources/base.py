"""What a reader is: a listing made at plan time without opening images, and a stream of rows made in a worker."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

from pipelines.images import BadInput
from pipelines.sources.fields import RowParser
from pipelines.sources.files import MAX_FILE_BYTES, SourceError, resolve, root_of
from pipelines.storage import Folder
from schemas.records import Captions, Entity
from schemas.sources import (
    FolderSource,
    ManifestSource,
    ParquetSamplesSource,
    ParquetSource,
    Source,
    SourceBase,
    WebDatasetSource,
    X2ISource,
)

__all__ = ["BadRow", "Item", "ItemReader", "Reader", "ReadySample", "Row", "SourceError", "SourceRow", "open_reader"]

_READ_AHEAD = 8


@dataclass(frozen=True)
class Item:
    """One listed thing, the smallest piece a unit can hold. All fields are plain, so a plan can store them.

    Attributes:
        locator: unique in the source: `a/cat.jpg`, `00000.tar`, `train.parquet#3` (row group), `data.jsonl#12` (line).
        size: bytes that reading it costs, -1 if unknown.
        version: changes when the content changes (etag, or mtime and size); for digests only.
        rows: number of rows it yields, -1 if only reading can tell.
        extra: JSON that lets `Reader.read` work without listing again.
    """

    locator: str
    size: int
    version: str
    rows: int = 1
    extra: str = "{}"


@dataclass(frozen=True)
class SourceRow:
    """One image as the source has it. Geometry is in pixels of the upright (EXIF orientation applied) image.

    Attributes:
        input: human readable, unique in the source: `a/cat.jpg`, `00000.tar::000123`, `train.parquet#0:17`.
        image: undecoded bytes.
        declared: lower-case extension the bytes go by, "" if none; pass it to `pipelines.images.normalise`.
        scene_id: "" means: the image is its own scene.
        optout_reason: who or what opted the image out of training, "" if nobody did.
        depth_png: 16-bit PNG, larger is nearer; b"" if there is none.
    """

    input: str
    image: bytes
    declared: str = ""
    captions: Captions = field(default_factory=Captions)
    entities: tuple[Entity, ...] = ()
    scene_id: str = ""
    license: str = ""
    license_url: str = ""
    author: str = ""
    source_url: str = ""
    optout_reason: str = ""
    depth_png: bytes = b""


@dataclass(frozen=True)
class ReadySample:
    """A sample that somebody else finished; `inputs` and `output` are undecoded images.

    The instruction and its variants have passed the linter, and `stream` (of `schemas.vocabulary.STREAMS`) takes this
    many inputs.
    """

    input: str
    stream: str
    task: str
    subtask: str
    instruction: str
    inputs: tuple[bytes, ...]
    output: bytes
    variants: tuple[str, ...] = ()
    scene_id: str = ""
    license: str = ""
    license_url: str = ""
    author: str = ""
    source_url: str = ""
    optout_reason: str = ""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. `reason` is a stable slug, `detail` says what was found."""

    input: str
    reason: str
    detail: str = ""


Row = SourceRow | ReadySample | BadRow
C = TypeVar("C", bound=SourceBase)


class Reader(ABC, Generic[C]):
    """Lists a source and reads rows from it. `warnings` is filled by `list`."""

    def __init__(self, config: C, base_url: str) -> None:
        self.config = config
        self.url = resolve(config.path, base_url)
        self.warnings: list[str] = []

    @cached_property
    def root(self) -> Folder:
        """What the names of files in locators start from."""
        return Folder(root_of(self.url))

    @cached_property
    def parser(self) -> RowParser:
        return RowParser(self.config)

    @abstractmethod
    def list(self) -> Iterator[Item]:
        """All items, sorted by locator within a file. Opens nothing but manifests and Parquet footers.

        Raises:
            SourceError: the path holds nothing of this type, or its columns do not fit the recipe.
        """

    @abstractmethod
    def read(self, items: Iterable[Item]) -> Iterator[Row]:
        """Rows of the items, in order, as a stream. A row that cannot be read becomes a `BadRow`.

        Raises:
            OSError: the storage failed in a way that a retry may mend.
        """


class ItemReader(Reader[C]):
    """A reader whose items are single rows. It reads a few ahead: object stores are slow, but answer many at once."""

    @abstractmethod
    def read_item(self, item: Item, extra: dict[str, Any]) -> Row:
        """The row of an item; `extra` is the item's, parsed.

        Raises:
            BadInput: the row cannot be used.
        """

    def read(self, items: Iterable[Item]) -> Iterator[Row]:
        pending = deque[Future[Row]]()
        with ThreadPoolExecutor(_READ_AHEAD) as pool:
            for item in items:
                pending.append(pool.submit(self._row, item))
                if len(pending) == _READ_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _row(self, item: Item) -> Row:
        try:
            if item.size > MAX_FILE_BYTES:
                raise BadInput("file_too_large", f"{item.size} bytes, more than {MAX_FILE_BYTES}")
            return self.read_item(item, json.loads(item.extra))
        except BadInput as error:
            return BadRow(item.locator, error.reason, error.detail)


def open_reader(config: Source, base_url: str) -> Reader[Any]:
    """The reader of a source section; relative paths start at `base_url`."""
    from pipelines.sources.folder import FolderReader
    from pipelines.sources.manifest import ManifestReader
    from pipelines.sources.parquet import ParquetReader, ParquetSamplesReader
    from pipelines.sources.webdataset import WebDatasetReader
    from pipelines.sources.x2i import X2IReader

    readers: dict[type[SourceBase], type[Reader[Any]]] = {
        FolderSource: FolderReader,
        ManifestSource: ManifestReader,
        WebDatasetSource: WebDatasetReader,
        ParquetSource: ParquetReader,
        ParquetSamplesSource: ParquetSamplesReader,
        X2ISource: X2IReader,
    }
    return readers[type(config)](config, base_url)
