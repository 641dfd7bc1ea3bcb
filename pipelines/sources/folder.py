"""Folders of images with optional sidecars."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from pipelines.images import BadInput
from pipelines.sources.base import Item, ItemReader, SourceRow
from pipelines.sources.files import (
    FileInfo,
    SourceError,
    extension_of,
    ignored_warning,
    list_files,
    printable,
    read_file,
)
from schemas.records import Entity
from schemas.sources import FolderSource

_SIDECARS = ("json", "txt")


class FolderReader(ItemReader[FolderSource]):
    """One item and one row per image file."""

    def list(self) -> Iterator[Item]:
        images: list[FileInfo] = []
        sidecars: dict[str, FileInfo] = {}
        others = []
        for file in list_files(self.url, self.root):
            extension = extension_of(file.name)
            if extension in self.config.extensions:
                images.append(file)
            elif extension in _SIDECARS:
                sidecars[file.name] = file
            else:
                others.append(file.name)
        if not images:
            raise SourceError(f"no image (.{', .'.join(self.config.extensions)}) in {self.url}")
        unused = set(sidecars)
        for image in images:
            beside = [sidecars[name] for name in sidecar_names(image.name) if name in sidecars]
            unused.difference_update(file.name for file in beside)
            yield _item(image, beside)
        self.warnings = ignored_warning(others, "not an image") + ignored_warning(unused, "no image beside it")

    def read_item(self, item: Item, extra: dict[str, Any]) -> SourceRow:
        path = extra["path"]
        folder = path.rpartition("/")[0]
        subject = path.partition("/")[0] if folder and self.config.subjects else ""
        if self.config.subjects and not subject:
            raise BadInput("no_subject", "it is in no folder that would name its subject")
        inside = self.root.sub(folder) if folder else self.root
        values: dict[str, Any] = {}
        for name in extra["sidecars"]:
            values |= self._sidecar(name)
        fields = self.parser.fields(values, lambda name: read_file(inside, name), subject or folder)
        if subject:
            fields["entities"] = with_subject(fields["entities"], subject, self.config.name)
        return SourceRow(item.locator, read_file(self.root, path), extension_of(path), **fields)

    def _sidecar(self, name: str) -> dict[str, Any]:
        data = read_file(self.root, name)
        if name.endswith(".txt"):
            return {self.config.text_is: data}
        try:
            row = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadInput("bad_sidecar", f"{name}: {error}") from error
        if not isinstance(row, dict):
            raise BadInput("bad_sidecar", f"{name} is a {type(row).__name__}, not an object")
        return self.parser.rename(row)


def with_subject(entities: tuple[Entity, ...], folder: str, source: str) -> tuple[Entity, ...]:
    """The entities, of which those that a folder of a subject names have its `subject_id`.

    If there are none, the first is all of the photograph, whatever its size: `ingest` clips boxes.
    """
    name, subject_id = subject_name(folder), f"{source}/{printable(folder)}"
    if not any(entity.label.lower() == name for entity in entities):
        entities = (Entity(phrase=name, label=name, box=(0.0, 0.0, math.inf, math.inf)), *entities)
    return tuple(
        entity.model_copy(update={"subject_id": subject_id}) if entity.label.lower() == name else entity
        for entity in entities
    )


def subject_name(folder: str) -> str:
    """What a folder says a subject is: words in lower case, without a number at the end.

    >>> subject_name("red_cartoon"), subject_name("Dog-2")
    ('red cartoon', 'dog')
    """
    words = re.sub(r"[\W_]+", " ", printable(folder)).strip().lower()
    return re.sub(r"\s*\d+$", "", words) or words or "subject"


def sidecar_names(image: str) -> list[str]:
    """Where the sidecars of an image would be; a later one wins."""
    stem = image.rpartition(".")[0]
    return [f"{stem}.{extension}" for extension in _SIDECARS]


def _item(image: FileInfo, beside: Iterable[FileInfo]) -> Item:
    files = [image, *beside]
    return Item(
        locator=printable(image.name),
        size=sum(file.size for file in files),
        version=" ".join(file.version for file in files),
        extra=json.dumps({"path": image.name, "sidecars": [file.name for file in files[1:]]}),
    )
