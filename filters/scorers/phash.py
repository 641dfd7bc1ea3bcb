"""Perceptual hash: 64 bits that barely change when a photograph is re-saved, scaled or a little brightened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa
from scipy.fft import dctn

from filters.scorers.base import Scorer, ScorerInput, ScorerParams

SIDE = 32  # of the picture that is transformed
LOW = 8  # lowest frequencies kept, per axis
_DECIMALS = 3  # a flat or mirror-symmetric image has zeros whose rounding errors must not become bits


def gray_thumbnail(pixels: np.ndarray) -> np.ndarray:
    """float64 [32, 32] BT.601 luma, 0..255, of uint8 RGB [H, W, 3]: each value is the mean of an equal share of it."""
    gray = cv2.cvtColor(pixels.astype(np.float32), cv2.COLOR_RGB2GRAY).astype(np.float64)
    return cv2.resize(gray, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def phash(thumbnail: np.ndarray) -> int:
    """64-bit hash of a `gray_thumbnail`.

    Bit (i, j), i the vertical frequency, is 1 where the unnormalised DCT-II coefficient exceeds the median of the 64
    lowest, the constant one (0, 0) among them; row-major, the first bit is the most significant. This is `phash` of
    the Python package imagehash 4.3 but for the resampling: it scales 8-bit levels with a Lanczos filter.
    """
    low = dctn(thumbnail, type=2)[:LOW, :LOW].round(_DECIMALS)
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


class PHash(Scorer):
    """Columns `phash` and `phash_mirror`, the hash of the image mirrored left to right.

    Two images are near-duplicates when the Hamming distance of their `phash` is small (6 of 64 is usual), and mirrored
    ones when that of one's `phash` to the other's `phash_mirror` is.
    """

    name: ClassVar[str] = "phash"
    version: ClassVar[str] = "1"
    Params: ClassVar[type[ScorerParams]] = ScorerParams

    @property
    def columns(self) -> dict[str, pa.DataType]:
        return {"phash": pa.uint64(), "phash_mirror": pa.uint64()}

    def score(self, items: Sequence[ScorerInput]) -> list[dict[str, Any]]:
        thumbnails = [gray_thumbnail(item.pixels) for item in items]
        return [{"phash": phash(t), "phash_mirror": phash(t[:, ::-1])} for t in thumbnails]
