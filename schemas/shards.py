"""The shard codec: a USTAR writer with reproducible bytes, and a reader with exact offsets.

WebDataset's own writer stores a float mtime, which adds a PAX header to every member: shards then differ on every
run, are larger, and read at half the speed. Here every header field is fixed, so equal samples give equal bytes, and
whole samples can be copied between shards as byte ranges.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from schemas.identity import check_key
from schemas.vocabulary import Stream

BLOCK = 512
END_OF_ARCHIVE = b"\0" * (2 * BLOCK)
MAX_NAME_BYTES = 100  # longer names need a prefix or PAX header, which `wids` cannot read
MAX_MEMBER_BYTES = 1 << 31


class ShardError(ValueError):
    """A shard breaks the format; the message names the member and the rule."""


@dataclass(frozen=True)
class Member:
    """One file in a shard. `offset` is that of its data, `header` that of its 512-byte header, both in bytes."""

    name: str
    header: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Offset of whatever follows the padded data."""
        return self.offset + padded(self.size)


@dataclass(frozen=True)
class SampleSpan:
    """Consecutive members of one key. `members` maps the part after the key's dot to its member."""

    key: str
    members: dict[str, Member]

    @property
    def start(self) -> int:
        return min(m.header for m in self.members.values())

    @property
    def end(self) -> int:
        return max(m.end for m in self.members.values())


def padded(size: int) -> int:
    """`size` rounded up to whole tar blocks."""
    return -(-size // BLOCK) * BLOCK


def header(name: str, size: int) -> bytes:
    """The USTAR header of a regular file, with mtime, uid and gid 0 and mode 0644.

    Raises:
        ShardError: name longer than 100 bytes or not ASCII, or member larger than 2 GiB.
    """
    if not name.isascii() or len(name) > MAX_NAME_BYTES:
        raise ShardError(f"member name {name!r} is not ASCII of at most {MAX_NAME_BYTES} bytes")
    if size > MAX_MEMBER_BYTES:
        raise ShardError(f"member {name!r} has {size} bytes, more than {MAX_MEMBER_BYTES}")
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(format=tarfile.USTAR_FORMAT)


def encode_sample(key: str, members: Mapping[str, bytes], stream: Stream) -> bytes:
    """The bytes of one sample as they stand in a shard.

    Args:
        key: sample key.
        members: data by member name without the key, e.g. `{"output.jpg": ..., "txt": ..., "json": ...}`.
        stream: fixes which members there must be, and their order.

    Raises:
        ShardError: a member is missing, unexpected or empty.
        ValueError: the key is not safe.
    """
    check_key(key)
    if set(members) != set(stream.members):
        raise ShardError(f"{key}: stream {stream.name} needs members {stream.members}, got {tuple(members)}")
    return b"".join(encode_member(f"{key}.{name}", members[name]) for name in stream.members)


def encode_member(name: str, data: bytes) -> bytes:
    """Header, data and padding of one member.

    Raises:
        ShardError: no data; or see `header`.
    """
    if not data:
        raise ShardError(f"member {name!r} is empty")
    return header(name, len(data)) + data + b"\0" * (padded(len(data)) - len(data))


def iter_members(stream: BinaryIO) -> Iterator[Member]:
    """Members of a shard in order, with exact offsets; data is skipped, not read, when the stream can seek.

    Raises:
        ShardError: not a tar, cut short, or a member that is not a plain file with a safe relative name.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for info in tar:
                if not info.isreg():
                    raise ShardError(f"member {info.name!r} is not a plain file")
                if info.name.startswith("/") or ".." in info.name.split("/"):
                    raise ShardError(f"member name {info.name!r} leaves the archive")
                yield Member(info.name, info.offset, info.offset_data, info.size)
    except tarfile.TarError as error:
        raise ShardError(f"not a readable tar: {error}") from error


def iter_samples(stream: BinaryIO) -> Iterator[SampleSpan]:
    """Group adjacent members by key (the part of the base name before its first dot, as WebDataset does).

    Raises:
        ShardError: a member without extension, a repeated member, or see `iter_members`.
    """
    key, members = "", dict[str, Member]()
    for member in iter_members(stream):
        folder, _, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not dot or not stem:
            raise ShardError(f"member {member.name!r} has no key or no extension")
        name = f"{folder}/{stem}" if folder else stem
        if members and name != key:
            yield SampleSpan(key, members)
            members = {}
        if extension in members:
            raise ShardError(f"member {member.name!r} occurs twice")
        key = name
        members[extension] = member
    if members:
        yield SampleSpan(key, members)


def iter_bytes(data: bytes) -> Iterator[SampleSpan]:
    """`iter_samples` of encoded samples in memory."""
    return iter_samples(io.BytesIO(data))
