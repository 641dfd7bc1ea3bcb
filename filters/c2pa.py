"""Training-and-data-mining assertions of a C2PA manifest, as far as they can be read without verifying anything.

A manifest is a tree of JUMBF boxes (ISO/IEC 19566-5) inside the file. An assertion is a superbox: a description box
with its label, then its content as CBOR or JSON. The assertions are found by their label, wherever the tree holds them.
Manifests that are compressed or only linked to are not read.
"""

from __future__ import annotations

import json
import re
import struct
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from schemas.containers import APP11, jpeg_segments

# C2PA 1.x and its successor, the Creator Assertions Working Group; instances and versions append to the label.
_LABEL = re.compile(rb"(?:c2pa|cawg)\.training-mining[\w.]*\0")
_BEFORE_LABEL = 25  # of a description box: length, `jumd`, UUID (16), toggles (1)


def training_mining(data: bytes) -> Iterator[tuple[str, str]]:
    """Entries such as `("c2pa.ai_training", "notAllowed")` of all such assertions in an image file."""
    for boxes in _jumbf(data):
        for match in _LABEL.finditer(boxes):
            yield from _entries(_content(boxes, match.start() - _BEFORE_LABEL))


def _jumbf(data: bytes) -> list[bytes]:
    """JUMBF of a file: a JPEG cuts it into APP11 segments (ISO/IEC 19566-5, annex D), other formats have it whole."""
    if not data.startswith(b"\xff\xd8"):
        return [data]
    parts: dict[bytes, dict[bytes, bytes]] = defaultdict(dict)  # box instance -> packet number -> bytes
    for segment in jpeg_segments(data):
        if segment.marker == APP11 and segment.payload.startswith(b"JP"):
            parts[segment.payload[2:4]][segment.payload[4:8]] = segment.payload[8:]
    return [_joined([packets[number] for number in sorted(packets)]) for packets in parts.values()]


def _joined(packets: list[bytes]) -> bytes:
    """One box from its packets, each of which repeats the box's header."""
    header = 16 if packets[0].startswith(b"\0\0\0\1") else 8
    return packets[0] + b"".join(packet[header:] for packet in packets[1:])


def _content(boxes: bytes, description: int) -> Any:
    """The value in the box after a description box; None if it is neither CBOR nor JSON."""
    if description < 0 or boxes[description + 4 : description + 8] != b"jumd":
        return None
    start = description + int.from_bytes(boxes[description : description + 4], "big")
    end = start + int.from_bytes(boxes[start : start + 4], "big")
    payload = boxes[start + 8 : end]
    try:
        match boxes[start + 4 : start + 8]:
            case b"cbor":
                return decode_cbor(payload)
            case b"json":
                return json.loads(payload)
    except (ValueError, RecursionError):
        pass
    return None


def _entries(assertion: Any) -> Iterator[tuple[str, str]]:
    entries = assertion.get("entries") if isinstance(assertion, dict) else None
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        if isinstance(entry, dict):
            yield str(name), str(entry.get("use", ""))


def decode_cbor(data: bytes) -> Any:
    """The first value in CBOR data (RFC 8949). Tags are dropped, simple values other than booleans become None.

    Raises:
        ValueError: the data is damaged or cut.
    """
    try:
        return _value(data, 0)[0]
    except (IndexError, struct.error, TypeError) as error:
        raise ValueError(f"not CBOR: {error}") from error


_BREAK = object()


def _value(data: bytes, at: int) -> tuple[Any, int]:
    """A value and where it ends."""
    major, info = data[at] >> 5, data[at] & 31
    number, at = _number(data, at + 1, info)
    count = None if info == 31 else number
    match major:
        case 0 | 1:
            value: Any = number if major == 0 else -1 - number
        case 2 | 3:
            value, at = _string(data, at, count, b"" if major == 2 else "")
        case 4:
            value, at = _items(data, at, count)
        case 5:
            flat, at = _items(data, at, None if count is None else 2 * count)
            value = dict(zip(flat[::2], flat[1::2], strict=True))
        case 6:
            value, at = _value(data, at)
        case _:
            value = _simple(data, at, info)
    return value, at


def _string(data: bytes, at: int, size: int | None, empty: Any) -> tuple[Any, int]:
    """Bytes or text of a size, or chunks of it up to a break."""
    if size is None:
        chunks, at = _items(data, at, None)
        return empty.join(chunks), at
    chunk = data[at : at + size]
    if len(chunk) != size:
        raise ValueError("not CBOR: cut")
    return chunk if isinstance(empty, bytes) else chunk.decode(), at + size


def _number(data: bytes, at: int, info: int) -> tuple[int, int]:
    """The argument of a value's head."""
    if info < 24 or info == 31:
        return info, at
    if info > 27:
        raise ValueError(f"not CBOR: additional information {info}")
    size = 1 << (info - 24)
    if at + size > len(data):
        raise ValueError("not CBOR: cut")
    return int.from_bytes(data[at : at + size], "big"), at + size


def _items(data: bytes, at: int, count: int | None) -> tuple[list[Any], int]:
    """So many values, or all up to a break."""
    items: list[Any] = []
    while count is None or len(items) < count:
        item, at = _value(data, at)
        if item is _BREAK:
            break
        items.append(item)
    return items, at


def _simple(data: bytes, at: int, info: int) -> Any:
    if info == 31:
        return _BREAK
    if info in (20, 21):
        return info == 21
    formats = {25: ">e", 26: ">f", 27: ">d"}
    return struct.unpack_from(formats[info], data, at - (1 << (info - 24)))[0] if info in formats else None
