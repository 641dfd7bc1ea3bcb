"""Metadata leaves, pixels stay."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipelines.images import BadImage, normalise
from pipelines.metadata import strip_jpeg, strip_png
from schemas.codec import decode_rgb
from tests.bad_images import PHOTOS, photo

BIG = 1 << 24
SECRETS = (b"GPS-SECRET", b"Ann Author", b"a comment", b"8BIM", b"motion photo", b"DataMining")


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def with_metadata(**options: object) -> bytes:
    """A JPEG with everything that cameras and editors add; the thumbnail in its EXIF is a JPEG of its own."""
    exif = Image.Exif()
    exif[0x013B] = "Ann Author"
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 51.0, 29.0), 3: "E", 4: (2.0, 17.0, 40.0), 29: "GPS-SECRET"})
    file = io.BytesIO()
    photo().save(file, "JPEG", exif=exif, comment=b"a comment", xmp=b"<x:xmpmeta DataMining/>", **options)
    plain, thumbnail = file.getvalue(), io.BytesIO()
    photo().resize((40, 28)).save(thumbnail, "JPEG")
    photoshop = b"Photoshop 3.0\x008BIM" + thumbnail.getvalue()
    app13 = b"\xff\xed" + (2 + len(photoshop)).to_bytes(2, "big") + photoshop
    return plain[:2] + app13 + plain[2:] + b"motion photo" + thumbnail.getvalue()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"subsampling": 2}])
def test_a_passing_jpeg_keeps_its_pixels_and_nothing_else(options):
    data = with_metadata(**options)
    assert all(secret in data for secret in SECRETS)
    result = normalise(data, BIG)
    assert result.changes == ("metadata_removed",)
    assert not any(secret in result.data for secret in SECRETS)
    assert not Image.open(io.BytesIO(result.data)).getexif()
    assert np.array_equal(pixels(result.data), pixels(data))
    assert np.array_equal(decode_rgb(result.data), decode_rgb(data))
    assert normalise(result.data, BIG).changes == () and strip_jpeg(result.data) == result.data


def test_the_scans_are_copied_as_they_are():
    data = with_metadata(progressive=True)
    stripped = strip_jpeg(data)
    frame, end = stripped.index(b"\xff\xdb"), stripped.rindex(b"\xff\xd9")
    assert stripped[frame:end] in data


def test_the_adobe_marker_still_says_that_channels_are_rgb():
    file = io.BytesIO()
    photo().save(file, "JPEG", keep_rgb=True)
    data = file.getvalue()
    stripped = strip_jpeg(data.replace(b"\xff\xd8", b"\xff\xd8\xff\xfe\0\x07hello", 1))
    assert stripped == data and b"Adobe" in data
    assert np.array_equal(pixels(stripped), pixels(data))


@pytest.mark.parametrize("name", sorted(PHOTOS))
def test_photographs_as_they_are_in_the_wild(name):
    data = PHOTOS[name].read_bytes()
    if data.startswith(b"\xff\xd8"):
        assert np.array_equal(pixels(strip_jpeg(data)), pixels(data))


def test_rubbish_between_segments_and_a_missing_end_are_mended():
    clean = strip_jpeg(with_metadata())
    start = clean.index(b"\xff\xdb")
    odd = clean[:start] + b"\0\1rubbish\xff\0\xff" + clean[start:]
    assert strip_jpeg(odd) == clean
    assert strip_jpeg(clean[:-2]) == clean


@settings(max_examples=200)
@given(st.integers(2, 4000), st.integers(0, 255), st.integers(0, 3))
def test_whatever_a_decoder_accepts_it_still_sees_the_same(at, value, more):
    """The segments that libjpeg follows are those that are looked at here, also where they are damaged."""
    data = bytearray(with_metadata(restart_marker_rows=2))
    data[at : at + 1 + more] = bytes([value]) * (1 + more)
    try:
        result = normalise(bytes(data), BIG)
    except BadImage:
        return
    if set(result.changes) <= {"metadata_removed"}:
        assert np.array_equal(pixels(result.data), pixels(bytes(data)))


def test_a_jfif_thumbnail_goes():
    data = strip_jpeg(with_metadata())
    thumbnail = bytes(range(12))
    header = b"\xff\xe0" + (16 + 12).to_bytes(2, "big") + data[6:18] + b"\2\2" + thumbnail
    assert strip_jpeg(data[:2] + header + data[20:]) == data


def test_a_passing_png_keeps_its_pixels_and_nothing_else():
    info, exif, file = PngInfo(), Image.Exif(), io.BytesIO()
    info.add_text("Author", "Ann Author")
    exif[0x013B] = "Ann Author"
    photo().save(file, "PNG", pnginfo=info, exif=exif)
    result = normalise(file.getvalue(), BIG, lossless=True)
    assert result.changes == ("metadata_removed",) and b"Ann Author" not in result.data
    assert np.array_equal(pixels(result.data), pixels(file.getvalue()))
    assert strip_png(result.data) == result.data
