"""Masks without weights: GrabCut (Rother, Kolmogorov and Blake, SIGGRAPH 2004) from a box, or along a known outline.

GrabCut always answers, so its answer is checked: a mask is accepted when it fills a plausible part of its box, hangs
together, reaches to the sides of the box, and stays the same when the box is drawn a little tighter or wider.
Stability is what separates an object that differs in colour from its surroundings from one that does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import cv2
import numpy as np

Box = tuple[float, float, float, float]
Judge = Callable[[np.ndarray, np.ndarray], bool]
_ITERATIONS = 3
_WORKING_SIDE = 256  # GrabCut's time grows with the area; the outline is refined at full size
_CONTEXT = 0.3  # surroundings that count as background, on each side, as a share of the box's longer side
_LEAST_PIXELS = 64
_JITTER = 0.04  # of the box, inwards and outwards
_FILL = (0.15, 0.95)  # a mask that fills less of its box, or all of it, is not one
_FRAMES = (0.1, 0.04, 0.18)  # of each side: what surrounds a thing of which only the middle is known
_WHOLE = 0.85  # least share of the mask in its largest piece, and overlap of that piece's box with the asked one


class GrabCut:
    """`BoxSegmenter` without a model.

    Args:
        least_agreement: least intersection over union between the masks of the jittered boxes.
    """

    name: ClassVar[str] = "grabcut"
    version: ClassVar[str] = "1"

    def __init__(self, least_agreement: float = 0.9) -> None:
        self.least_agreement = least_agreement

    def segment(self, image: np.ndarray, box: Box) -> tuple[np.ndarray, float]:
        """See `builders.annotators.base.BoxSegmenter`; the confidence is the agreement of the jittered boxes."""
        height, width = image.shape[:2]
        nothing = np.zeros((height, width), bool)
        scale = min(1.0, _WORKING_SIDE / max(height, width))
        small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        x0, y0, x1, y1 = (side * scale for side in box)
        dx, dy = _JITTER * (x1 - x0), _JITTER * (y1 - y0)
        masks = [
            _cut_box(small, (x0 - j * dx, y0 - j * dy, x1 + j * dx, y1 + j * dy))
            for j in (0, 1, -1)  # the box itself, a wider and a tighter one
        ]
        agreement = min(overlap(masks[0], other) for other in masks[1:])
        piece = _largest_piece(masks[0])
        tight = overlap(_filled_box(piece), _box_mask(small.shape[:2], (x0, y0, x1, y1)))
        fill = piece.sum() / max(1.0, (x1 - x0) * (y1 - y0))
        whole = piece.sum() / max(1, masks[0].sum())
        if agreement < self.least_agreement or min(whole, tight) < _WHOLE or not _FILL[0] <= fill <= _FILL[1]:
            return nothing, 0.0
        rough = cv2.resize(piece.astype(np.uint8), (width, height), interpolation=cv2.INTER_LINEAR).astype(bool)
        return refine(image, rough), agreement

    def locate(self, image: np.ndarray, is_thing: Judge) -> tuple[np.ndarray, float]:
        """The thing in the middle of a photograph: its mask and the confidence in it, as of `segment`.

        Surroundings are learnt from frames of several widths. What stands out from a frame has a box of its own, and
        its mask is the one that is accepted for that box; the first that is also a thing counts.

        Args:
            image: uint8 RGB [H, W, 3].
            is_thing: whether, in a picture, a boolean [H, W] mask can be the thing.
        """
        height, width = image.shape[:2]
        scale = min(1.0, _WORKING_SIDE / max(height, width))
        small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        bottom, right = small.shape[:2]
        for margin in _FRAMES:
            middle = (margin * right, margin * bottom, (1 - margin) * right, (1 - margin) * bottom)
            rough = _largest_piece(_cut_box(small, middle))
            if rough.any() and is_thing(small, rough):
                x, y, w, h = cv2.boundingRect(rough.astype(np.uint8))
                mask, confidence = self.segment(image, (x / scale, y / scale, (x + w) / scale, (y + h) / scale))
                if confidence and is_thing(image, mask):
                    return mask, confidence
        return np.zeros((height, width), bool), 0.0


def refine(image: np.ndarray, mask: np.ndarray, reach: float = 0.012) -> np.ndarray:
    """The boolean [H, W] `mask` with its outline moved onto the edge in the uint8 RGB image, if there is one nearby.

    Args:
        image, mask: the picture and a rough mask.
        reach: how far the outline may move, as a share of the shorter side.
    """
    radius = max(2, round(reach * min(mask.shape)))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    solid = mask.astype(np.uint8)
    core, halo = cv2.erode(solid, kernel, borderValue=1), cv2.dilate(solid, kernel)
    window = _window(halo, 4 * radius)
    trimap = np.full(mask.shape, cv2.GC_BGD, np.uint8)
    trimap[halo > 0] = cv2.GC_PR_BGD
    trimap[solid > 0] = cv2.GC_PR_FGD
    trimap[core > 0] = cv2.GC_FGD
    refined = mask.copy()
    if core.any() and (trimap[window] == cv2.GC_BGD).any():
        refined[window] = _cut(image[window], trimap[window].copy())
    return refined


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of boolean masks; 0 if both are empty."""
    union = int((a | b).sum())
    return float((a & b).sum() / union) if union else 0.0


def _window(mask: np.ndarray, margin: int) -> tuple[slice, slice]:
    x, y, w, h = cv2.boundingRect(mask)
    return slice(max(0, y - margin), y + h + margin), slice(max(0, x - margin), x + w + margin)


def _cut_box(image: np.ndarray, box: Box) -> np.ndarray:
    height, width = image.shape[:2]
    x0, y0 = max(0, round(box[0])), max(0, round(box[1]))
    x1, y1 = min(width, round(box[2])), min(height, round(box[3]))
    trimap = np.full((height, width), cv2.GC_BGD, np.uint8)
    trimap[y0:y1, x0:x1] = cv2.GC_PR_FGD
    mask = np.zeros((height, width), bool)
    # Colours from far away say nothing about what is around the box.
    margin = round(_CONTEXT * max(x1 - x0, y1 - y0))
    window = slice(max(0, y0 - margin), y1 + margin), slice(max(0, x0 - margin), x1 + margin)
    if min((trimap[window] == kind).sum() for kind in (cv2.GC_PR_FGD, cv2.GC_BGD)) >= _LEAST_PIXELS:
        mask[window] = _cut(image[window], trimap[window].copy())
    return mask


def _cut(image: np.ndarray, trimap: np.ndarray) -> np.ndarray:
    cv2.setRNGSeed(0)  # its k-means starts from OpenCV's own generator
    background, foreground = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(
        np.ascontiguousarray(image[..., ::-1]),
        trimap,
        (0, 0, 1, 1),
        background,
        foreground,
        _ITERATIONS,
        cv2.GC_INIT_WITH_MASK,
    )
    return (trimap == cv2.GC_FGD) | (trimap == cv2.GC_PR_FGD)


def _box_mask(size: tuple[int, int], box: Box) -> np.ndarray:
    mask = np.zeros(size, bool)
    x0, y0, x1, y1 = (max(0, round(side)) for side in box)
    mask[y0:y1, x0:x1] = True
    return mask


def _filled_box(mask: np.ndarray) -> np.ndarray:
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    return _box_mask(mask.shape, (x, y, x + w, y + h))


def _largest_piece(mask: np.ndarray) -> np.ndarray:
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    if count < 2:
        return mask
    return labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
