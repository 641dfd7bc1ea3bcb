"""Do the source and the target of an edit agree where nothing was edited? Measured on decoded pixels.

* *Outside the mask*: PSNR, SSIM and mean absolute difference; -1 when the mask covers everything.
* *Geometry*: the translation between the two by phase correlation, over the outside of the mask, or over the whole
  picture when the mask covers everything. -1 when there is no texture to compare.
* *Aligned*: for a local change, the outside agrees (PSNR) and is not shifted. For a global change (a degradation, a
  style) pixel values are meant to differ, so only the geometry is judged: "no shift explains the pair better".

What a global change cannot tell: a shift below the resolution that is left, which may pass unnoticed; and what "in
place" means after a strong motion blur, of which about one in four is not called aligned.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy import fft

from schemas.records import UNKNOWN, Alignment, Change

# 30 dB is an RMS difference of 8/255, well inside the 18/255 from which UniWorld-V1 calls a pixel changed.
MIN_PSNR = 30.0
MAX_SHIFT = 0.5
MAX_PSNR = 100.0  # stands for identical pixels: JSON has no infinity
_SSIM_SIGMA, _SSIM_RADIUS = 1.5, 5
# Correlation band (σ of the fine mean, side of the coarse box mean, in px), exponent of the whitening (1 is pure phase
# correlation, which only hears the noise of a degraded picture), and how far below the peak "no shift" may stay after
# a global change. Chosen on photographs under all degradations of this project, against copies shifted by 1-4 px.
_FINE_SIGMA, _COARSE_SIDE = 1.0, 55
_WHITENING = 0.3
_GLOBAL_SLACK = 0.05
_FLAT = 1e-3


@dataclass(frozen=True)
class PairMeasure:
    """What was measured on a pair, in the form in which a sample record keeps it."""

    align: Alignment
    change: Change
    aligned: bool


def measure_pair(source: np.ndarray, target: np.ndarray, mask: np.ndarray) -> PairMeasure:
    """Compare uint8 RGB [H, W, 3] images; `mask` is boolean [H, W], True where they may differ.

    Raises:
        ValueError: the sizes differ.
    """
    if not source.shape == target.shape == (*mask.shape, 3):
        raise ValueError(f"source {source.shape}, target {target.shape} and mask {mask.shape} differ in size")
    outside = ~mask
    is_global = not outside.any()
    # absdiff, because numpy's uint8 subtraction wraps around: |10 - 20| would be 246.
    difference = cv2.absdiff(source, target)
    # A global change has no outside; indexing with a full mask would only copy the picture.
    inner, outer = (difference, difference[:0]) if is_global else (difference[mask], difference[outside])
    before, after = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) for image in (source, target))
    shift = shift_between(before, after, mask, _GLOBAL_SLACK) if is_global else shift_between(before, after, outside)
    align = Alignment(
        psnr_outside=_psnr(outer),
        ssim_outside=_ssim(before, after, outside),
        l1_outside=_mean(outer),
        shift_px=shift,
    )
    unshifted = 0 <= shift <= MAX_SHIFT
    agrees = align.psnr_outside >= MIN_PSNR and (unshifted or shift == UNKNOWN)
    return PairMeasure(align, Change(l1_inside=_mean(inner)), unshifted if is_global else agrees)


def psnr(source: np.ndarray, target: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images in dB, at most 100."""
    return _psnr(cv2.absdiff(source, target))


def shift_between(source: np.ndarray, target: np.ndarray, use: np.ndarray, slack: float = 0.0) -> float:
    """Length in pixels of the translation from `source` to `target`, or -1 if they have no texture.

    Args:
        source, target: float32 luma [H, W], 0..255.
        use: boolean [H, W], where the two are compared.
        slack: the answer is 0 when the correlation at "no shift" is below its peak by no more than this share.

    The correlation is whitened in part (|F|^-0.3) and band-limited; its peak is refined to sub-pixels by a parabola.
    """
    height, width = source.shape
    window = cv2.createHanningWindow((width, height), cv2.CV_32F) * use
    size = fft.next_fast_len(height, real=True), fft.next_fast_len(width, real=True)
    a, b = (fft.rfft2(_band_passed(image, use) * window, size) for image in (source, target))
    cross = b * np.conj(a)
    strength = np.abs(cross)
    if strength.max() <= _FLAT * use.size:
        return UNKNOWN
    surface = fft.irfft2(cross / np.maximum(strength, strength.max() * 1e-6) ** _WHITENING, size)
    if slack and surface[0, 0] >= (1 - slack) * surface.max():
        return 0.0
    return round(float(np.hypot(*_refined_peak(surface))), 3)


def _band_passed(luma: np.ndarray, use: np.ndarray) -> np.ndarray:
    """Difference of a fine and a coarse local mean taken over `use` only, so that the mask's outline leaves no edge."""
    weight = use.astype(np.float32)
    fine, coarse = (mean(luma * weight) / np.maximum(mean(weight), 1e-3) for mean in (_fine, _coarse))
    return fine - coarse


def _fine(image: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), _FINE_SIGMA, borderType=cv2.BORDER_REFLECT)


def _coarse(image: np.ndarray) -> np.ndarray:
    return cv2.blur(image, (_COARSE_SIDE, _COARSE_SIDE), borderType=cv2.BORDER_REFLECT)


def _refined_peak(surface: np.ndarray) -> tuple[float, float]:
    """Position of the maximum of a periodic surface as signed offsets from [0, 0]."""
    peak = np.unravel_index(int(surface.argmax()), surface.shape)
    row, column = surface[:, peak[1]], surface[peak[0]]
    return _refined(row, int(peak[0])), _refined(column, int(peak[1]))


def _refined(line: np.ndarray, i: int) -> float:
    n = len(line)
    left, centre, right = line[i - 1], line[i], line[(i + 1) % n]
    curvature = left - 2 * centre + right
    return (i if i <= n // 2 else i - n) + (0.5 * float((left - right) / curvature) if curvature else 0.0)


def _ssim(before: np.ndarray, after: np.ndarray, outside: np.ndarray) -> float:
    """Mean SSIM (Wang et al. 2004: 11x11 Gaussian window, σ 1.5) of luma, over windows that lie outside the mask."""
    kernel = np.ones((2 * _SSIM_RADIUS + 1,) * 2, np.uint8)
    whole = cv2.erode(outside.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0).astype(bool)
    if not whole.any():
        return UNKNOWN
    mean_a, mean_b = _windowed(before), _windowed(after)
    var_a, var_b = _windowed(before**2) - mean_a**2, _windowed(after**2) - mean_b**2
    covariance = _windowed(before * after) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ssim = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    ssim /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return round(float(ssim[whole].mean()), 4)


def _windowed(image: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(image, (2 * _SSIM_RADIUS + 1,) * 2, _SSIM_SIGMA)


def _psnr(difference: np.ndarray) -> float:
    if not difference.size:
        return UNKNOWN
    mse = float(np.square(difference, dtype=np.float32).mean(dtype=np.float64))
    return MAX_PSNR if mse == 0 else round(min(MAX_PSNR, 10 * np.log10(255**2 / mse)), 4)


def _mean(difference: np.ndarray) -> float:
    return round(float(difference.mean(dtype=np.float64)), 4) if difference.size else UNKNOWN
