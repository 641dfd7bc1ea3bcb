"""The perceptual hash: what it must survive, what it must tell apart, and its definition."""

from __future__ import annotations

from itertools import combinations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.fftpack import dct

from filters.scorers.base import ScorerInput, ScorerParams
from filters.scorers.phash import PHash, gray_thumbnail, phash
from schemas.codec import decode_rgb, encode_png
from schemas.records import Captions

RADIUS = 6


def hash_of(pixels: np.ndarray) -> int:
    return phash(gray_thumbnail(pixels))


def distance(a: np.ndarray, b: np.ndarray) -> int:
    return (hash_of(a) ^ hash_of(b)).bit_count()


def recompressed(pixels: np.ndarray) -> np.ndarray:
    _, data = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 50])
    return decode_rgb(data.tobytes())


def halved(pixels: np.ndarray) -> np.ndarray:
    return cv2.resize(pixels, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)


def brighter(pixels: np.ndarray) -> np.ndarray:
    return np.clip(pixels * 1.08 + 4, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("change", [recompressed, halved, brighter])
def test_survives_what_happens_to_copies(photographs, change):
    for name, pixels in photographs.items():
        assert distance(pixels, change(pixels)) <= RADIUS, name


def test_different_photographs_are_far_apart(photographs):
    for a, b in combinations(photographs, 2):
        assert distance(photographs[a], photographs[b]) > 10, (a, b)


def test_bits_are_those_of_the_published_definition(photographs):
    """As imagehash computes it from a 32 x 32 picture: row-major, most significant bit first."""
    for pixels in photographs.values():
        thumbnail = gray_thumbnail(pixels)
        low = dct(dct(thumbnail, axis=0), axis=1)[:8, :8]
        bits = "".join("1" if bit else "0" for bit in (low > np.median(low)).ravel())
        assert f"{phash(thumbnail):064b}" == bits


@given(st.integers(0, 255))
def test_an_even_image_has_only_the_constant_bit(level):
    even = np.full((40, 50, 3), level, np.uint8)
    assert hash_of(even) == (1 << 63 if level else 0)


def test_the_mirrored_image_has_the_mirror_hash(photographs):
    for name, pixels in photographs.items():
        own, mirrored = (
            PHash(ScorerParams()).score([ScorerInput("", encode_png(side), Captions())])[0]
            for side in (pixels, np.ascontiguousarray(pixels[:, ::-1]))
        )
        assert (own["phash"] ^ mirrored["phash_mirror"]).bit_count() <= 1, name
        assert (own["phash"] ^ mirrored["phash"]).bit_count() > RADIUS, name


def test_columns_hold_what_is_scored(photographs):
    scorer = PHash(ScorerParams())
    rows = scorer.score([ScorerInput("", encode_png(p), Captions()) for p in photographs.values()])
    assert all(set(row) == set(scorer.columns) for row in rows)
    assert all(0 <= value < 1 << 64 for row in rows for value in row.values())
