"""Faults of known strength, planted into clean photographs.

A fault is a function `(pixels, rng, others) -> pixels`: uint8 RGB [H, W, 3] in and out, `others` being further
photographs for what needs more than one. Lengths in pixels are meant at a short side of 512 px and grow with the
image. What is planted is saved as a JPEG afterwards (`saved`), as nearly everything on the web is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from schemas.codec import decode_rgb

REFERENCE_SIDE = 512
SAVED_QUALITY = (70, 95)
Plant = Callable[[np.ndarray, np.random.Generator, Sequence[np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class Fault:
    """A fault and, in words, the strengths that are drawn."""

    name: str
    severity: str
    plant: Plant


def saved(pixels: np.ndarray, rng: np.random.Generator) -> bytes:
    """JPEG (4:2:0) of quality 70–95."""
    return to_jpeg(pixels, int(rng.integers(SAVED_QUALITY[0], SAVED_QUALITY[1] + 1)))


def to_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """JPEG (4:2:0) of uint8 RGB."""
    _, data = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return data.tobytes()


def blurred(pixels: np.ndarray, rng: np.random.Generator, others: Sequence[np.ndarray]) -> np.ndarray:
    """Gaussian of σ 2–5 px, defocus of radius 4–10 px or straight motion over 12–40 px."""
    scale = _scale(pixels)
    kind = int(rng.integers(3))
    if kind == 0:
        return cv2.GaussianBlur(pixels, (0, 0), rng.uniform(2, 5) * scale)
    kernel = (
        _disk(rng.uniform(4, 10) * scale) if kind == 1 else _streak(rng.uniform(12, 40) * scale, rng.uniform(0, 180))
    )
    return cv2.filter2D(pixels, -1, kernel, borderType=cv2.BORDER_REFLECT)


def noisy(pixels: np.ndarray, rng: np.random.Generator, others: Sequence[np.ndarray]) -> np.ndarray:
    """Gaussian noise of σ 15–50 levels, independent per channel, in grains of one pixel at a short side of 512."""
    grain = max(1.0, _scale(pixels))
    height, width = (round(side / grain) for side in pixels.shape[:2])
    noise = rng.normal(0, rng.uniform(15, 50), (height, width, 3)).astype(np.float32)
    return _to_uint8(pixels + cv2.resize(noise, pixels.shape[1::-1], interpolation=cv2.INTER_NEAREST))


def upscaled(pixels: np.ndarray, rng: np.random.Generator, others: Sequence[np.ndarray]) -> np.ndarray:
    """Scaled down by 2–6 and up again, bilinear, bicubic or Lanczos: a small image sold as a large one."""
    factor = rng.uniform(2, 6)
    small = tuple(max(8, round(side / factor)) for side in pixels.shape[1::-1])
    how = (cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4)[int(rng.integers(3))]
    return cv2.resize(cv2.resize(pixels, small, interpolation=cv2.INTER_AREA), pixels.shape[1::-1], interpolation=how)


def letterboxed(pixels: np.ndarray, rng: np.random.Generator, others: Sequence[np.ndarray]) -> np.ndarray:
    """Bars of 4–20 % of the side: above and below, left and right, on one side, or all around; any colour."""
    sides = ((1, 1, 0, 0), (0, 0, 1, 1), (0, 1, 0, 0), (1, 1, 1, 1))[int(rng.integers(4))]
    share = rng.uniform(0.04, 0.2)
    height, width = pixels.shape[:2]
    top, bottom, left, right = (
        round(share * n) * on for n, on in zip((height, height, width, width), sides, strict=True)
    )
    return cv2.copyMakeBorder(pixels, top, bottom, left, right, cv2.BORDER_CONSTANT, value=_bar_colour(rng))


def collaged(pixels: np.ndarray, rng: np.random.Generator, others: Sequence[np.ndarray]) -> np.ndarray:
    """Two or three in a row, two in a column or a 2×2 grid; every other one with gutters of 4–12 px between."""
    rows, columns = ((1, 2), (1, 3), (2, 1), (2, 2))[int(rng.integers(4))]
    gutter = round(rng.uniform(4, 12) * _scale(pixels)) * int(rng.integers(2))
    height, width = (
        (pixels.shape[0] - gutter * (rows - 1)) // rows,
        (pixels.shape[1] - gutter * (columns - 1)) // columns,
    )
    canvas = np.empty((rows * height + (rows - 1) * gutter, columns * width + (columns - 1) * gutter, 3), np.uint8)
    canvas[:] = _bar_colour(rng)
    panels = [pixels, *(others[int(i)] for i in rng.permutation(len(others)))][: rows * columns]
    for i, panel in enumerate(panels):
        top, left = i // columns * (height + gutter), i % columns * (width + gutter)
        canvas[top : top + height, left : left + width] = _cover(panel, height, width)
    return canvas


def with_qr_code(pixels: np.ndarray, rng: np.random.Generator, others: Sequence[np.ndarray]) -> np.ndarray:
    """A QR code that covers 6–20 % of the area, anywhere, upright."""
    code = cv2.QRCodeEncoder.create().encode(f"https://example.org/{int(rng.integers(1 << 30))}")
    side = round(np.sqrt(rng.uniform(0.06, 0.2) * pixels.shape[0] * pixels.shape[1]))
    side = min(side, *pixels.shape[:2])
    code = cv2.resize(code, (side, side), interpolation=cv2.INTER_NEAREST)
    top, left = (int(rng.integers(limit - side + 1)) for limit in pixels.shape[:2])
    out = pixels.copy()
    out[top : top + side, left : left + side] = code[..., None]
    return out


def placeholder(pixels: np.ndarray, rng: np.random.Generator, others: Sequence[np.ndarray]) -> np.ndarray:
    """What a server sends instead of a photograph: a plain sheet in a colour of it, with one short line of text."""
    out = np.empty_like(pixels)
    out[:] = pixels[tuple(int(rng.integers(side)) for side in pixels.shape[:2])]
    ink = (0, 0, 0) if out[0, 0].mean() > 127 else (255, 255, 255)
    scale = _scale(pixels)
    at = (round(0.2 * pixels.shape[1]), pixels.shape[0] // 2)
    text = ("No image", "404", "Removed", "Loading")[int(rng.integers(4))]
    cv2.putText(out, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, ink, max(1, round(2 * scale)), cv2.LINE_AA)
    return out


def watermarked(pixels: np.ndarray, rng: np.random.Generator, others: Sequence[np.ndarray]) -> np.ndarray:
    """A word in white, 30–60 % opaque, repeated over the whole picture as stock agencies do."""
    scale, height, width = _scale(pixels), *pixels.shape[:2]
    ink = np.zeros((2 * height, 2 * width), np.uint8)
    word = ("SAMPLE", "stockphoto", "PREVIEW", "(c) agency")[int(rng.integers(4))]
    step_x, step_y = round(rng.uniform(180, 260) * scale), round(rng.uniform(80, 140) * scale)
    for row, y in enumerate(range(0, 2 * height, step_y)):
        for x in range(-(row % 2) * step_x // 2, 2 * width, step_x):
            cv2.putText(ink, word, (x, y), cv2.FONT_HERSHEY_SIMPLEX, scale, 255, max(1, round(2 * scale)), cv2.LINE_AA)
    turn = cv2.getRotationMatrix2D((float(width), float(height)), float(rng.choice([0, 30, 45])), 1.0)
    ink = cv2.warpAffine(ink, turn, (2 * width, 2 * height))[height // 2 :, width // 2 :][:height, :width]
    alpha = (ink.astype(np.float32) / 255 * rng.uniform(0.3, 0.6))[..., None]
    return _to_uint8(pixels * (1 - alpha) + 255 * alpha)


def cropped(pixels: np.ndarray, rng: np.random.Generator, others: Sequence[np.ndarray]) -> np.ndarray:
    """2–4 % cut off each side."""
    height, width = pixels.shape[:2]
    top, bottom = (round(float(s) * height) for s in rng.uniform(0.02, 0.04, 2))
    left, right = (round(float(s) * width) for s in rng.uniform(0.02, 0.04, 2))
    return np.ascontiguousarray(pixels[top : height - bottom, left : width - right])


def recompressed(pixels: np.ndarray, rng: np.random.Generator, others: Sequence[np.ndarray]) -> np.ndarray:
    """JPEG of quality 30–70."""
    return decode_rgb(to_jpeg(pixels, int(rng.integers(30, 71))))


def resized(pixels: np.ndarray, rng: np.random.Generator, others: Sequence[np.ndarray]) -> np.ndarray:
    """A thumbnail at 25–75 % of the size."""
    share = float(rng.uniform(0.25, 0.75))
    size = tuple(max(16, round(share * side)) for side in pixels.shape[1::-1])
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def brightened(pixels: np.ndarray, rng: np.random.Generator, others: Sequence[np.ndarray]) -> np.ndarray:
    """All levels times 0.8–1.2."""
    return _to_uint8(pixels * rng.uniform(0.8, 1.2))


def flipped(pixels: np.ndarray, rng: np.random.Generator, others: Sequence[np.ndarray]) -> np.ndarray:
    """Mirrored, left to right."""
    return np.ascontiguousarray(pixels[:, ::-1])


def cut(data: bytes, rng: np.random.Generator) -> bytes:
    """A file that ends at 5–95 % of its length."""
    return data[: int(len(data) * rng.uniform(0.05, 0.95))]


def overwritten(data: bytes, rng: np.random.Generator) -> bytes:
    """A file with 64 neighbouring bytes replaced, beyond its first quarter."""
    at = int(rng.integers(len(data) // 4, len(data) - 64))
    return data[:at] + rng.bytes(64) + data[at + 64 :]


QUALITY = (
    Fault("blur", "Gaussian σ 2–5 px, defocus 4–10 px, motion 12–40 px", blurred),
    Fault("noise", "σ 15–50 of 255", noisy),
    Fault("upscale", "by 2–6", upscaled),
    Fault("letterbox", "bars of 4–20 % on one, two or four sides, any colour", letterboxed),
    Fault("collage", "2–4 panels, with and without gutters", collaged),
    Fault("qr", "6–20 % of the area", with_qr_code),
    Fault("placeholder", "plain sheet with a line of text", placeholder),
    Fault("overlay", "repeated word, 30–60 % opaque", watermarked),
)
COPIES = (
    Fault("crop", "2–4 % off each side", cropped),
    Fault("jpeg", "quality 30–70", recompressed),
    Fault("resize", "to 25–75 %", resized),
    Fault("brightness", "× 0.8–1.2", brightened),
    Fault("flip", "mirrored", flipped),
)


def _scale(pixels: np.ndarray) -> float:
    return min(pixels.shape[:2]) / REFERENCE_SIDE


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _bar_colour(rng: np.random.Generator) -> tuple[int, int, int]:
    """Black or white, each two times in five, else any colour."""
    kind = int(rng.integers(5))
    red, green, blue = (int(level) for level in rng.integers(0, 256, 3))
    return (0, 0, 0) if kind < 2 else (255, 255, 255) if kind < 4 else (red, green, blue)


def _cover(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scaled and cut in the middle to exactly that size."""
    scale = max(height / pixels.shape[0], width / pixels.shape[1])
    size = (max(width, round(pixels.shape[1] * scale)), max(height, round(pixels.shape[0] * scale)))
    scaled = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    return scaled[top : top + height, left : left + width]


def _disk(radius: float) -> np.ndarray:
    side = np.arange(-np.ceil(radius), np.ceil(radius) + 1)
    inside = (np.hypot(side, side[:, None]) <= radius).astype(np.float32)
    return inside / inside.sum()


def _streak(length: float, angle: float) -> np.ndarray:
    """A straight line through the middle, `length` px long, at `angle` degrees."""
    side = 2 * int(np.ceil(length / 2)) + 1
    kernel = np.zeros((side, side), np.float32)
    middle, reach = side // 2, length / 2
    dx, dy = reach * np.cos(np.radians(angle)), reach * np.sin(np.radians(angle))
    start, end = (round(middle - dx), round(middle - dy)), (round(middle + dx), round(middle + dy))
    cv2.line(kernel, start, end, 1.0, 1)
    return kernel / kernel.sum()
