"""WebDataset tars written by others, above all by img2dataset: one pass, tolerant of what is in the wild."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.images import BadInput
from pipelines.sources.base import BadRow, Item, Reader, Row, SourceRow
from pipelines.sources.files import (
    MAX_FILE_BYTES,
    FileInfo,
    SourceError,
    is_hidden,
    list_files,
    no_files,
    printable,
)
from pipelines.sources.records import iter_rows, open_parquet
from pipelines.sources.tars import DamagedTar, iter_tar
from schemas.sources import WebDatasetSource

_COMPRESSED = (".tar.gz", ".tgz")
_IMAGES = ("jpg", "jpeg", "png", "webp")
_TEXTS = ("txt", "caption")
_DEPTH = "depth.png"
_KNOWN = (*_IMAGES, *_TEXTS, "json", _DEPTH)

Log = Mapping[str, Mapping[str, Any]]


@dataclass
class _Group:
    """Adjacent members of one key: data by extension, and the names of those that cannot be used."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    problems: list[tuple[str, BadInput]] = field(default_factory=list)
    unclaimed: list[str] = field(default_factory=list)

    @property
    def image(self) -> str:
        """Extension of the image, "" if there is none."""
        return next((extension for extension in self.members if extension in _IMAGES), "")

    def add(self, name: str, extension: str, data: bytes | None) -> None:
        if extension not in _KNOWN:
            if extension.endswith(_IMAGES):
                self.unclaimed.append(name)
        elif data is None:
            self.problems.append((name, BadInput("file_too_large", f"more than {MAX_FILE_BYTES} bytes")))
        elif extension in self.members or (extension in _IMAGES and self.image):
            self.problems.append((name, BadInput("duplicate_member", f"key {self.key!r} has one like it")))
        else:
            self.members[extension] = data


class WebDatasetReader(Reader[WebDatasetSource]):
    """One item per tar."""

    def list(self) -> Iterator[Item]:
        files = {file.name: file for file in list_files(self.url, self.root)}
        tars = [file for name, file in files.items() if name.endswith((".tar", *_COMPRESSED))]
        if not tars:
            raise SourceError(f"no .tar, .tar.gz or .tgz in {self.url}")
        if self.url != self.root.url:
            files = {file.name: file for file in list_files(self.root.url, self.root)}
        for tar in tars:
            yield _item(tar, files.get(f"{tar.name.removesuffix('.gz').rpartition('.')[0]}.parquet"))

    def read(self, items: Iterable[Item]) -> Iterator[Row]:
        for item in items:
            extra = json.loads(item.extra)
            log: Log = {}
            try:
                log = self._download_log(extra["log"]) if extra["log"] else log
            except SourceError as error:
                yield BadRow(printable(extra["log"]), "corrupt_log", str(error))
            yield from self._read_tar(item.locator, extra["path"], log)

    def _download_log(self, name: str) -> Log:
        """img2dataset's row of each key, or nothing if the Parquet file is something else.

        Raises:
            SourceError: the file is damaged.
        """
        with self.root.open(name) as file:
            table = open_parquet(file, name)
            names = set(table.schema_arrow.names)
            if not {"key", "status"} <= names:
                return {}
            columns = sorted(names & {*self.parser.names, "key", "status", "error_message"})
            rows = [row for group in range(table.num_row_groups) for row in iter_rows(table, group, columns)]
        for row in rows:
            if isinstance(row, Exception):
                raise SourceError(f"{name}: {row}") from row
        return {str(row["key"]): row for row in rows if isinstance(row, dict)}

    def _read_tar(self, locator: str, path: str, log: Log) -> Iterator[Row]:
        times: dict[str, int] = {}
        try:
            for group in self._groups(path):
                times[group.key] = count = times.get(group.key, 0) + 1
                name = f"{locator}::{printable(group.key)}" + (f"#{count}" if count > 1 else "")
                yield from self._rows(name, group, log.get(group.key, {}))
        except DamagedTar as error:
            yield BadRow(locator, error.reason, str(error))
        for key in sorted(log.keys() - times.keys()):
            yield _never_arrived(f"{locator}::{key}", log[key])

    def _groups(self, path: str) -> Iterator[_Group]:
        """Samples in order. Of a damaged tar the last one is left out unless it has what the one before it has."""
        group = previous = _Group("")
        with self.root.open(path) as file:
            members = iter_tar(file, self._wanted, compressed=path.endswith(_COMPRESSED))
            try:
                for name, data in members:
                    key, extension = self._split(name)
                    if not extension:
                        continue
                    if key != group.key:
                        if group.key:
                            yield group
                        group, previous = _Group(key), group
                    group.add(name, extension, data)
            except DamagedTar as error:
                if group.members and group.members.keys() == previous.members.keys():
                    yield group
                    raise
                raise DamagedTar(error.reason, f"{error}, in sample {group.key!r}") from error
        if group.key:
            yield group

    def _split(self, name: str) -> tuple[str, str]:
        """Key and lower-case extension; no extension for what is no part of a sample."""
        folder, _, base = name.removeprefix("./").rpartition("/")
        stem, _, extension = base.rpartition(".") if self.config.dotted_keys else base.partition(".")
        if not stem or is_hidden(name) or (stem.startswith("__") and stem.endswith("__")):
            return "", ""
        return f"{folder}/{stem}" if folder else stem, extension.lower()

    def _wanted(self, name: str, size: int) -> bool:
        return size <= MAX_FILE_BYTES and self._split(name)[1] in _KNOWN

    def _rows(self, name: str, group: _Group, logged: Mapping[str, Any]) -> Iterator[Row]:
        for member, problem in group.problems:
            yield BadRow(f"{name} ({printable(member)})", problem.reason, problem.detail)
        if group.image:
            yield self._row(name, group, logged)
        elif group.unclaimed:
            for member in group.unclaimed:
                yield BadRow(
                    f"{name} ({printable(member)})",
                    "no_image",
                    f"its key is read as {group.key!r}; set `dotted_keys: true` if keys contain dots",
                )
        elif group.members and not group.problems:
            yield BadRow(name, "no_image", f"only {', '.join(group.members)}")

    def _row(self, name: str, group: _Group, logged: Mapping[str, Any]) -> Row:
        try:
            values = self.parser.rename(logged) | self.parser.rename(_json(group.members.get("json", b"{}")))
            for extension, field_name in {**dict.fromkeys(_TEXTS, self.config.text_is), _DEPTH: "depth"}.items():
                if extension in group.members:
                    values[field_name] = group.members[extension]
            fields = self.parser.fields(values, no_files, group.key.rpartition("/")[0])
        except BadInput as error:
            return BadRow(name, error.reason, error.detail)
        return SourceRow(name, group.members[group.image], group.image, **fields)


def _json(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadInput("bad_json", str(error)) from error
    if not isinstance(value, dict):
        raise BadInput("bad_json", f"a {type(value).__name__}, not an object")
    return value


def _never_arrived(name: str, row: Mapping[str, Any]) -> BadRow:
    status = str(row["status"])
    if status == "success":
        return BadRow(name, "missing_in_tar", "the Parquet file beside the tar lists it as downloaded")
    return BadRow(name, status, str(row.get("error_message") or ""))


def _item(tar: FileInfo, log: FileInfo | None) -> Item:
    files = [tar, log] if log else [tar]
    return Item(
        locator=printable(tar.name),
        size=sum(file.size for file in files),
        version=" ".join(file.version for file in files),
        rows=-1,
        extra=json.dumps({"path": tar.name, "log": log.name if log else ""}),
    )
