"""What the pixels say: each column reacts to its own fault, and to nothing that a photograph naturally has."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.calibration import faults
from filters.calibration.faults import to_jpeg
from filters.scorers.base import ScorerInput, ScorerParams
from filters.scorers.pixels import Pixels, at_reference_size, blur, letterbox, measure, noise
from schemas.codec import decode_rgb, encode_png
from schemas.records import Captions


def resaved(pixels: np.ndarray, quality: int = 80) -> np.ndarray:
    return decode_rgb(to_jpeg(pixels, quality))


def gray(pixels: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32)


def test_columns_hold_what_is_scored(photographs):
    scorer = Pixels(ScorerParams())
    items = [ScorerInput("", encode_png(p), Captions()) for p in photographs.values()]
    rows = scorer.score(items)
    assert rows == scorer.score(items)
    for row in rows:
        assert list(row) == list(scorer.columns)
        assert np.isfinite(list(row.values())).all()
        assert all(0 <= row[name] <= 1 for name in ("flatness", "letterbox", "collage", "qr"))


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((1, 1, 3), np.uint8), np.full((3, 200, 3), 255, np.uint8), np.zeros((17, 16, 3), np.uint8)],
    ids=["one pixel", "a strip", "just over one block"],
)
def test_tiny_and_even_images_have_values(pixels):
    assert np.isfinite(list(measure(pixels).values())).all()


@pytest.mark.parametrize("sigma", [2.0, 3.0, 4.0])
def test_blur_is_the_sigma_of_the_gaussian(sigma):
    """On a disk, which has edges in every direction."""
    disk = cv2.circle(np.full((256, 256), 40, np.float32), (128, 128), 80, 200.0, -1)
    assert blur(cv2.GaussianBlur(disk, (0, 0), sigma)) == pytest.approx(sigma, rel=0.2)


def test_blur_does_not_depend_on_contrast(photographs):
    for name, pixels in photographs.items():
        assert blur(np.round(gray(pixels) * 0.5)) == pytest.approx(blur(gray(pixels)), abs=0.25), name


def test_motion_in_any_direction_is_blur(photographs):
    kernel = np.zeros((21, 21), np.float32)
    kernel[10] = 1 / 21
    for name in ("coffee", "china", "motorcycle"):
        for turned in (kernel, kernel.T):
            assert blur(gray(cv2.filter2D(photographs[name], -1, turned))) > blur(gray(photographs[name])) + 0.4


@given(st.floats(4, 30))
def test_noise_is_its_standard_deviation(sigma):
    even = np.full((256, 256), 128, np.float32)
    noisy = even + np.random.default_rng(0).normal(0, sigma, even.shape).astype(np.float32)
    assert noise(noisy) == pytest.approx(sigma, rel=0.15)


def test_columns_of_one_picture_do_not_depend_on_its_resolution():
    """A 1024 px picture and its area-averaged half are scored the same, but for `detail`."""
    import skimage.data

    large = cv2.resize(skimage.data.retina(), (1024, 1024), interpolation=cv2.INTER_AREA)
    rows = [measure(p) for p in (large, at_reference_size(large))]
    assert {k: v for k, v in rows[0].items() if k != "detail"} == {k: v for k, v in rows[1].items() if k != "detail"}


def test_detail_falls_when_a_picture_was_scaled_up(photographs):
    for name, pixels in photographs.items():
        half = cv2.resize(pixels, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        doubled = cv2.resize(half, pixels.shape[1::-1], interpolation=cv2.INTER_CUBIC)
        assert measure(doubled)["detail"] < measure(pixels)["detail"] - 3, name


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (20, 120, 90)])
@pytest.mark.parametrize("sides", [(1, 1, 0, 0), (0, 0, 1, 1), (1, 0, 0, 0), (1, 1, 1, 1)])
def test_letterbox_measures_bars_after_jpeg(photographs, colour, sides):
    for name in ("cat", "coffee", "china"):
        top, bottom, left, right = (20 * side for side in sides)
        boxed = cv2.copyMakeBorder(photographs[name], top, bottom, left, right, cv2.BORDER_CONSTANT, value=colour)
        share = 1 - photographs[name].size / boxed.size
        assert letterbox(resaved(boxed)) == pytest.approx(share, abs=0.03), name


def test_photographs_have_no_bars(photographs):
    """Among them a night sky, a blue one, and a retina on black."""
    for name, pixels in photographs.items():
        assert letterbox(resaved(pixels)) == 0, name


def test_a_product_on_white_has_no_bars():
    sheet = np.full((300, 300, 3), 255, np.uint8)
    cv2.circle(sheet, (150, 150), 100, (200, 30, 30), -1)
    assert letterbox(resaved(sheet)) == 0


@pytest.mark.parametrize("gutter", [0, 6])
def test_a_collage_has_a_seam(photographs, gutter):
    left, right = (cv2.resize(photographs[name], (128, 200)) for name in ("cat", "motorcycle"))
    sheet = np.hstack([left, np.full((200, gutter, 3), 255, np.uint8), right])
    for pixels in (sheet, sheet.swapaxes(0, 1)):
        assert measure(resaved(np.ascontiguousarray(pixels)))["collage"] > 0.45


def test_photographs_have_no_seam(photographs):
    for name, pixels in photographs.items():
        assert measure(pixels)["collage"] < 0.4, name


def test_qr_code_is_its_share_of_the_area(photographs):
    code = cv2.resize(cv2.QRCodeEncoder.create().encode("https://example.org"), (120, 120), interpolation=0)
    for name in ("astronaut", "cat", "coffee"):
        pixels = photographs[name].copy()
        assert measure(pixels)["qr"] == 0
        pixels[20:140, 30:150] = code[..., None]
        share = 120 * 120 / (pixels.shape[0] * pixels.shape[1])
        assert 0.5 * share < measure(pixels)["qr"] <= 1.05 * share  # the quiet zone does not count


def test_a_placeholder_is_flat_and_has_no_entropy(photographs):
    sheet = faults.placeholder(photographs["cat"], np.random.default_rng(0), [])
    row = measure(sheet)
    assert row["flatness"] > 0.9 and row["entropy"] < 1
