"""Foreign tars in one forward pass: directories, PAX headers, links and unknown members are legal, damage is noticed.

`tarfile` takes a broken header or a missing end for the end of the archive, and so loses what follows without a word.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, cast

BLOCK = 512


class DamagedTar(Exception):
    """A tar that ends too early (`truncated_tar`) or breaks the format (`corrupt_tar`)."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def iter_tar(
    file: IO[bytes], wanted: Callable[[str, int], bool], compressed: bool = False
) -> Iterator[tuple[str, bytes | None]]:
    """Name and data of the plain files in a tar.

    Args:
        file: seekable; only read forward.
        wanted: whether the member of this name and size is read; others come with None.
        compressed: the tar is gzipped.

    Raises:
        DamagedTar: after everything before the damage has been yielded.
    """
    # The buffer keeps the step back in `_check_end` from starting the decompression over.
    stream = cast("IO[bytes]", io.BufferedReader(gzip.GzipFile(fileobj=file), 1 << 20)) if compressed else file
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps every header of the archive
                if not info.isreg():
                    continue
                member = tar.extractfile(info) if wanted(info.name, info.size) else None
                yield info.name, member.read() if member else None
            _check_end(stream, tar.offset)  # type: ignore[attr-defined]
    except EOFError as error:  # of gzip
        raise DamagedTar("truncated_tar", str(error)) from error
    except tarfile.TarError as error:
        cut = not stream.read(1)
        raise DamagedTar("truncated_tar" if cut else "corrupt_tar", str(error)) from error
    except (zlib.error, gzip.BadGzipFile) as error:
        raise DamagedTar("corrupt_tar", str(error)) from error


def _check_end(stream: IO[bytes], offset: int) -> None:
    """Whether the reader stopped at the end mark, a block of zeros."""
    stream.seek(offset)
    block = stream.read(BLOCK)
    if len(block) < BLOCK:
        raise DamagedTar("truncated_tar", f"no end mark at byte {offset}")
    if block.strip(b"\0"):
        raise DamagedTar("corrupt_tar", f"no valid header at byte {offset}")
