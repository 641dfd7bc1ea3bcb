"""Image encoding. Both sides of a pair go through the same settings, so unchanged 8x8 blocks decode identically."""

from __future__ import annotations

import cv2
import numpy as np

JPEG_QUALITY = 95
# 4:4:4, because with 4:2:0 a change bleeds nine pixels past its own blocks.
_JPEG = [
    cv2.IMWRITE_JPEG_QUALITY,
    JPEG_QUALITY,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
]
_PNG = [cv2.IMWRITE_PNG_COMPRESSION, 6]


def encode_jpeg(pixels: np.ndarray) -> bytes:
    """JPEG (quality 95, 4:4:4) of uint8 RGB [H, W, 3]."""
    return _encode(".jpg", pixels, _JPEG)


def encode_png(pixels: np.ndarray) -> bytes:
    """Lossless PNG of uint8 RGB [H, W, 3], uint8 [H, W] or uint16 [H, W].

    Raises:
        ValueError: another dtype, of which OpenCV would keep eight bits.
    """
    if pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"a PNG holds uint8 or uint16, not {pixels.dtype}")
    return _encode(".png", pixels, _PNG)


def encode_mask(mask: np.ndarray) -> bytes:
    """8-bit PNG of a boolean [H, W] mask: 255 where True."""
    return encode_png(mask.astype(np.uint8) * 255)


def decode_rgb(data: bytes) -> np.ndarray:
    """uint8 RGB [H, W, 3] of a JPEG or PNG.

    Raises:
        ValueError: the bytes are not an image.
    """
    return np.ascontiguousarray(_decode(data, cv2.IMREAD_COLOR)[..., ::-1])


def decode_raw(data: bytes) -> np.ndarray:
    """An image as stored: uint8 or uint16, [H, W] or RGB [H, W, 3].

    Raises:
        ValueError: the bytes are not an image.
    """
    array = _decode(data, cv2.IMREAD_UNCHANGED)
    return np.ascontiguousarray(array[..., ::-1]) if array.ndim == 3 else array


def _decode(data: bytes, mode: int) -> np.ndarray:
    array = cv2.imdecode(np.frombuffer(data, np.uint8), mode)
    if array is None:
        raise ValueError("bytes are not a decodable image")
    return array


def _encode(extension: str, pixels: np.ndarray, options: list[int]) -> bytes:
    array = pixels[..., ::-1] if pixels.ndim == 3 else pixels
    ok, data = cv2.imencode(extension, np.ascontiguousarray(array), options)
    if not ok:
        raise ValueError(f"cannot encode {pixels.dtype} {pixels.shape} as {extension}")
    return data.tobytes()
