"""The folder of a run on any fsspec path, written to with retries that end."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from schemas.identity import digest_of

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
# What trying again does not mend; everything else that a file system raises may pass.
_PERMANENT = (
    *(FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError),
    *(TypeError, ValueError, KeyError, AttributeError, NotImplementedError),
)


class StorageError(OSError):
    """Storage that kept failing for as long as it may; names the path."""


@dataclass(frozen=True)
class Location:
    """A file or folder on a local disk or an object store.

    Attributes:
        url: path or fsspec URL.
        patience_s: for how many seconds `retried` tries again what fails.
    """

    url: str
    patience_s: float = field(default=600.0, compare=False)

    @classmethod
    def of(cls, place: Location | Path | str) -> Location:
        """A local path becomes absolute."""
        if isinstance(place, Location):
            return place
        return cls(place if isinstance(place, str) and "://" in place else str(Path(place).absolute()))

    def __truediv__(self, name: str) -> Location:
        return Location(f"{self.url.rstrip('/')}/{name}", self.patience_s)

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        if not self.is_local:
            raise TypeError(f"{self.url} is no path on this machine")
        return self.path

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rsplit("/", 1)[-1]

    @property
    def parent(self) -> Location:
        return Location(self.url.rstrip("/").rsplit("/", 1)[0], self.patience_s)

    @cached_property
    def _fs_path(self) -> tuple[fsspec.AbstractFileSystem, str]:
        return fsspec.core.url_to_fs(self.url)

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        return self._fs_path[0]

    @property
    def path(self) -> str:
        """Inside of `fs`."""
        return str(self._fs_path[1])

    @property
    def is_local(self) -> bool:
        return type(self.fs) is LocalFileSystem  # what is derived from it may be something else

    def exists(self) -> bool:
        return bool(self.retried(lambda: self.fs.exists(self.path)))

    def list(self) -> list[Location]:
        """What lies in this folder, by name; nothing if there is no such folder."""

        def names() -> list[str]:
            self.fs.invalidate_cache(self.path)  # other ranks write too
            return self.fs.ls(self.path, detail=False) if self.fs.exists(self.path) else []

        return [self / name for name in sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in self.retried(names))]

    def read(self, start: int | None = None, stop: int | None = None) -> bytes:
        """Bytes [start, stop)."""
        return self.retried(lambda: self.fs.cat_file(self.path, start=start, end=stop))

    def read_json(self) -> Any:
        return json.loads(self.read())

    def write_json(self, value: Any) -> None:
        data = (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
        self.write(lambda stream: stream.write(data))

    def write(self, fill: Callable[[IO[bytes]], Any], check: Callable[[], None] | None = None) -> None:
        """Write a file that is there as a whole or not at all.

        Args:
            fill: writes the content; called again when storage fails.
            check: reads back what was written, and raises an OSError if it is something else.
        """

        def attempt() -> None:
            with self._whole() as stream:
                fill(stream)
            if check is not None:
                check()

        self.retried(attempt)

    @contextmanager
    def _whole(self) -> Iterator[IO[bytes]]:
        """On a local disk a rename, elsewhere one upload."""
        if not self.is_local:
            with self.fs.open(self.path, "wb") as stream:
                yield stream
            return
        target = Path(self.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(target)

    def copy_from(self, file: Path) -> None:
        """Upload a local file."""
        self.retried(lambda: self.fs.put_file(str(file), self.path))

    def remove(self) -> None:
        """Delete a file or folder if it is there."""

        def attempt() -> None:
            if self.fs.exists(self.path):
                self.fs.rm(self.path, recursive=True)

        self.retried(attempt)

    def retried(self, action: Callable[[], Result]) -> Result:
        """Do it again while storage fails, with waits of 0.5 s, 1 s, ... up to 30 s.

        Raises:
            FileNotFoundError, PermissionError, ValueError ...: at once, where waiting cannot help.
            StorageError: it still failed after `patience_s`.
        """
        began, wait = time.monotonic(), _FIRST_WAIT_S
        while True:
            try:
                return action()
            except _PERMANENT:
                raise
            except Exception as error:
                spent = time.monotonic() - began
                if spent + wait > self.patience_s:
                    raise StorageError(
                        f"{self.url}: storage kept failing for {spent:.0f} s (run.storage_patience): {error}"
                    ) from error
                log.warning("%s: %s; trying again in %.1f s", self.url, error, wait)
                time.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT_S)


class RunFolder:
    """The folder of a run: `location` for what is written once, `live` on this machine for files that grow.

    Both are the same folder unless the run lives on an object store. Then `live` is a scratch folder, which `fetch`
    fills with what an earlier part of the run has left, and `publish` copies to the store.
    """

    def __init__(self, url: str, patience_s: float) -> None:
        self.location = Location(Location.of(url).url, patience_s)
        self._published: dict[str, tuple[int, int]] = {}
        if self.location.is_local:
            self.live = Path(self.location.path)
        else:
            self.live = Path(tempfile.gettempdir()) / f"x2i-run-{digest_of(self.location.url)[:16]}"
        self.live.mkdir(parents=True, exist_ok=True)

    def fetch(self, *names: str) -> None:
        """Copy files, and files in folders, of the store to `live`; what the store lacks goes."""
        if self.location.is_local:
            return
        for name in names:
            source = self.location / name
            files = source.list() if not Path(name).suffix else [source]
            for file in files:
                target = self.live / name if file is source else self.live / name / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                if not file.exists():
                    target.unlink(missing_ok=True)
                    continue
                partial = target.with_name(f".{target.name}.{os.getpid()}")
                partial.write_bytes(file.read())
                partial.replace(target)
                self._published[str(target.relative_to(self.live))] = _state_of(target)

    def publish(self, pattern: str = "**/*") -> None:
        """Copy the files that are new or have changed to the store."""
        if self.location.is_local:
            return
        for file in sorted(path for path in self.live.glob(pattern) if path.is_file() and path.name[0] != "."):
            name = str(file.relative_to(self.live))
            if self._published.get(name) != (state := _state_of(file)):
                (self.location / name).copy_from(file)
                self._published[name] = state


def _state_of(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
