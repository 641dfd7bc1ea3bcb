"""What the pixels alone say: sharpness, blur, noise, texture, borders, panels and codes. No model.

Everything but `detail` is measured on a copy whose short side is at most 512 px (area-averaged), so that one threshold
fits all resolutions and large files cost no more than small ones. Smaller images are not scaled up: that would make
every one of them look blurred.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa
from scipy.fft import rfft2

from filters.scorers.base import Scorer, ScorerInput, ScorerParams

REFERENCE_SIDE = 512
_BLOCK = 16  # px, for texture and noise
_FLAT_STD = 2.0  # levels: what JPEG and a good sensor leave in an even area
_REBLUR = 1.5  # σ in px
_NO_EDGES = 10.0  # px: the blur of an image in which nothing has an edge
_BAR_LIMITS = (12, 24, 48)  # levels
_JPEG_BLOCK = 16  # px, of subsampled chroma
_DECIMALS = 4  # the last bits of a sum depend on the processor
_SECOND_DIFFERENCES = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)


def at_reference_size(pixels: np.ndarray) -> np.ndarray:
    """uint8 RGB scaled down, where it is larger, to a short side of 512 px."""
    scale = REFERENCE_SIDE / min(pixels.shape[:2])
    if scale >= 1:
        return pixels
    size = tuple(round(side * scale) for side in pixels.shape[1::-1])
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def sharpness(gray: np.ndarray) -> float:
    """Variance of the Laplacian (Pech-Pacheco et al., ICPR 2000) of float32 gray, 0..255.

    It grows with contrast, texture and noise as well: the usual measure, but `blur` tells blurred from plain.
    """
    return float(cv2.Laplacian(gray, cv2.CV_32F).var())


def blur(gray: np.ndarray) -> float:
    """σ in px of the Gaussian that smeared the edges, in the direction in which it is largest.

    An ideal step under a Gaussian of σ has the gradient c/σ; blurred again with σ₀ it is c/√(σ²+σ₀²). Their ratio R
    gives σ = σ₀/√(R²−1), whatever the contrast (Zhuo & Sim, "Defocus map estimation from a single image", 2011). We
    take the strongest fifth of the edge pixels, because a blurred background is no fault, and their median; apart for
    four directions of the gradient, because motion leaves the edges along its way sharp. 10 where there are no edges.
    """
    dx, dy = _gradient(gray)
    once = dx**2 + dy**2  # of 8-bit levels, so exact: a choice between equals must not hang on rounding
    twice = np.hypot(*_gradient(cv2.GaussianBlur(gray.astype(np.float64), (0, 0), _REBLUR)))
    along_x, along_y = (once >= cv2.dilate(once, np.ones(shape, np.uint8)) for shape in ((1, 3), (3, 1)))
    edge = np.where(np.abs(dx) > np.abs(dy), along_x, along_y) & (once > 8**2)  # a ridge; 8 is a step of 2 levels
    first, second, angle = once[edge], twice[edge], np.arctan2(dy[edge], dx[edge])
    direction = np.round(angle / (np.pi / 4)).astype(int) % 4
    medians = [
        _sigma(first[direction == i], second[direction == i])
        for i in range(4)
        if (direction == i).sum() >= max(20, 0.05 * len(direction))
    ]
    return min(max(medians, default=_NO_EDGES), _NO_EDGES)


def noise(gray: np.ndarray) -> float:
    """Standard deviation of the noise, in levels of 255, in the smoothest tenth of the 16 px blocks.

    The operator is that of Immerkaer ("Fast noise variance estimation", CVIU 1996), which cancels edges and slopes;
    taken over the whole image it would count fine texture. Blocks near black or white, where noise is clipped, are
    left out; 0 where hardly any remain.
    """
    response = np.abs(cv2.filter2D(gray, cv2.CV_32F, _SECOND_DIFFERENCES))
    sigma = _blocks(response).mean(axis=(1, 3)) * np.sqrt(np.pi / 2) / 6
    level = _blocks(gray).mean(axis=(1, 3))
    exposed = sigma[(level > 20) & (level < 235)]
    return float(np.quantile(exposed, 0.1)) if exposed.size >= 8 else 0.0


def detail(gray: np.ndarray) -> float:
    """Energy above half the Nyquist frequency in dB relative to that from 1/20 to 1/2 of it; full-size float32 gray.

    Photographs lie near −10 dB (their power falls as 1/f²). An image scaled up by 2 or more holds nothing up there
    but ringing and JPEG noise, and neither does a blurred one.
    """
    height, width = gray.shape
    window = np.hanning(height)[:, None] * np.hanning(width)
    power = np.abs(rfft2((gray - gray.mean(dtype=np.float64)) * window)) ** 2
    radius = 2 * np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    high = power[(radius >= 0.5) & (radius < 1)].sum()
    low = power[(radius >= 0.05) & (radius < 0.5)].sum()
    return float(10 * np.log10((high + 1e-3) / (low + 1e-3)))


def entropy(gray: np.ndarray) -> float:
    """Shannon entropy of the histogram of uint8 gray, 0..8 bits."""
    share = np.bincount(gray.ravel(), minlength=256) / gray.size
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def flatness(gray: np.ndarray) -> float:
    """Share of 16 px blocks of float32 gray whose standard deviation is below 2 levels."""
    return float((_blocks(gray).std(axis=(1, 3)) < _FLAT_STD).mean())


def letterbox(pixels: np.ndarray) -> float:
    """Share of the area in one-coloured bars along the sides of uint8 RGB."""
    top, bottom = _bar(pixels), _bar(pixels[::-1])
    rest = pixels[top : len(pixels) - bottom].swapaxes(0, 1)
    left, right = _bar(rest), _bar(rest[::-1])
    return 1 - len(rest[left : len(rest) - right]) * rest.shape[1] / (pixels.shape[0] * pixels.shape[1])


def collage(pixels: np.ndarray) -> float:
    """How sure a straight line from side to side divides uint8 RGB into panels, 0..1.

    A seam is a step of one or two pixels, at the same place in every row, steeper than what is beside it; an edge in
    a photograph is seldom all of that over the whole length. The line is cut into six: the share of rows with such a
    step in the weakest of them counts, for the best line. A gutter has two seams and is found by either.
    """
    return max(_best_seam(pixels), _best_seam(pixels.swapaxes(0, 1)))


def qr(gray: np.ndarray) -> float:
    """Share of the area of uint8 gray in QR codes, by OpenCV's detector of their three corner marks."""
    found, corners = cv2.QRCodeDetectorAruco().detectMulti(gray)
    return min(1.0, sum(cv2.contourArea(quad) for quad in corners) / gray.size) if found else 0.0


