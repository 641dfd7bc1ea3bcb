"""Weather: rain, snow and haze between the camera and the scene."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from builders.degradations.base import Degraded, choose, filter_image, finish, length_scale, lerp, log_lerp, uniform
from builders.degradations.kernels import gaussian_blur, streak

RAIN_AMOUNT = (40.0, 200.0)  # hundredths of 1/256 of the pixels start a streak
RAIN_LENGTH = (30.0, 40.0)
RAIN_WIDTHS = (3, 5, 7, 9, 11)  # side of the Gaussian kernel across a streak
RAIN_ANGLE = (-45.0, 45.0)  # degrees from vertical
RAIN_VEIL = (0.02, 0.25)
# Per layer of flakes, from far to near: radius in px, flakes per 100 x 100 px at full density, opacity.
SNOW_LAYERS = ((0.8, 60.0, 0.7), (1.6, 16.0, 0.9), (3.0, 4.0, 0.95), (6.0, 0.9, 0.8), (10.0, 0.2, 0.6))
SNOW_DENSITY = (0.3, 2.0)
SNOW_VEIL = (0.05, 0.35)
HAZE_BETA = (0.6, 1.8)
AIRLIGHT = (0.7, 1.0)
AIRLIGHT_TINT = 0.05


def rainy(image: np.ndarray, rng: np.random.Generator, severity: float) -> Degraded:
    """Streaks of length 30–40 px within 45° of vertical, added to the picture, over a thin veil.

    Two layers: fine dense rain behind, the drawn width in front (VisualCloze draws one).
    """
    amount, length = lerp(severity, *RAIN_AMOUNT), uniform(rng, *RAIN_LENGTH)
    width, angle = choose(rng, RAIN_WIDTHS), uniform(rng, *RAIN_ANGLE)
    strength, veil = uniform(rng, 0.45, 0.8), uniform(rng, RAIN_VEIL[0], lerp(severity, 0.08, RAIN_VEIL[1]))
    density = amount / 100 / 256
    far = _streaks(image.shape, rng, density=0.6 * density, length=0.6 * length, width=3, angle=angle)
    near = _streaks(image.shape, rng, density=1.2 * density / width, length=length, width=width, angle=angle)
    light = (0.5 * far + near)[..., None] * np.float32(strength)
    out = _veiled(image, veil, 0.85) + light
    shape = {"length": length, "width": width, "angle": angle}
    return finish(out, severity, amount=amount, strength=strength, veil=veil, **shape)


def snowy(image: np.ndarray, rng: np.random.Generator, severity: float) -> Degraded:
    """Flakes in five layers from far (small, many) to near (large, few, out of focus), falling along one direction."""
    density, veil = log_lerp(severity, *SNOW_DENSITY), uniform(rng, SNOW_VEIL[0], lerp(severity, 0.1, SNOW_VEIL[1]))
    angle, fall = uniform(rng, 60, 120), uniform(rng, 0.5, 2.5)
    out = _veiled(image, veil, 0.9)
    for radius, flakes, opacity in SNOW_LAYERS:
        alpha = _flakes(image.shape, rng, density=flakes / 1e4 * density, radius=radius, fall=fall, angle=angle)
        out += (np.float32(0.97) - out) * (alpha * np.float32(opacity))[..., None]
    return finish(out, severity, density=density, veil=veil, angle=angle, fall=fall)


def hazy(image: np.ndarray, rng: np.random.Generator, severity: float, depth: np.ndarray | None = None) -> Degraded:
    """I = J·t + A·(1 - t), t = exp(-β·d) with β 0.6–1.8 and d the distance in [0, 1] (atmospheric scattering, RESIDE).

    Args:
        image, rng, severity: as everywhere.
        depth: uint16 inverse depth [h, w] of the image (larger is nearer, 0 unknown). Without it a ground plane
            below a horizon is assumed, or one distance for the whole picture.
    """
    beta, airlight = lerp(severity, *HAZE_BETA), uniform(rng, *AIRLIGHT)
    # Haze is bluish or yellowish, never green or pink: the tint is opposite in red and blue.
    tint = uniform(rng, -AIRLIGHT_TINT, AIRLIGHT_TINT)
    colour = [round(min(1.0, airlight + shift), 4) for shift in (tint, 0.3 * tint, -tint)]
    if depth is not None and depth.any():
        distance, geometry = _distance(depth, image.shape), {"kind": "depth"}
    else:
        distance, geometry = _plane(image.shape, rng)
    t = np.exp(np.float32(-beta) * distance)[..., None]
    out = image * t + np.array(colour, np.float32) * (1 - t)
    return finish(out, severity, beta=beta, airlight=colour, geometry=geometry)


def _veiled(image: np.ndarray, veil: float, brightness: float) -> np.ndarray:
    """Blend towards one bright gray."""
    return image * np.float32(1 - veil) + np.float32(veil * brightness)


def _streaks(
    shape: tuple[int, ...], rng: np.random.Generator, *, density: float, length: float, width: int, angle: float
) -> np.ndarray:
    """float32 [H, W] rain in [0, 1]; `density` is streaks per reference pixel, `angle` in degrees from vertical."""
    scale = length_scale(shape)
    sigma = 0.3 * ((width - 1) / 2 - 1) + 0.8  # OpenCV's σ for a Gaussian kernel of that side
    kernel = streak(max(4.0, length * scale), max(0.5, 0.5 * sigma * scale), np.deg2rad(90 + angle))
    return np.minimum(filter_image(_seeds(shape, rng, density / scale**2), kernel), 1)


def _flakes(
    shape: tuple[int, ...], rng: np.random.Generator, *, density: float, radius: float, fall: float, angle: float
) -> np.ndarray:
    """float32 [H, W] opacity of one layer of snow flakes in [0, 1]."""
    scale = length_scale(shape)
    size = max(0.5, radius * scale)
    kernel = streak(max(1.5, (2 + fall) * size), 0.6 * size, np.deg2rad(angle))
    return np.minimum(filter_image(_seeds(shape, rng, density / scale**2), kernel), 1)


def _seeds(shape: tuple[int, ...], rng: np.random.Generator, density: float) -> np.ndarray:
    """Sparse points whose strength is mostly low and rarely full."""
    u = rng.random(shape[:2], dtype=np.float32)
    density = min(density, 0.2)
    return np.where(u < density, 0.25 + 0.75 * (u / np.float32(density)) ** 2, 0).astype(np.float32)


def _distance(depth: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Distance in [0, 1] from inverse depth: unknown pixels take the nearest known value, outliers are cut."""
    inverse = _filled(depth).astype(np.float32)
    near, far = np.percentile(inverse, (99, 1))
    distance = np.clip((near - inverse) / max(near - far, 1), 0, 1)
    resized = cv2.resize(distance, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)
    return gaussian_blur(resized, max(0.5, 2 * length_scale(shape)))


def _filled(depth: np.ndarray) -> np.ndarray:
    unknown = (depth == 0).astype(np.uint8)
    if not unknown.any():
        return depth
    _, labels = cv2.distanceTransformWithLabels(unknown, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    values = np.zeros(labels.max() + 1, depth.dtype)
    values[labels[unknown == 0]] = depth[unknown == 0]
    return values[labels]


def _plane(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
    """Distance [H, W] without a depth map: inverse depth of a ground plane is linear below its horizon."""
    height, width = shape[:2]
    if rng.random() < 0.3:
        level = uniform(rng, 0.5, 1)
        return np.full((height, width), level, np.float32), {"kind": "constant", "distance": level}
    horizon, tilt = uniform(rng, 0.05, 0.5), uniform(rng, -0.15, 0.15)
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None]
    inverse = (y + np.float32(tilt) * x - horizon) / (1 - horizon)
    return 1 - np.clip(inverse, 0, 1), {"kind": "plane", "horizon": horizon, "tilt": tilt}
