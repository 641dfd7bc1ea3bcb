"""Holes: parts of the picture that are gone, inside it (inpainting) or around it (outpainting)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cv2
import numpy as np

from builders.degradations.base import Degraded, choose, length_scale, lerp, pick, uniform

INPAINT_AREA = (0.05, 0.60)
OUTPAINT_WINDOW = (0.30, 0.80)
KINDS = {"strokes": 0.3, "thick": 0.25, "boxes": 0.15, "blob": 0.1, "object": 0.3}
STROKE_WIDTH = (10.0, 20.0)
FILLS = {"gray": 0.4, "black": 0.2, "white": 0.2, "noise-filled": 0.2}
_LEVELS = {"gray": 0.5, "black": 0.0, "white": 1.0}
_AREA_TOLERANCE = 1.1
# A hole that looks like the picture around it cannot be found by who must fill it.
_VISIBLE_DIFFERENCE = 0.12
_VISIBLE_SHARE = 0.6
_STRIDE = 4  # a sixteenth of the pixels is enough to see that

Add = Callable[[np.ndarray, np.random.Generator, float], None]


def with_hole(
    image: np.ndarray, rng: np.random.Generator, severity: float, masks: Sequence[np.ndarray] = ()
) -> Degraded:
    """A hole over 5–60 % of the picture: free-form strokes, thick irregular shapes, boxes, blobs or object shapes.

    Args:
        image, rng, severity: as everywhere; severity is the share of the area range.
        masks: boolean masks of objects, of any size. They lend their outline only: they are scaled, mirrored and
            moved, so that the hole does not give away where an object was.
    """
    kinds = {kind: weight for kind, weight in KINDS.items() if kind != "object" or len(masks)}
    kind = pick(rng, kinds)
    low, high = INPAINT_AREA
    goal = lerp(severity, low * _AREA_TOLERANCE, high / _AREA_TOLERANCE)
    hole = draw_hole(kind, image.shape, rng, goal, masks)
    area = float(hole.mean())
    return _punched(image, hole, rng, _share(area, low, high), kind=kind, area=round(area, 4))


def with_border(image: np.ndarray, rng: np.random.Generator, severity: float) -> Degraded:
    """Only a window of 30–80 % of the area is left, of any aspect, anywhere; the rest is padding."""
    height, width = image.shape[:2]
    low, high = OUTPAINT_WINDOW
    goal = lerp(severity, high - 0.01, low + 0.01)
    # Relative width and height multiply to the goal and stay below 1; the ends of the range touch two sides.
    stretch = float(np.clip(uniform(rng, -0.6, 0.6), -0.5, 0.5))
    w, h = goal ** (0.5 - stretch), goal ** (0.5 + stretch)
    size = max(1, round(h * height)), max(1, round(w * width))
    top, left = _anywhere(rng, height - size[0]), _anywhere(rng, width - size[1])
    hole = np.ones((height, width), bool)
    hole[top : top + size[0], left : left + size[1]] = False
    kept = 1 - float(hole.mean())
    window = [left, top, left + size[1], top + size[0]]
    return _punched(image, hole, rng, _share(kept, high, low), window=window, area=round(1 - kept, 4))


def draw_hole(
    kind: str,
    shape: tuple[int, ...],
    rng: np.random.Generator,
    goal: float,
    masks: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """Boolean [H, W] hole of that kind over about `goal` of the area (within 10 %, as far as the pixels allow).

    Shapes are added until the goal is reached; one that overshoots is taken back, and the next ones are smaller.
    """
    add: dict[str, Add] = {
        "strokes": _add_stroke,
        "thick": _add_thick,
        "boxes": partial(_add_box, goal=goal),
        "blob": partial(_add_blob, goal=goal),
        "object": partial(_add_object, goal=goal, masks=masks),
    }
    hole = np.zeros(shape[:2], np.uint8)
    size = 1.0
    for _ in range(400):
        trial = hole.copy()
        add[kind](trial, rng, size)
        area = cv2.countNonZero(trial) / trial.size
        if area > goal * _AREA_TOLERANCE:
            size *= 0.85
            continue
        hole = trial
        if area >= goal / _AREA_TOLERANCE:
            break
    return hole.astype(bool)


def _add_stroke(canvas: np.ndarray, rng: np.random.Generator, size: float) -> None:
    """One brush stroke that wanders with small turns (DeepFill's free-form masks)."""
    width = rng.uniform(*STROKE_WIDTH) * length_scale(canvas.shape) * size
    _walk(canvas, rng, width=width, step=rng.uniform(0.05, 0.15) * size, turns=int(rng.integers(4, 12)), bend=0.7)


def _add_thick(canvas: np.ndarray, rng: np.random.Generator, size: float) -> None:
    """A few long, broad and sharply turning strokes (LaMa's thick irregular masks)."""
    width = rng.uniform(0.08, 0.3) * min(canvas.shape) * size
    _walk(canvas, rng, width=width, step=rng.uniform(0.1, 0.5) * size, turns=int(rng.integers(1, 5)), bend=2.0)


def _walk(canvas: np.ndarray, rng: np.random.Generator, *, width: float, step: float, turns: int, bend: float) -> None:
    """Draw a round-capped random walk: `step` as a share of the short side, `bend` as σ of the turns in radians."""
    height, wide = canvas.shape
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, bend, turns))
    steps = step * min(canvas.shape) * rng.uniform(0.5, 1.5, turns)
    offsets = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], axis=1) * steps[:, None], axis=0)
    start = rng.uniform(0, 1, 2) * (wide, height)
    points = np.rint(np.concatenate([start[None], start + offsets])).astype(np.int32)
    cv2.polylines(canvas, [points], isClosed=False, color=1, thickness=max(1, round(width)))


