"""What a degradation is, and the few helpers that all of them share.

A degradation is a pure function `(image, rng, severity) -> Degraded`: float32 RGB [H, W, 3] in [0, 1] in, the same
size and range out. `severity` in [0, 1] sets the strength inside the range that the docstring states; everything else
is drawn from `rng`. Lengths in pixels are meant at a short side of 512 px and grow with the image, so that a rain
streak or a brush stroke covers the same part of a thumbnail and of a 4-megapixel photograph; the parameters are
stored as drawn, before that scaling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import cv2
import numpy as np

REFERENCE_SIDE = 512
DISPLAY_GAMMA = 2.2
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # BT.601
T = TypeVar("T")


@dataclass(frozen=True)
class Degraded:
    """A degraded image.

    Args:
        pixels: float32 [H, W, 3] in [0, 1], same size as the original.
        params: what was drawn, plain JSON types.
        severity: strength in [0, 1].
        hole: boolean [H, W], True where the original is gone; None when the whole image is degraded.
        wording: suffix of the template name when this kind needs its own words, e.g. "hints".
        fields: values for the placeholders of the templates.
    """

    pixels: np.ndarray
    params: dict[str, Any]
    severity: float
    hole: np.ndarray | None = None
    wording: str = ""
    fields: dict[str, str] = field(default_factory=dict)


def finish(pixels: np.ndarray, severity: float, **params: Any) -> Degraded:
    """A whole-image degradation, clipped to [0, 1]."""
    return Degraded(np.clip(pixels, 0, 1).astype(np.float32, copy=False), params, severity)


# Drawn values are rounded *before* they are used: what is stored is exactly what was applied.
def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number in [low, high] with four decimals."""
    return round(float(rng.uniform(low, high)), 4)


def lerp(severity: float, low: float, high: float) -> float:
    """`low` at severity 0, `high` at severity 1, with four decimals."""
    return round(low + (high - low) * severity, 4)


def log_lerp(severity: float, low: float, high: float) -> float:
    """As `lerp`, on a logarithmic scale: equal steps of severity multiply the value by equal factors."""
    return round(float(low * (high / low) ** severity), 4)


def pick(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    """One of the names, with probability proportional to its weight."""
    names, bounds = list(weights), np.cumsum(list(weights.values()))
    return names[min(int(np.searchsorted(bounds, rng.random() * bounds[-1], side="right")), len(names) - 1)]


def choose(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


def length_scale(shape: tuple[int, ...]) -> float:
    """Factor from reference pixels (short side 512) to pixels of an image of that shape."""
    return min(shape[:2]) / REFERENCE_SIDE


def to_linear(image: np.ndarray) -> np.ndarray:
    """Display values to linear light with the plain 2.2 power law."""
    return cv2.pow(image, DISPLAY_GAMMA)


def to_display(linear: np.ndarray) -> np.ndarray:
    """Linear light, clipped to [0, 1], to display values."""
    return cv2.pow(np.clip(linear, 0, 1), 1 / DISPLAY_GAMMA)


def filter_image(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Correlate with a kernel of any size; the border is reflected, so that no dark frame appears."""
    return cv2.filter2D(image, cv2.CV_32F, kernel.astype(np.float32), borderType=cv2.BORDER_REFLECT)
