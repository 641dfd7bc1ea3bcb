"""How a reference sees its photograph: cropped, turned, mirrored, scaled, tilted, and a little off in colour."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from builders.subject_crops.acceptance import Box
from schemas.records import Entity

CONTEXT = 0.1  # of the box's sides, around it
_TURN, _SCALE, _TILT = (4.0, 15.0), (0.6, 0.95), 0.08
_SEEN = 0.4  # least part of an entity's box in a view that shows it
LEAST_SIDE = 48  # pixels of a view

Changes = dict[str, Any]


def draw_changes(rng: np.random.Generator, may_flip: bool) -> Changes:
    """A random set of changes, of which at least one turns or mirrors; plain JSON types.

    `flip` mirrors left to right, `rotate` is in degrees, `scale` a factor, `tilt` the change of size per box width and
    height, `colour` gains of red, green and blue and a factor of saturation.
    """
    turn = round(float(rng.choice([-1, 1]) * rng.uniform(*_TURN)), 2)
    flipped = may_flip and rng.random() < 0.5
    gains = rng.uniform(0.9, 1.1) * rng.uniform(0.98, 1.02, 3)
    drawn: Changes = {
        "flip": True if flipped else None,
        "rotate": turn if not flipped or rng.random() < 0.5 else None,
        "scale": round(float(rng.uniform(*_SCALE)), 3),
        "tilt": [round(float(part), 4) for part in rng.uniform(-_TILT, _TILT, 2)],
        "colour": [round(float(part), 3) for part in (*gains, rng.uniform(0.85, 1.1))],
    }
    left_out = {name for name in ("scale", "tilt", "colour") if rng.random() < 0.5}
    return {name: value for name, value in drawn.items() if value is not None and name not in left_out}


@dataclass(frozen=True)
class View:
    """A projective map from a photograph to a reference of `size` (height, width).

    `matrix` is float [3, 3] on coordinates whose whole numbers are the edges of pixels, like those of boxes.
    """

    matrix: np.ndarray = field(repr=False)
    size: tuple[int, int]

    def warp(self, image: np.ndarray, border: int = cv2.BORDER_REFLECT_101) -> np.ndarray:
        """The picture (any channels) as seen; beyond its borders as OpenCV's `border` says. A mere crop is exact."""
        x, y = (round(float(part)) for part in -self.matrix[:2, 2])
        inside = 0 <= x <= image.shape[1] - self.size[1] and 0 <= y <= image.shape[0] - self.size[0]
        if inside and np.array_equal(self.matrix, _shift(-x, -y)):
            return image[y : y + self.size[0], x : x + self.size[1]].copy()
        centres = _shift(-0.5, -0.5) @ self.matrix @ _shift(0.5, 0.5)
        return cv2.warpPerspective(image, centres, self.size[::-1], flags=cv2.INTER_LINEAR, borderMode=border)

    def warp_alpha(self, alpha: np.ndarray) -> np.ndarray:
        """float [H, W] in 0..1 as seen, 0 beyond the borders of the photograph."""
        return np.clip(self.warp(alpha, cv2.BORDER_CONSTANT), 0, 1)

    def corners(self, box: tuple[float, float, float, float]) -> np.ndarray:
        """float [4, 2]: where the corners of a box go."""
        return _through(self.matrix, box)

    def sees(self, entity: Entity) -> Entity | None:
        """The entity with its box as seen, or None if less than `_SEEN` of it is in the view."""
        corners = self.corners(entity.box)
        (x0, y0), (x1, y1) = corners.min(axis=0), corners.max(axis=0)
        a0, b0, a1, b1 = max(0.0, x0), max(0.0, y0), min(self.size[1], x1), min(self.size[0], y1)
        if a0 >= a1 or b0 >= b1 or (a1 - a0) * (b1 - b0) < _SEEN * (x1 - x0) * (y1 - y0):
            return None
        return entity.model_copy(update={"box": (float(a0), float(b0), float(a1), float(b1)), "mask": {}})


def crop_of(box: Box, size: tuple[int, int], changes: Changes) -> View:
    """A view of a box with its context; without changes it is a plain crop. However it is turned, it shows the box."""
    window = with_context(box, size)
    sides = np.array([window[2] - window[0], window[3] - window[1]], np.float64)
    if not changes.keys() - {"colour"}:
        return View(_shift(-window[0], -window[1]), (int(sides[1]), int(sides[0])))
    scale = _scale(changes, sides)
    change = _change(window, changes, scale)
    width, height = (round(float(part)) for part in np.maximum(scale * sides, np.ptp(_through(change, box), axis=0)))
    return View(_shift(width / 2, height / 2) @ change, (height, width))


def cut_out_of(box: Box, margin: float, changes: Changes) -> View:
    """A view of all of a box, however it is turned, with a margin of `margin` of its sides."""
    change = _change(box, changes, _scale(changes, np.array([box[2] - box[0], box[3] - box[1]])))
    corners = _through(change, box)
    low, extent = corners.min(axis=0), np.ptp(corners, axis=0)
    around = np.ceil(margin * extent)
    width, height = (max(1, round(float(part))) for part in np.ceil(extent) + 2 * around)
    return View(_shift(*(around - low)) @ change, (height, width))


def tint(pixels: np.ndarray, changes: Changes) -> np.ndarray:
    """uint8 RGB with the gains and the saturation of `changes["colour"]`, if there are any."""
    if "colour" not in changes:
        return pixels
    *gains, saturation = changes["colour"]
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
    toned = (gray + saturation * (pixels - gray)) * np.array(gains, np.float32)
    return np.clip(np.rint(toned), 0, 255).astype(np.uint8)


def with_context(box: Box, size: tuple[int, int]) -> Box:
    """The box with `CONTEXT` around it, inside a picture of (height, width)."""
    x0, y0, x1, y1 = box
    dx, dy = round(CONTEXT * (x1 - x0)), round(CONTEXT * (y1 - y0))
    return max(0, x0 - dx), max(0, y0 - dy), min(size[1], x1 + dx), min(size[0], y1 + dy)


def _scale(changes: Changes, sides: np.ndarray) -> float:
    """The drawn scale, unless it would make the shorter side too small."""
    return float(np.clip(changes.get("scale", 1.0), min(1.0, LEAST_SIDE / sides.min()), 1.0))


def _change(box: Box, changes: Changes, scale: float) -> np.ndarray:
    """float [3, 3] around the centre of the box, which goes to (0, 0)."""
    x0, y0, x1, y1 = box
    turn = np.eye(3)
    turn[:2] = cv2.getRotationMatrix2D((0, 0), changes.get("rotate", 0.0), 1.0)
    tilt = np.eye(3)
    tilt[2, :2] = np.array(changes.get("tilt", (0.0, 0.0))) / (scale * (x1 - x0), scale * (y1 - y0))
    size = np.diag([-scale if changes.get("flip") else scale, scale, 1.0])
    return tilt @ size @ turn @ _shift(-(x0 + x1) / 2, -(y0 + y1) / 2)


def _shift(x: float, y: float) -> np.ndarray:
    return np.array([[1.0, 0, x], [0, 1.0, y], [0, 0, 1.0]])


def _through(matrix: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    x0, y0, x1, y1 = box
    corners = np.array([[x0, y0, 1], [x1, y0, 1], [x1, y1, 1], [x0, y1, 1]], np.float64) @ matrix.T
    return corners[:, :2] / corners[:, 2:]
