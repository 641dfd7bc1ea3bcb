"""Removes metadata from files that pass through: positions, serial numbers, names and thumbnails leave a corpus.

Pixels are not touched: what a decoder needs stays as it is, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator

from schemas.containers import APP0, APP14, APP15, COM, EOI, PNG_SIGNATURE, Segment, jpeg_segments, png_chunks

_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


def strip_jpeg(data: bytes) -> bytes:
    """A JPEG without application data, comments, and whatever follows its end.

    JFIF and Adobe headers stay, because they decide what colours the channels are (ITU-T T.872 §6); a JFIF thumbnail
    goes. An ICC profile goes too: use this for sRGB.
    """
    return b"".join([data[:2], *_kept_segments(data)])


def _kept_segments(data: bytes) -> Iterator[bytes]:
    for segment in jpeg_segments(data):
        if _is_metadata(segment):
            continue
        if segment.marker == EOI:
            break
        if segment.marker == APP0:
            yield b"\xff\xe0\0\x10" + segment.payload[:12] + b"\0\0"  # thumbnail of 0 x 0
        else:
            yield data[segment.start : segment.end]
    yield b"\xff\xd9"


def _is_metadata(segment: Segment) -> bool:
    if segment.marker == APP0:
        return not segment.payload.startswith(b"JFIF\0")
    if segment.marker == APP14:
        return not segment.payload.startswith(b"Adobe")
    return segment.marker == COM or APP0 < segment.marker <= APP15


def strip_png(data: bytes) -> bytes:
    """A PNG with nothing but its pixels."""
    kept = (data[start:end] for kind, start, end in png_chunks(data) if kind in _PIXEL_CHUNKS)
    return b"".join([PNG_SIGNATURE, *kept])
