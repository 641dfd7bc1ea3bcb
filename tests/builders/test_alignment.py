"""Alignment is measured: real shifts are found, real agreement is recognised, nothing is assumed."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.datasets import load_sample_images

from builders.alignment import measure_pair, psnr
from builders.degradations import DEGRADATIONS

PHOTO = cv2.resize(load_sample_images().images[0], (384, 256), interpolation=cv2.INTER_AREA)
EVERYWHERE = np.ones(PHOTO.shape[:2], bool)
BOX = np.zeros(PHOTO.shape[:2], bool)
BOX[60:180, 90:250] = True


def _shifted(dy: int, dx: int) -> np.ndarray:
    return np.roll(PHOTO, (dy, dx), axis=(0, 1))


def test_an_edit_inside_the_mask_is_aligned() -> None:
    target = PHOTO.copy()
    target[BOX] = 255 - target[BOX]
    measure = measure_pair(PHOTO, target, BOX)
    assert measure.aligned
    assert measure.align.model_dump() == {
        "psnr_outside": 100.0,
        "ssim_outside": 1.0,
        "l1_outside": 0.0,
        "shift_px": pytest.approx(0, abs=0.05),
    }
    assert measure.change.l1_inside > 20


@pytest.mark.parametrize(("dy", "dx"), [(1, 0), (0, 1), (2, 1), (-3, 4), (12, -7)])
def test_a_shift_outside_the_mask_is_found(dy: int, dx: int) -> None:
    target = _shifted(dy, dx)
    target[BOX] = 128  # the same filled box in both must not pass for agreement
    source = PHOTO.copy()
    source[BOX] = 128
    measure = measure_pair(source, target, BOX)
    assert not measure.aligned
    assert measure.align.shift_px == pytest.approx(np.hypot(dy, dx), abs=0.75)


@pytest.mark.parametrize("name", ["denoise", "derain", "dehaze", "low_light", "colorize", "jpeg", "color_cast"])
def test_a_global_change_is_judged_by_geometry(name: str) -> None:
    image = PHOTO.astype(np.float32) / 255
    for seed, severity in enumerate((0.1, 0.5, 0.9)):
        pixels = DEGRADATIONS[name](image, np.random.default_rng(seed), severity).pixels
        source = np.rint(pixels * 255).astype(np.uint8)
        measure = measure_pair(source, PHOTO, EVERYWHERE)
        assert measure.aligned and measure.align.shift_px == 0
        assert (measure.align.psnr_outside, measure.align.ssim_outside, measure.align.l1_outside) == (-1, -1, -1)
        moved = measure_pair(np.roll(source, (2, 2), axis=(0, 1)), PHOTO, EVERYWHERE)
        assert not moved.aligned


def test_unrelated_pictures_are_not_aligned() -> None:
    other = cv2.resize(load_sample_images().images[1], (384, 256), interpolation=cv2.INTER_AREA)
    assert not measure_pair(other, PHOTO, EVERYWHERE).aligned
    assert not measure_pair(other, PHOTO, BOX).aligned


def test_without_texture_the_shift_is_unknown() -> None:
    flat = np.full((64, 96, 3), 90, np.uint8)
    whole, part = np.ones((64, 96), bool), np.zeros((64, 96), bool)
    part[10:20, 10:20] = True
    assert measure_pair(flat, flat, whole).align.shift_px == -1
    assert not measure_pair(flat, flat, whole).aligned
    assert measure_pair(flat, flat, part).aligned  # here the pixels themselves agree


def test_metrics_are_the_standard_ones() -> None:
    rng = np.random.default_rng(0)
    noisy = np.clip(PHOTO + rng.normal(0, 12, PHOTO.shape), 0, 255).astype(np.uint8)
    nowhere = np.zeros_like(EVERYWHERE)
    measure = measure_pair(noisy, PHOTO, nowhere).align
    assert measure.psnr_outside == pytest.approx(peak_signal_noise_ratio(PHOTO, noisy), abs=1e-3)
    assert psnr(noisy, PHOTO) == measure.psnr_outside
    grays = [cv2.cvtColor(p, cv2.COLOR_RGB2GRAY) for p in (noisy, PHOTO)]
    expected = structural_similarity(*grays, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    assert measure.ssim_outside == pytest.approx(expected, abs=1e-3)


def test_differences_do_not_wrap_around() -> None:
    """AnyEdit subtracts uint8 arrays: |10 - 20| becomes 246."""
    a, b = (np.full((32, 32, 3), v, np.uint8) for v in (10, 20))
    half = np.zeros((32, 32), bool)
    half[:, :16] = True
    for first, second in ((a, b), (b, a)):
        measure = measure_pair(first, second, half)
        assert measure.align.l1_outside == measure.change.l1_inside == 10


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="differ in size"):
        measure_pair(PHOTO, PHOTO[:-1], EVERYWHERE)
