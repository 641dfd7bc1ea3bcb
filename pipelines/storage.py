"""Files on any fsspec path. A write is visible whole or not at all; a unit counts as done only by its marker."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

TEMPORARY = ".tmp-"  # how the names of files begin that are being written


@dataclass(frozen=True)
class Folder:
    """A folder on a local disk or an object store, addressed by URL; all paths are relative to it."""

    url: str

    @cached_property
    def _fs_root(self) -> tuple[fsspec.AbstractFileSystem, str]:
        fs, root = fsspec.core.url_to_fs(self.url)
        return fs, root.rstrip("/")

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        return self._fs_root[0]

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def path(self, name: str = "") -> str:
        """The path inside `fs`.

        Raises:
            ValueError: the name would leave the folder.
        """
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"path {name!r} leaves {self.url}")
        return f"{self._fs_root[1]}/{name}" if name else self._fs_root[1]

    def sub(self, name: str) -> Folder:
        return Folder(f"{self.url.rstrip('/')}/{name}")

    def exists(self, name: str) -> bool:
        return self.fs.exists(self.path(name))

    def size(self, name: str) -> int:
        return int(self.fs.size(self.path(name)))

    def list(self, prefix: str = "", suffix: str = "") -> list[str]:
        """Sorted names of all files below `prefix` that end with `suffix`, relative to this folder."""
        base = self.path(prefix)
        if not self.fs.exists(base):
            return []
        start = len(self.path()) + 1
        return sorted(p[start:] for p in self.fs.find(base) if p.endswith(suffix))

    def open(self, name: str) -> IO[bytes]:
        """A seekable binary reader."""
        return self.fs.open(self.path(name), "rb")

    def read_bytes(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        return self.fs.cat_file(self.path(name), start=start, end=end)

    def read_json(self, name: str) -> Any:
        return json.loads(self.read_bytes(name))

    def read_table(self, name: str, columns: Iterable[str] | None = None) -> pa.Table:
        return pq.read_table(io.BytesIO(self.read_bytes(name)), columns=list(columns) if columns else None)

    def write_bytes(self, name: str, data: bytes) -> None:
        with self.writing(name) as local:
            local.write_bytes(data)

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())

    def write_table(self, name: str, table: pa.Table) -> None:
        """Parquet with fixed settings, so that equal tables give equal bytes."""
        with self.writing(name) as local:
            pq.write_table(table, local, compression="zstd", row_group_size=10_000)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A local path to write to, which becomes `name` when the block ends without an error.

        On a local disk this is a rename within the folder, elsewhere one upload (atomic per object).
        """
        target = self.path(name)
        if self.is_local:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=Path(target).parent)
        else:
            handle, temporary = tempfile.mkstemp(prefix="x2i-")
        os.close(handle)
        try:
            yield Path(temporary)
            if self.is_local:
                Path(temporary).chmod(0o644)
                Path(temporary).replace(target)
            else:
                self.fs.put_file(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Delete a file or folder if it is there."""
        if self.exists(name):
            self.fs.rm(self.path(name), recursive=True)