def _add_box(canvas: np.ndarray, rng: np.random.Generator, size: float, goal: float) -> None:
    height, width = canvas.shape
    area, aspect = goal * rng.uniform(0.3, 1) * size, np.exp(rng.uniform(-0.7, 0.7))
    h = min(height, max(1, round(height * np.sqrt(area / aspect))))
    w = min(width, max(1, round(width * np.sqrt(area * aspect))))
    top, left = _anywhere(rng, height - h), _anywhere(rng, width - w)
    canvas[top : top + h, left : left + w] = 1


def _add_blob(canvas: np.ndarray, rng: np.random.Generator, size: float, goal: float) -> None:
    """A closed smooth outline: radius as a random Fourier series of the angle."""
    angle = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    order = np.arange(1, 6)
    amplitude, phase = rng.normal(0, 0.28, 5) / order, rng.uniform(0, 2 * np.pi, 5)
    radius = np.exp((amplitude[:, None] * np.cos(order[:, None] * angle + phase[:, None])).sum(axis=0))
    radius *= np.sqrt(goal * rng.uniform(0.3, 1) * size * canvas.size / np.pi)
    centre = rng.uniform(0.1, 0.9, 2) * canvas.shape[::-1]
    outline = centre + np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None]
    cv2.fillPoly(canvas, [np.rint(outline).astype(np.int32)], 1)


def _add_object(
    canvas: np.ndarray, rng: np.random.Generator, size: float, goal: float, masks: Sequence[np.ndarray]
) -> None:
    """One object's silhouette, scaled to part of the goal, mirrored at random and put somewhere else."""
    shape = _cropped(choose(rng, masks))
    shape = shape[:, ::-1] if rng.random() < 0.5 else shape
    factor = np.sqrt(goal * rng.uniform(0.3, 1) * size * canvas.size / max(1, shape.sum()))
    h = int(np.clip(round(shape.shape[0] * factor), 1, canvas.shape[0]))
    w = int(np.clip(round(shape.shape[1] * factor), 1, canvas.shape[1]))
    placed = cv2.resize(shape.astype(np.uint8), (w, h), interpolation=cv2.INTER_NEAREST_EXACT)
    top, left = _anywhere(rng, canvas.shape[0] - h), _anywhere(rng, canvas.shape[1] - w)
    canvas[top : top + h, left : left + w] |= placed


def _cropped(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _anywhere(rng: np.random.Generator, room: int) -> int:
    return int(rng.integers(0, room + 1))


def _share(value: float, low: float, high: float) -> float:
    return round(float(np.clip((value - low) / (high - low), 0, 1)), 4)


def _punched(image: np.ndarray, hole: np.ndarray, rng: np.random.Generator, severity: float, **params: Any) -> Degraded:
    """Fill the hole with one of the fills that can be told from what was there."""
    fill = pick(rng, {fill: weight for fill, weight in FILLS.items() if _is_visible(image, hole, fill)})
    content = np.float32(_LEVELS[fill]) if fill in _LEVELS else rng.random(image.shape, dtype=np.float32)
    pixels = np.where(hole[..., None], content, image)
    return Degraded(pixels, params | {"fill": fill}, severity, hole=hole, fields={"fill": fill})


def _is_visible(image: np.ndarray, hole: np.ndarray, fill: str) -> bool:
    if fill not in _LEVELS:
        return True
    inside = image[::_STRIDE, ::_STRIDE][hole[::_STRIDE, ::_STRIDE]]
    different = np.abs(inside - np.float32(_LEVELS[fill])) > _VISIBLE_DIFFERENCE
    return inside.size == 0 or bool(different.any(axis=1).mean() >= _VISIBLE_SHARE)
