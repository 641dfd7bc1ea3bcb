"""Manifests: a CSV, JSONL or Parquet file whose rows name images and say what is known about them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import fsspec

from pipelines.images import BadInput
from pipelines.sources.base import Item, ItemReader, SourceRow
from pipelines.sources.fields import check_columns, named_files, require_columns
from pipelines.sources.files import SourceError, extension_of, list_files, read_file
from pipelines.sources.records import FileIndex, folder_of_images, listed, read_records, record_values
from pipelines.storage import Folder
from schemas.sources import ManifestSource


class ManifestReader(ItemReader[ManifestSource]):
    """One item and one row per row of the manifest; the item carries the row, so the manifest is read once."""

    def list(self) -> Iterator[Item]:
        columns: dict[str, None] = {}
        schemes: set[str] = set()
        for file in list_files(self.url, self.root):
            index = FileIndex(self._images(file.name))
            for record in read_records(self.root, file.name):
                columns |= dict.fromkeys(record.row)
                values = self.parser.rename(record.row)
                names = named_files(values)
                schemes |= {urlsplit(name).scheme for name in names if "://" in name}
                yield listed(file.name, record, values, names, index)
        if not columns:
            raise SourceError(f"no rows in {self.url}")
        require_columns(columns, {"image": self.config.fields.get("image", "image")})
        self.warnings = check_columns(columns, self.parser, self.config.ignore)
        _require_filesystems(schemes & set(self.config.url_schemes))

    def read_item(self, item: Item, extra: dict[str, Any]) -> SourceRow:
        def load(name: str) -> bytes:
            return read_file(images, name, self.config.url_schemes)

        images = self._images(extra["file"])
        values = record_values(extra)
        name = values.get("image")
        if not isinstance(name, str) or not name:
            raise BadInput("bad_field", "the row names no image")
        fields = self.parser.fields(values, load, name.rpartition("/")[0])
        return SourceRow(item.locator, load(name), extension_of(urlsplit(name).path), **fields)

    def _images(self, file: str) -> Folder:
        return folder_of_images(self.root, file, self.config.image_root)


def _require_filesystems(schemes: set[str]) -> None:
    for scheme in sorted(schemes):
        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            raise SourceError(f"rows name {scheme}:// URLs: {error}") from error