class Pixels(Scorer):
    """Columns `sharpness`, `blur`, `noise`, `detail`, `entropy`, `flatness`, `letterbox`, `collage` and `qr`.

    See the functions of the same names.
    """

    name: ClassVar[str] = "pixels"
    version: ClassVar[str] = "1"
    Params: ClassVar[type[ScorerParams]] = ScorerParams

    @property
    def columns(self) -> dict[str, pa.DataType]:
        names = ("sharpness", "blur", "noise", "detail", "entropy", "flatness", "letterbox", "collage", "qr")
        return dict.fromkeys(names, pa.float32())

    def score(self, items: Sequence[ScorerInput]) -> list[dict[str, Any]]:
        return [measure(item.pixels) for item in items]


def measure(pixels: np.ndarray) -> dict[str, float]:
    """All columns of uint8 RGB [H, W, 3]."""
    full = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    pixels = at_reference_size(pixels)
    levels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    gray = levels.astype(np.float32)
    values = {
        "sharpness": sharpness(gray),
        "blur": blur(gray),
        "noise": noise(gray),
        "detail": detail(full.astype(np.float32)),
        "entropy": entropy(levels),
        "flatness": flatness(gray),
        "letterbox": letterbox(pixels),
        "collage": collage(pixels),
        "qr": qr(levels),
    }
    return {name: round(value, _DECIMALS) for name, value in values.items()}


