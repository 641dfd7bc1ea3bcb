"""What an operation makes of a picture, and the pixel work that operations share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from builders.edit_pairs.claims import Claim

_VISIBLE = 0.5 / 255  # of alpha: below it, pasting changes no pixel


@dataclass(frozen=True)
class Wording:
    """An entry of the template file with what its placeholders stand for."""

    name: str
    fields: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Presence:
    """A thing that comes or goes: it is in one picture of a pair and not in the other.

    Args:
        name: what a detector is to look for.
        region: boolean [H, W], where it is.
    """

    name: str
    region: np.ndarray = field(repr=False)
    in_target: bool


@dataclass(frozen=True)
class Edit:
    """One edit of a photograph, before it is judged.

    Args:
        pixels: the edited picture, uint8 RGB [H, W, 3]. Outside of `mask` it equals the source.
        mask: boolean [H, W]: the pixels that were allowed to change.
        forward, inverse: how to ask for it, and for its undoing; None where that could not be told from the result.
        inverse_subtask: what undoing it is called, if not the same.
        claims: what the forward instruction says, to be verified on the decoded pair.
        params: what was drawn, plain JSON types.
        source: the picture before the edit where that is not the photograph; uint8 RGB [H, W, 3].
        scores: what was measured on the way.
        in_place: whether what is outside of the mask, or the whole picture, stays where it was.
        presences: things that come or go, for a detector to check.
        captions: of the edited part before and after, for CLIP; None if there are no words for the difference.
        model: `model` and `revision` of the model that made the new pixels; empty if none did.
    """

    pixels: np.ndarray
    mask: np.ndarray
    forward: Wording
    inverse: Wording | None = None
    inverse_subtask: str = ""
    claims: tuple[Claim, ...] = ()
    params: dict[str, Any] = field(default_factory=dict)
    source: np.ndarray | None = None
    scores: dict[str, float] = field(default_factory=dict)
    in_place: bool = True
    presences: tuple[Presence, ...] = ()
    captions: tuple[str, str] | None = None
    model: dict[str, str] = field(default_factory=dict)


def paste(pixels: np.ndarray, edited: np.ndarray, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`edited` over `pixels` (uint8 RGB [H, W, 3]) by float `alpha` [H, W]: the result, and where it could differ."""
    mask = alpha > _VISIBLE
    blended = alpha[mask, None] * edited[mask] + (1 - alpha[mask, None]) * pixels[mask]
    result = pixels.copy()
    result[mask] = np.clip(np.rint(blended), 0, 255).astype(np.uint8)
    return result, mask


def matte(mask: np.ndarray, inset: float = 0.0) -> np.ndarray:
    """float32 alpha [H, W] of a cut-out: a soft edge of about a pixel and a half, moved inwards by `inset` pixels."""
    radius = round(inset)
    if radius:
        mask = cv2.erode(mask.astype(np.uint8), _disc(radius), borderValue=1).astype(bool)
    return cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 1.0)


def grow(mask: np.ndarray, radius: int) -> np.ndarray:
    """The boolean mask, dilated by a disc."""
    return cv2.dilate(mask.astype(np.uint8), _disc(radius)).astype(bool)


def shrink(mask: np.ndarray, radius: int) -> np.ndarray:
    """The boolean mask, eroded by a disc; the picture's border does not eat into it."""
    return cv2.erode(mask.astype(np.uint8), _disc(radius), borderValue=1).astype(bool)


def fade_in(hole: np.ndarray, width: float = 3.0) -> np.ndarray:
    """float32 alpha [H, W]: 1 deep inside the hole, falling to 0 at its rim, so that the seam lies inside."""
    padded = np.pad(hole.astype(np.uint8), 1, mode="edge")
    return np.clip(cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1] / width, 0, 1)


def _disc(radius: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
