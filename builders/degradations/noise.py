"""Noise: the random part of a sensor, a scanner or a broken transmission."""

from __future__ import annotations

import numpy as np

from builders.degradations.base import (
    LUMA,
    Degraded,
    finish,
    lerp,
    log_lerp,
    pick,
    to_display,
    to_linear,
    uniform,
)
from builders.degradations.kernels import gaussian_blur

KINDS = {"gaussian": 0.35, "poisson": 0.2, "salt_pepper": 0.1, "speckle": 0.1, "iso": 0.25}
GAUSSIAN_SIGMA = (10.0, 50.0)  # of 255
POISSON_PEAK = (400.0, 25.0)  # photons at white, around the usual 10^2
SALT_PEPPER = (0.01, 0.10)  # share of the pixels, around the usual 5 %
SPECKLE_SIGMA = (0.1, 0.5)
ISO_READ = (0.003, 0.02)  # of full scale, linear light
ISO_SHOT = (0.002, 0.02)


def noisy(image: np.ndarray, rng: np.random.Generator, severity: float) -> Degraded:
    """Gaussian σ 10–50/255 (gray with p = 0.2), Poisson, salt and pepper, speckle, or the noise of a high ISO."""
    kind = pick(rng, KINDS)
    if kind == "gaussian":
        sigma, gray = lerp(severity, *GAUSSIAN_SIGMA), bool(rng.random() < 0.2)
        return finish(add_gaussian(image, rng, sigma, gray), severity, kind=kind, sigma=sigma, gray=gray)
    if kind == "poisson":
        peak = log_lerp(severity, *POISSON_PEAK)
        photons = rng.poisson(image * np.float32(peak))
        return finish(photons.astype(np.float32) / peak, severity, kind=kind, peak=peak)
    if kind == "salt_pepper":
        amount = lerp(severity, *SALT_PEPPER)
        return finish(_salt_pepper(image, rng, amount), severity, kind=kind, amount=amount)
    if kind == "speckle":
        sigma = lerp(severity, *SPECKLE_SIGMA)
        return finish(image * (1 + sigma * _normal(rng, image.shape)), severity, kind=kind, sigma=sigma)
    shot, read, grain = log_lerp(severity, *ISO_SHOT), log_lerp(severity, *ISO_READ), uniform(rng, 0.4, 0.9)
    linear = add_sensor(to_linear(image), rng, shot, read, grain)
    return finish(to_display(linear), severity, kind=kind, shot=shot, read=read, grain=grain)


def add_gaussian(image: np.ndarray, rng: np.random.Generator, sigma: float, gray: bool) -> np.ndarray:
    """Add white noise of standard deviation `sigma` (0..255); `gray` gives all channels the same noise."""
    shape = (*image.shape[:2], 1) if gray else image.shape
    return image + _normal(rng, shape) * np.float32(sigma / 255)


def add_poisson(image: np.ndarray, rng: np.random.Generator, scale: float, gray: bool) -> np.ndarray:
    """Add `scale` times the Poisson noise of an 8-bit photograph (256 photons at white), as Real-ESRGAN does."""
    signal = (image @ LUMA)[..., None] if gray else image
    signal = np.clip(signal, 0, 1)
    noise = rng.poisson(signal * np.float32(256)).astype(np.float32) / 256 - signal
    return image + noise * np.float32(scale)


def add_sensor(linear: np.ndarray, rng: np.random.Generator, shot: float, read: float, grain: float) -> np.ndarray:
    """Add noise of variance `shot`·x + `read`² to linear light, blurred by `grain` pixels as demosaicing does."""
    noise = _normal(rng, linear.shape) * np.sqrt(np.float32(shot) * linear + np.float32(read**2))
    return linear + gaussian_blur(noise, grain)


def _salt_pepper(image: np.ndarray, rng: np.random.Generator, amount: float) -> np.ndarray:
    u = rng.random(image.shape[:2], dtype=np.float32)
    out = image.copy()
    out[u < amount / 2] = 0
    out[u > 1 - amount / 2] = 1
    return out


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)
