"""File systems that misbehave."""

from __future__ import annotations

import os
import time
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem


class FlakyFileSystem(MemoryFileSystem):
    """Memory that can be told to fail: `flaky://name`. Writes fail as those of an object store do, when they end."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    every: ClassVar[int] = 0
    operations: ClassVar[int] = 0
    failures: ClassVar[int] = 0

    @classmethod
    def fail(cls, every: int) -> None:
        """One in so many operations from now on: 1 for all of them, 0 for none."""
        cls.every, cls.operations, cls.failures = every, 0, 0

    def _work(self) -> None:
        cls = type(self)
        cls.operations += 1
        if cls.every and cls.operations % cls.every == 0:
            cls.failures += 1
            raise ConnectionError("503 Service Unavailable")

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        self._work()
        return super()._open(path, mode, **kwargs)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self._work()
        return super().cat_file(path, start, end, **kwargs)


class SlowFileSystem(LocalFileSystem):
    """A local disk, `slow:///folder`, that takes its time to write on one rank; both are named in the environment."""

    protocol = "slow"
    RANK, SECONDS = "X2I_TEST_SLOW_RANK", "X2I_TEST_SLOW_SECONDS"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(auto_mkdir=True, **kwargs)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return LocalFileSystem._strip_protocol(str(path).removeprefix("slow://"))

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "w" in mode and os.environ.get("RANK", "") == os.environ.get(self.RANK):
            time.sleep(float(os.environ[self.SECONDS]))
        return super()._open(path, mode, **kwargs)


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
fsspec.register_implementation("slow", SlowFileSystem, clobber=True)
