"""Compression: JPEG artefacts and pixelation."""

from __future__ import annotations

import cv2
import numpy as np

from builders.degradations.base import Degraded, finish, length_scale, log_lerp, pick
from schemas.codec import decode_rgb

QUALITY = (40.0, 5.0)
BLOCK = (4.0, 24.0)
_SAMPLING = {"420": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420, "444": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444}


def compressed(image: np.ndarray, rng: np.random.Generator, severity: float) -> Degraded:
    """JPEG of quality 40–5; three times in ten compressed before on another 8x8 grid, as re-posted images are."""
    quality, sampling = round(log_lerp(severity, *QUALITY)), pick(rng, {"420": 0.7, "444": 0.3})
    offset, out = 0, image
    if rng.random() < 0.3:
        offset = int(rng.integers(1, 8))
        padded = cv2.copyMakeBorder(image, offset, 0, offset, 0, cv2.BORDER_REFLECT)
        out = jpeg_round_trip(padded, min(95, quality + 20), sampling)[offset:, offset:]
    out = jpeg_round_trip(out, quality, sampling)
    return finish(out, severity, quality=quality, sampling=sampling, earlier_grid_offset=offset)


def pixelated(image: np.ndarray, rng: np.random.Generator, severity: float) -> Degraded:
    """Blocks of 4–24 px in one colour each. The grid starts anywhere; blocks at the border are cut, not dropped."""
    block = log_lerp(severity, *BLOCK)
    size = max(2, round(block * length_scale(image.shape)))
    height, width = image.shape[:2]
    top, left = (int(n) for n in rng.integers(0, size, 2))
    bottom, right = -(top + height) % size, -(left + width) % size
    padded = cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_REPLICATE)
    grid = (padded.shape[1] // size, padded.shape[0] // size)
    blocks = cv2.resize(padded, grid, interpolation=cv2.INTER_AREA)
    large = blocks.repeat(size, axis=0).repeat(size, axis=1)
    return finish(large[top : top + height, left : left + width], severity, block=block, offset=[top, left])


def jpeg_round_trip(image: np.ndarray, quality: int, sampling: str = "420") -> np.ndarray:
    """float32 RGB through an 8-bit JPEG of that quality and chroma sampling ("420" or "444")."""
    pixels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, _SAMPLING[sampling]]
    _, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
    return decode_rgb(data.tobytes()).astype(np.float32) / 255