def _gradient(gray: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sobel derivatives along x and y, of the type of `gray`."""
    return cv2.Sobel(gray, -1, 1, 0), cv2.Sobel(gray, -1, 0, 1)


def _sigma(squared_once: np.ndarray, twice: np.ndarray) -> float:
    strong = squared_once >= np.quantile(squared_once, 0.8)
    ratio = np.sqrt(squared_once[strong].astype(np.float64)) / np.maximum(twice[strong], 1e-3)
    return float(np.median(_REBLUR / np.sqrt(np.maximum(ratio**2 - 1, 1e-3))))


def _blocks(gray: np.ndarray) -> np.ndarray:
    """Whole blocks as [rows, 16, columns, 16]; an image smaller than one block is one block."""
    rows, columns = (max(1, side // _BLOCK) for side in gray.shape)
    cut = gray[: rows * _BLOCK, : columns * _BLOCK]
    return cut.reshape(rows, min(_BLOCK, gray.shape[0]), columns, min(_BLOCK, gray.shape[1]))


def _bar(lines: np.ndarray) -> int:
    """Thickness of a bar along the first lines of uint8 [N, L, 3], 0 if there is none.

    Its colour is the median of the first line. At each of the L places the image begins where a channel departs from
    it. There is a bar if three in five of these beginnings lie within one line of each other and nearly none lies
    more than a JPEG block earlier: a straight hard edge, which skies, studio backgrounds and vignettes lack. A low
    limit finds dark pictures in black bars, a high one looks over the ringing of JPEG along a strong edge.
    """
    half = np.ascontiguousarray(lines[: max(1, len(lines) // 2)])
    colour = np.median(half[0], axis=0).astype(np.uint8)
    departure = _largest(cv2.absdiff(half, np.broadcast_to(colour, half.shape)))
    begins_low = _beginnings(departure > _BAR_LIMITS[0])
    for limit in _BAR_LIMITS:
        begins = _beginnings(departure > limit)
        within = begins[:-2] + begins[1:-1] + begins[2:]
        at = int(within.argmax()) if len(within) else 0
        early = begins_low[: max(0, at - _JPEG_BLOCK)].sum()
        if at >= 4 and within[at] >= max(0.6 * begins.sum(), 0.15 * lines.shape[1]) and early <= 0.02 * lines.shape[1]:
            return at + 1
    return 0


def _beginnings(departs: np.ndarray) -> np.ndarray:
    """For each line, at how many places it is the first one that departs; int [N]."""
    return np.bincount(departs.argmax(axis=0)[departs.any(axis=0)], minlength=len(departs))


def _best_seam(pixels: np.ndarray) -> float:
    """Score of the best vertical seam that is at least a twentieth of the width away from the sides."""
    width, margin = pixels.shape[1], max(3, pixels.shape[1] // 20)
    if width < 2 * margin + 1 or len(pixels) < 6:
        return 0.0
    before2, before, after, after2 = (
        np.ascontiguousarray(pixels[:, margin + k : width - margin + k]) for k in (-3, -1, 1, 3)
    )
    across = _largest(cv2.absdiff(before, after))
    beside = cv2.max(_largest(cv2.absdiff(before2, before)), _largest(cv2.absdiff(after, after2)))
    step = (across > 6) & (cv2.addWeighted(beside, 2, beside, 0, 0) < across)
    return float(np.min([part.mean(axis=0) for part in np.array_split(step, 6)], axis=0).max())


def _largest(pixels: np.ndarray) -> np.ndarray:
    """The largest of the three channels."""
    red, green, blue = cv2.split(pixels)
    return cv2.max(cv2.max(red, green), blue)
