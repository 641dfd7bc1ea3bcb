"""Files of a source on any fsspec path: listed with size and version, and read within the folder they belong to."""

from __future__ import annotations

import errno
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import fsspec

from pipelines.images import BadInput
from pipelines.storage import Folder

MAX_FILE_BYTES = 256 << 20
# What a path itself is to blame for; any other error of a storage may pass.
_UNREADABLE = (IsADirectoryError, NotADirectoryError, FileExistsError)
_UNREADABLE_ERRNO = (errno.ENAMETOOLONG, errno.ELOOP)


class SourceError(ValueError):
    """A source as a whole cannot be listed; the message names the path or column, and the remedy."""


@dataclass(frozen=True)
class FileInfo:
    """One file of a listing; `name` is relative to the source's root."""

    name: str
    size: int
    version: str


def resolve(path: str, base_url: str) -> str:
    """`path` itself if it is absolute or a URL, else below `base_url`."""
    if "://" in path or path.startswith(("/", "~")):
        return path
    scheme, separator, folder = base_url.rpartition("://")
    return f"{scheme}{separator}{posixpath.normpath(posixpath.join(folder or '.', path))}"


def root_of(url: str) -> str:
    """The folder that names in a listing are relative to.

    For a glob the part before the first wildcard, for a file its folder, for a folder itself.
    """
    if is_glob(url):
        return re.split(r"[*?\[]", url, maxsplit=1)[0].rpartition("/")[0]
    fs, path = fsspec.core.url_to_fs(url)
    return url.rstrip("/").rpartition("/")[0] if fs.isfile(path) else url


def is_glob(url: str) -> bool:
    return bool(re.search(r"[*?\[]", url))


def list_files(url: str, root: Folder) -> Iterator[FileInfo]:
    """Every visible file of a path, folder (recursive) or glob, sorted by name.

    Names with a part that begins with a dot, and `__MACOSX`, are left out: they are not data.

    Raises:
        SourceError: there is no such path.
    """
    fs, path = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    found = fs.glob(path, detail=True) if is_glob(url) else fs.find(path, detail=True)
    if not found:
        raise SourceError(f"no file at {url}")
    start = len(root.path()) + 1
    for full in sorted(found):
        name, info = full[start:], found[full]
        if info["type"] == "file" and not is_hidden(name):
            yield FileInfo(name, int(info["size"]), version_of(info))


def is_hidden(name: str) -> bool:
    """Whether a name is what operating systems leave behind: `.DS_Store`, `._photo.jpg`, `__MACOSX/`."""
    parts = set(name.split("/")) - {".", ".."}
    return "__MACOSX" in parts or any(part.startswith(".") for part in parts)


def version_of(info: dict[str, Any]) -> str:
    """What changes when a file does: its etag, else its modification time and size."""
    etag = info.get("ETag") or info.get("etag")
    if etag:
        return str(etag).strip('"')
    changed = info.get("mtime") or info.get("LastModified") or info.get("updated") or info.get("created") or ""
    return f"{changed}-{info['size']}"


def ignored_warning(names: Iterable[str], why: str) -> list[str]:
    """One line that counts left-out files by extension, or none."""
    counts = Counter(extension_of(name) or "(none)" for name in names)
    if not counts:
        return []
    kinds = ", ".join(f"{count} .{extension}" for extension, count in sorted(counts.items()))
    return [f"{sum(counts.values())} file(s) left out, {why}: {kinds}"]


def extension_of(name: str) -> str:
    """Lower-case extension without its dot, "" if there is none."""
    stem, dot, extension = name.rpartition("/")[2].rpartition(".")
    return extension.lower() if dot and stem else ""


def printable(name: str) -> str:
    """A file name as valid Unicode: bytes that are not UTF-8 show as `\\xNN`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def read_file(root: Folder, name: str, url_schemes: Iterable[str] = ()) -> bytes:
    """The bytes of `root/name`, or of a URL with one of the schemes.

    Raises:
        BadInput: `unsafe_path` (leaves the root), `missing_file`, `unreadable_file`, `fetch_failed` or
            `file_too_large` (more than 256 MiB).
        OSError: the storage failed.
    """
    scheme = urlsplit(name).scheme if "://" in name else ""
    if scheme and (scheme not in url_schemes or "::" in name):
        raise BadInput("unsafe_path", f"{printable(name)!r} is neither a path below {root.url} nor an allowed URL")
    try:
        data = _fetch(name) if scheme else root.fs.cat_file(root.path(posixpath.normpath(name)))
    except FileNotFoundError as error:
        raise BadInput("missing_file", printable(name)) from error
    except ValueError as error:  # `..`, an absolute path, NUL
        raise BadInput("unsafe_path", printable(str(error))) from error
    except Exception as error:
        forbidden = isinstance(error, PermissionError) and root.is_local  # of a store, credentials may have expired
        if forbidden or isinstance(error, _UNREADABLE) or getattr(error, "errno", None) in _UNREADABLE_ERRNO:
            raise BadInput("unreadable_file", printable(str(error))) from error
        if scheme in ("http", "https"):
            raise BadInput("fetch_failed", f"{name}: {type(error).__name__}: {error}") from error
        raise
    if len(data) > MAX_FILE_BYTES:
        raise BadInput("file_too_large", f"{printable(name)} has more than {MAX_FILE_BYTES} bytes")
    return bytes(data)


def _fetch(url: str) -> bytes:
    """A file whose size no listing knows: no more of it than shows that it is too large."""
    fs, path = fsspec.core.url_to_fs(url)
    with fs.open(path, "rb") as file:
        return bytes(file.read(MAX_FILE_BYTES + 1))


def no_files(name: str) -> bytes:
    """The `load` of formats whose rows carry everything themselves.

    Raises:
        BadInput: always.
    """
    raise BadInput("unsafe_path", f"{name!r}: rows of this format cannot name files")
