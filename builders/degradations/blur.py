"""Blur: a moving camera, a lens out of focus, or plain softness."""

from __future__ import annotations

import numpy as np

from builders.degradations.base import (
    Degraded,
    filter_image,
    finish,
    length_scale,
    lerp,
    log_lerp,
    pick,
    to_display,
    to_linear,
    uniform,
)
from builders.degradations.kernels import disk, gaussian_blur, motion

KINDS = {"motion": 0.5, "defocus": 0.25, "gaussian": 0.25}
MOTION_LENGTH = (7.0, 41.0)
DEFOCUS_RADIUS = (2.0, 10.0)
GAUSSIAN_SIGMA = (1.0, 8.0)
CURVED_PROBABILITY = 0.4


def blurred(image: np.ndarray, rng: np.random.Generator, severity: float) -> Degraded:
    """Motion over 7–41 px (straight or curved), defocus of radius 2–10 px, or Gaussian of σ 1–8 px.

    Motion and defocus act on linear light, where highlights smear as they do in a camera.
    """
    kind, scale = pick(rng, KINDS), length_scale(image.shape)
    if kind == "gaussian":
        sigma = log_lerp(severity, *GAUSSIAN_SIGMA)
        return finish(gaussian_blur(image, max(0.5, sigma * scale)), severity, kind=kind, sigma=sigma)
    if kind == "defocus":
        radius = lerp(severity, *DEFOCUS_RADIUS)
        kernel = disk(max(1.0, radius * scale))
        return finish(to_display(filter_image(to_linear(image), kernel)), severity, kind=kind, radius=radius)
    length, angle = lerp(severity, *MOTION_LENGTH), uniform(rng, 0, np.pi)
    bend = uniform(rng, -2.5, 2.5) if rng.random() < CURVED_PROBABILITY else 0.0
    kernel = motion(max(3.0, length * scale), angle, bend)
    out = to_display(filter_image(to_linear(image), kernel))
    return finish(out, severity, kind=kind, length=length, angle=angle, bend=bend)
