"""Blur kernels. All are square with an odd side, non-negative apart from sinc, sum to 1 and do not move the image."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from scipy.special import j1

from builders.degradations.base import choose, pick, uniform

SIZES = tuple(range(7, 22, 2))
FAMILIES = {
    "iso": 0.45,
    "aniso": 0.25,
    "generalized_iso": 0.12,
    "generalized_aniso": 0.03,
    "plateau_iso": 0.12,
    "plateau_aniso": 0.03,
}
SINC_PROBABILITY = 0.1
BETA_GENERALIZED = (0.5, 4.0)
BETA_PLATEAU = (1.0, 2.0)


def draw_blur(rng: np.random.Generator, sigma: tuple[float, float]) -> dict[str, Any]:
    """Parameters of one Real-ESRGAN blur kernel (realesrgan_dataset.py): sinc with p = 0.1, else a Gaussian family."""
    size = choose(rng, SIZES)
    if rng.random() < SINC_PROBABILITY:
        return draw_sinc(rng, size, np.pi / (3 if size < 13 else 5))
    family = pick(rng, FAMILIES)
    sigma_x = uniform(rng, *sigma)
    params: dict[str, Any] = {"family": family, "size": size, "sigma": [sigma_x, sigma_x], "theta": 0.0}
    if family.endswith("aniso"):
        params |= {"sigma": [sigma_x, uniform(rng, *sigma)], "theta": uniform(rng, -np.pi, np.pi)}
    return params | {"beta": _draw_beta(rng, family)}


def draw_sinc(rng: np.random.Generator, size: int, lowest_cutoff: float) -> dict[str, Any]:
    """Parameters of a sinc kernel whose cut-off frequency lies in [lowest_cutoff, π]."""
    return {"family": "sinc", "size": size, "cutoff": uniform(rng, lowest_cutoff, np.pi)}


def render(params: dict[str, Any]) -> np.ndarray:
    """float32 [size, size] kernel of drawn parameters."""
    if params["family"] == "sinc":
        return sinc(params["cutoff"], params["size"])
    return gaussian_family(params["family"], params["size"], params["sigma"], params["theta"], params["beta"])


def gaussian_family(family: str, size: int, sigma: list[float], theta: float, beta: float) -> np.ndarray:
    """Bivariate kernel with q = xᵀΣ⁻¹x: exp(-q^β / 2) (generalised; β = 1 is Gaussian) or 1 / (1 + q^β) (plateau).

    Source: Real-ESRGAN (Wang et al. 2021), appendix A.
    """
    x, y = _grid(size)
    along = (x * np.cos(theta) + y * np.sin(theta)) / sigma[0]
    across = (-x * np.sin(theta) + y * np.cos(theta)) / sigma[1]
    q = (along**2 + across**2) ** beta
    kernel = 1 / (1 + q) if family.startswith("plateau") else np.exp(-q / 2)
    return _normalised(kernel)


def sinc(cutoff: float, size: int) -> np.ndarray:
    """Circular low-pass ω_c J₁(ω_c r) / (2π r), which rings as sharpening does (Real-ESRGAN, section 3.3)."""
    r = np.hypot(*_grid(size))
    centre = size // 2
    r[centre, centre] = 1
    kernel = cutoff * j1(cutoff * r) / (2 * np.pi * r)
    kernel[centre, centre] = cutoff**2 / (4 * np.pi)
    return _normalised(kernel)


def disk(radius: float) -> np.ndarray:
    """Antialiased disk: the out-of-focus blur of a round aperture. `radius` in pixels."""
    r = np.hypot(*_grid(2 * int(np.ceil(radius)) + 1))
    return _normalised(np.clip(radius + 0.5 - r, 0, 1))


def motion(length: float, angle: float, bend: float = 0.0) -> np.ndarray:
    """Path of a camera moving over `length` pixels in direction `angle` (radians).

    `bend` is the angle by which the direction turns on the way (0: a straight line). The path is centred on its
    centre of mass, so that the blur does not shift the image.
    """
    steps = max(16, 8 * int(np.ceil(length)))
    heading = angle + bend * np.linspace(-0.5, 0.5, steps)
    path = np.cumsum(np.stack([np.cos(heading), np.sin(heading)]), axis=1) * length / steps
    return _rasterised(path - path.mean(axis=1, keepdims=True))


def streak(length: float, width: float, angle: float) -> np.ndarray:
    """A soft line with peak 1: Gaussian profile across (σ = `width`), parabolic fading along. Angle in radians."""
    x, y = _grid(2 * int(np.ceil(length / 2 + 3 * width)) + 1)
    along, across = x * np.cos(angle) + y * np.sin(angle), -x * np.sin(angle) + y * np.cos(angle)
    profile = np.clip(1 - (2 * along / length) ** 2, 0, 1) * np.exp(-((across / width) ** 2) / 2)
    return profile.astype(np.float32)


def _draw_beta(rng: np.random.Generator, family: str) -> float:
    """BasicSR draws the shape from below or above 1 with equal probability."""
    if family in ("iso", "aniso"):
        return 1.0
    low, high = BETA_GENERALIZED if family.startswith("generalized") else BETA_PLATEAU
    return uniform(rng, low, 1) if rng.random() < 0.5 else uniform(rng, 1, high)


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    axis = np.arange(size, dtype=np.float64) - size // 2
    x, y = np.meshgrid(axis, axis)
    return x, y


def _rasterised(path: np.ndarray) -> np.ndarray:
    """Histogram of points [2, N] around the origin, each split bilinearly over its four pixels."""
    half = int(np.ceil(np.abs(path).max())) + 1
    size = 2 * half + 1
    whole = np.floor(path).astype(int)
    fx, fy = path - whole
    kernel = np.zeros((size, size))
    for dx, dy, weight in ((0, 0, (1 - fx) * (1 - fy)), (1, 0, fx * (1 - fy)), (0, 1, (1 - fx) * fy), (1, 1, fx * fy)):
        np.add.at(kernel, (whole[1] + dy + half, whole[0] + dx + half), weight)
    return _normalised(kernel)


def _normalised(kernel: np.ndarray) -> np.ndarray:
    return (kernel / kernel.sum()).astype(np.float32)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Separable Gaussian blur of an image, `sigma` in pixels."""
    return cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
