"""What stands behind a subject that was cut out: a plain colour, a drawn texture, or another part of a photograph."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from builders.base import Rejected
from builders.edit_pairs.claims import outline_contrast
from builders.edit_pairs.edit import paste
from builders.subject_crops.acceptance import Box

# Names that an instruction can use.
PLAIN: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "light grey": (208, 208, 208),
    "grey": (128, 128, 128),
    "black": (0, 0, 0),
    "light blue": (176, 208, 235),
}
_CLEAR = 6.0  # CIE76, median across the outline: less is hard to see
_TRIES = 24


def plain(size: tuple[int, int], colour: tuple[int, ...]) -> np.ndarray:
    """uint8 RGB [H, W, 3] of one colour."""
    return np.full((*size, 3), colour, np.uint8)


def any_colour(rng: np.random.Generator) -> tuple[int, ...]:
    """A colour that is neither neon nor black."""
    hsv = np.array([[[rng.uniform(0, 360), rng.uniform(0.1, 0.6), rng.uniform(0.4, 0.95)]]], np.float32)
    return tuple(round(255 * float(part)) for part in cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0])


def texture(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of several octaves between two colours, uint8 RGB."""
    height, width = size
    field = np.zeros(size, np.float32)
    first = int(rng.integers(2, 5))
    for octave in range(int(rng.integers(2, 6))):
        cells = first << octave
        coarse = rng.random((min(cells, height), min(cells, width)), np.float32)
        field += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) / 2**octave
    share = ((field - field.min()) / max(float(np.ptp(field)), 1e-6))[..., None]
    one, other = (np.array(any_colour(rng), np.float32) for _ in range(2))
    return np.rint(share * one + (1 - share) * other).astype(np.uint8)


def region(pixels: np.ndarray, taken: Box, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray | None:
    """A part of a photograph outside of the box `taken`, enlarged to (height, width) if need be and softened a little.

    None if no such part was found.
    """
    height, width = pixels.shape[:2]
    shape = size[0] / size[1]
    for _ in range(_TRIES):
        w = float(rng.uniform(0.25, 0.6)) * min(width, height / shape)
        h = w * shape
        x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
        if x + w <= taken[0] or x >= taken[2] or y + h <= taken[1] or y >= taken[3]:
            part = pixels[int(y) : int(y + h) + 1, int(x) : int(x + w) + 1]
            resized = cv2.resize(part, size[::-1], interpolation=cv2.INTER_LINEAR)
            return cv2.GaussianBlur(resized, (0, 0), max(1.0, float(rng.uniform(0.004, 0.02)) * max(size)))
    return None


def first_visible(
    cut_out: np.ndarray, alpha: np.ndarray, backgrounds: Sequence[tuple[str, np.ndarray]]
) -> tuple[np.ndarray, str] | Rejected:
    """The cut-out (uint8 RGB, by alpha) over the first background, named, on which its outline can be seen."""
    contrast = 0.0
    for name, background in backgrounds:
        pixels, _ = paste(background, cut_out, alpha)
        edge = outline_contrast(pixels, alpha > 0.5) if (alpha > 0.5).any() else np.zeros(0)
        contrast = float(np.median(edge)) if edge.size else 0.0
        if contrast >= _CLEAR:
            return pixels, name
    return Rejected("hard_to_see", contrast)
