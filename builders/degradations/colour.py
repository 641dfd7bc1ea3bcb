"""Colour: lost, tinted or washed out."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np

from builders.degradations.base import (
    LUMA,
    Degraded,
    finish,
    length_scale,
    lerp,
    log_lerp,
    pick,
    to_display,
    to_linear,
    uniform,
)

HINTS_BELOW = 0.25  # severities in which colour hints are left
HINTS = (160.0, 8.0)
GRAY_KINDS = {"gray": 0.55, "lab": 0.2, "sepia": 0.25}
# The usual sepia tone of a luminance of 1, before clipping.
SEPIA = np.array([1.35, 1.20, 0.94], dtype=np.float32)
CAST = (1.15, 2.2)
CONTRAST = (0.8, 0.2)


def colourless(image: np.ndarray, rng: np.random.Generator, severity: float) -> Degraded:
    """A monochrome picture: gray with random channel weights, CIE L*, or sepia; below severity 0.25 with colour hints.

    Severity is how little of the original the picture tells: hints become fewer, and the film's channel weights
    depart from luminance towards a single channel (orthochromatic film does not see red, for example).
    """
    if severity < HINTS_BELOW:
        count = round(log_lerp(severity / HINTS_BELOW, *HINTS))
        hinted = _with_hints(image, gray(image, LUMA), rng, count)
        return replace(finish(hinted, severity, kind="hints", count=count), wording="hints")
    kind = pick(rng, GRAY_KINDS)
    if kind == "lab":
        light = cv2.cvtColor(image, cv2.COLOR_RGB2Lab)[..., :1] / 100
        return finish(np.repeat(light, 3, axis=2), severity, kind=kind)
    single = int(rng.integers(3))
    mix = lerp((severity - HINTS_BELOW) / (1 - HINTS_BELOW), 0, 0.9)
    weights = [round(float(w), 4) for w in (1 - mix) * LUMA + mix * np.eye(3)[single]]
    plain = gray(image, np.array(weights, np.float32))
    if kind == "gray":
        return finish(plain, severity, kind=kind, weights=weights)
    tone = lerp(severity, 0.3, 1)
    sepia = plain * (1 - tone + tone * SEPIA)
    return replace(finish(sepia, severity, kind=kind, weights=weights, tone=tone), wording="sepia")


def cast(image: np.ndarray, rng: np.random.Generator, severity: float) -> Degraded:
    """Wrong white balance: gains on linear light, along warm–cold and green–magenta, up to a factor 2.2 apart."""
    spread = log_lerp(severity, *CAST)
    angle = uniform(rng, -np.pi, np.pi)
    warm, tint = np.cos(angle) * np.log(spread), 0.5 * np.sin(angle) * np.log(spread)
    relative = np.exp([warm / 2 - tint / 2, tint, -warm / 2 - tint / 2])
    gains = [round(float(g), 4) for g in relative / (relative @ LUMA)]
    out = to_display(to_linear(image) * np.array(gains, np.float32))
    return finish(out, severity, spread=spread, angle=angle, gains=gains)


def flat(image: np.ndarray, rng: np.random.Generator, severity: float) -> Degraded:
    """Contrast of 80–20 % around a level of 0.35–0.65, with part of the saturation lost as well."""
    contrast, level, saturation = lerp(severity, *CONTRAST), uniform(rng, 0.35, 0.65), uniform(rng, 0.6, 1.0)
    plain = gray(image, LUMA)
    out = level + (plain + (image - plain) * np.float32(saturation) - level) * np.float32(contrast)
    return finish(out, severity, contrast=contrast, level=level, saturation=saturation)


def gray(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weighted sum of the channels, in all three channels."""
    return cv2.cvtColor(image @ weights, cv2.COLOR_GRAY2RGB)


def _with_hints(image: np.ndarray, plain: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """Put small squares of the original's local mean colour onto the gray image."""
    height, width = image.shape[:2]
    half = max(1, round(4 * length_scale(image.shape)))
    local = cv2.blur(image, (2 * half + 1, 2 * half + 1), borderType=cv2.BORDER_REFLECT)
    rows, columns = rng.integers(height, size=count), rng.integers(width, size=count)
    out = plain.copy()
    for y, x in zip(rows.tolist(), columns.tolist(), strict=True):
        out[max(0, y - half) : y + half + 1, max(0, x - half) : x + half + 1] = local[y, x]
    return out
