"""The outer structure of image files: segments of a JPEG, chunks of a PNG. Nothing is decoded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

SOI, EOI, SOS, COM = 0xD8, 0xD9, 0xDA, 0xFE
APP0, APP11, APP14, APP15 = 0xE0, 0xEB, 0xEE, 0xEF
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_STANDALONE = {0x01, SOI, EOI, *range(0xD0, 0xD8)}  # markers without a length
_MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)  # decoders skip fill bytes and rubbish before a marker
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)  # no stuffed zero, no fill byte, no restart


@dataclass(frozen=True)
class Segment:
    """Bytes [start, end) of a JPEG, from the marker on; a scan includes its entropy-coded data.

    Attributes:
        marker: second byte of the marker (ITU-T T.81, table B.1).
        payload: what stands between the length field and the end.
    """

    marker: int
    start: int
    end: int
    payload: bytes


def jpeg_segments(data: bytes) -> Iterator[Segment]:
    """Segments after the start of image, up to the end of image; a cut file just ends earlier."""
    at = 2
    while match := _MARKER.search(data, at):
        marker, start, body = match[1][0], match.end() - 2, match.end()
        at = body if marker in _STANDALONE else body + int.from_bytes(data[body : body + 2], "big")
        if marker == SOS:
            after = _AFTER_SCAN.search(data, at)
            at = after.start() if after else len(data)
        yield Segment(marker, start, at, data[body + 2 : at])
        if marker == EOI:
            return


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Type and place [start, end) of each chunk of a PNG, its length field and checksum included."""
    at = len(PNG_SIGNATURE)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at, end
        at = end
