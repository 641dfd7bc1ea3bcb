"""Binary masks as uncompressed COCO run lengths. Polarity, everywhere in x2i: True / 255 = *the thing itself*.

For an entity mask the thing is the entity, for an `edit_mask` it is the area that may change. (ImgEdit's reader
returns the inverse of what its writer stored; the round trip here is a tested invariant.)
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

_MAX_PIXELS = 1 << 28


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """`{"size": [height, width], "counts": [...]}` of a boolean [H, W] mask.

    Counts run in column-major order and start with the run of False (COCO's convention).
    """
    flat = np.asarray(mask, dtype=bool).ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate(([0], edges, [flat.size])))
    lead = [0] if flat.size and flat[0] else []
    return {"size": list(mask.shape), "counts": lead + counts.tolist()}


def decode_mask(mask: dict[str, Any] | list[list[float]], height: int, width: int) -> np.ndarray:
    """Boolean [height, width] mask from run lengths or COCO polygons, rescaled (nearest) to that size.

    Args:
        mask: `{"size", "counts"}` of any resolution covering the whole image, or a list of polygons
            `[x0, y0, x1, y1, ...]` in pixels of the target size.

    Raises:
        ValueError: run lengths do not add up to the size, or a polygon has fewer than three points.
    """
    if isinstance(mask, list):
        return _fill_polygons(mask, height, width)
    h, w = (int(n) for n in mask["size"])
    if h * w > _MAX_PIXELS:
        raise ValueError(f"mask of {h}x{w} has more than {_MAX_PIXELS} pixels")
    counts = np.asarray(mask["counts"], dtype=np.int64)
    if counts.sum() != h * w or (counts < 0).any():
        raise ValueError(f"mask run lengths add up to {counts.sum()}, not to {h}x{w}")
    values = np.arange(len(counts)) % 2 == 1
    decoded = np.repeat(values, counts).reshape((h, w), order="F")
    if (h, w) == (height, width):
        return decoded
    resized = cv2.resize(decoded.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    return resized.astype(bool)


def _fill_polygons(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    canvas = np.zeros((height, width), np.uint8)
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"a polygon needs at least three x, y pairs, got {len(polygon)} numbers")
        points = np.asarray(polygon, dtype=np.float64).reshape(-1, 1, 2)
        cv2.fillPoly(canvas, [np.rint(points).astype(np.int32)], 1)
    return canvas.astype(bool)
