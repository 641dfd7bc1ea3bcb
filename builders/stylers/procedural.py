"""Styles that need no weights: what a pencil, a printing press or a glazier would make of a photo, with OpenCV.

Every function takes the photo, a generator and `unit` (a length that is 1 px at 512 px, so that strokes and dots keep
their size relative to the picture) and returns the picture with the parameters that were drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

Params = dict[str, Any]
Styler = Callable[[np.ndarray, np.random.Generator, float], tuple[np.ndarray, Params]]


def pencil_sketch(pixels: np.ndarray, rng: np.random.Generator, unit: float) -> tuple[np.ndarray, Params]:
    """Gray over its blurred self ("colour dodge"): flat areas turn to paper, edges and texture to graphite."""
    params = {"sigma": _draw(rng, 4, 9), "pressure": _draw(rng, 1.3, 2.2)}
    gray = _gray(pixels).astype(np.float32) + 24  # so that noise in the dark stays faint
    dodge = np.minimum(gray / cv2.GaussianBlur(gray, (0, 0), params["sigma"] * unit), 1)
    shade = 0.8 + 0.2 * cv2.GaussianBlur(gray, (0, 0), 2 * unit) / 279
    return _rgb(dodge ** params["pressure"] * shade), params


def ink_drawing(pixels: np.ndarray, rng: np.random.Generator, unit: float) -> tuple[np.ndarray, Params]:
    """Extended difference of Gaussians (Winnemöller et al., 2012): contours and dark areas in solid black ink."""
    params = {"sigma": _draw(rng, 1.1, 1.7), "sharpness": _draw(rng, 8, 14), "level": _draw(rng, 0.25, 0.4)}
    gray = cv2.bilateralFilter(_equalised(pixels), 0, 60, 3 * unit).astype(np.float32) / 255
    fine, coarse = (cv2.GaussianBlur(gray, (0, 0), params["sigma"] * unit * k) for k in (1.0, 1.6))
    response = (1 + params["sharpness"]) * fine - params["sharpness"] * coarse
    return _rgb(np.where(response >= params["level"], 1, 1 + np.tanh(12 * (response - params["level"])))), params


def crosshatch(pixels: np.ndarray, rng: np.random.Generator, unit: float) -> tuple[np.ndarray, Params]:
    """Parallel pen strokes: the darker the photo, the more directions cross each other, over thin contours."""
    params = {"spacing": _draw(rng, 5, 7), "angle": _draw(rng, 30, 60)}
    tone = cv2.GaussianBlur(_equalised(pixels), (0, 0), unit).astype(np.float32) / 255
    paper = np.ones_like(tone)
    for level, turn in ((0.75, 0), (0.52, 90), (0.32, 45), (0.16, 135)):
        across = _rotated_grid(tone.shape, params["angle"] + turn)[0]
        wave = 0.5 + 0.5 * np.cos(2 * np.pi * across / (params["spacing"] * unit))
        stroke = np.clip((wave - 0.62) * 6, 0, 1) * np.clip((level - tone) * 8, 0, 1)
        paper = np.minimum(paper, 1 - 0.85 * stroke)
    return _rgb(paper * (1 - 0.9 * _contours(pixels, unit))), params


def watercolor(pixels: np.ndarray, rng: np.random.Generator, unit: float) -> tuple[np.ndarray, Params]:
    """Washes by the domain transform (Gastal & Oliveira, 2011), lightened, with pigment along the edges and grain."""
    params = {"sigma_s": _draw(rng, 30, 60), "sigma_r": _draw(rng, 0.35, 0.5), "light": _draw(rng, 0.25, 0.4)}
    wash = cv2.edgePreservingFilter(pixels, None, 1, params["sigma_s"] * unit, params["sigma_r"])
    wash = cv2.stylization(wash, None, params["sigma_s"] * unit, params["sigma_r"]).astype(np.float32) / 255
    wash = wash + params["light"] * (1 - wash) * (0.4 + 0.6 * wash)
    grain = cv2.GaussianBlur(rng.standard_normal(wash.shape[:2], np.float32), (0, 0), 1.5 * unit)
    paper = 1 + 0.02 * grain / grain.std()
    return _saturated(wash * paper[..., None], 1.5), params


def oil_painting(pixels: np.ndarray, rng: np.random.Generator, unit: float) -> tuple[np.ndarray, Params]:
    """Kuwahara filter (1976): every pixel takes the mean of the calmest of the four windows beside it."""
    params = {"radius": max(2, round(_draw(rng, 4.5, 7.5) * unit)), "saturation": _draw(rng, 1.15, 1.4)}
    radius = int(params["radius"])
    image = pixels.astype(np.float32)
    luma = _gray(pixels).astype(np.float32)
    size = (radius + 1, radius + 1)
    best = np.full(luma.shape, np.inf, np.float32)
    painted = image.copy()
    for anchor in ((0, 0), (radius, 0), (0, radius), (radius, radius)):
        mean, mean_luma, mean_square = (_box(a, size, anchor) for a in (image, luma, luma * luma))
        variance = mean_square - mean_luma**2
        calmer = variance < best
        best[calmer] = variance[calmer]
        painted[calmer] = mean[calmer]
    return _saturated(painted / 255, params["saturation"]), params


def cartoon(pixels: np.ndarray, rng: np.random.Generator, unit: float) -> tuple[np.ndarray, Params]:
    """Smoothed colours in few brightness steps, with dark outlines."""
    params = {"steps": int(rng.integers(6, 10)), "saturation": _draw(rng, 1.2, 1.5)}
    smooth = cv2.pyrMeanShiftFiltering(pixels, 8 * unit, 24)
    smooth = cv2.bilateralFilter(smooth, 0, 60, 4 * unit)
    hls = cv2.cvtColor(smooth.astype(np.float32) / 255, cv2.COLOR_RGB2HLS)
    hls[..., 1] = (np.floor(hls[..., 1] * params["steps"]).clip(0, params["steps"] - 1) + 0.5) / params["steps"]
    flat = cv2.cvtColor(hls, cv2.COLOR_HLS2RGB)
    outlines = np.minimum(1.6 * _contours(pixels, unit), 1)[..., None]
    return _saturated(flat * (1 - outlines), params["saturation"]), params


def poster(pixels: np.ndarray, rng: np.random.Generator, unit: float) -> tuple[np.ndarray, Params]:
    """A screen print: flat areas in the few colours that k-means finds in the photo."""
    params = {"colours": int(rng.integers(5, 9)), "saturation": _draw(rng, 1.3, 1.8)}
    smooth = cv2.bilateralFilter(cv2.medianBlur(pixels, _odd(3 * unit)), 0, 50, 5 * unit)
    palette, label = _palette(smooth, int(params["colours"]), rng)
    flat = cv2.medianBlur(label, _odd(4 * unit))
    return _saturated(palette[flat] / 255, params["saturation"]), params


def pixel_art(pixels: np.ndarray, rng: np.random.Generator, unit: float) -> tuple[np.ndarray, Params]:
    """Large square pixels in a palette of few colours."""
    params = {"cells": int(rng.integers(64, 113)), "colours": int(rng.integers(12, 25))}
    height, width = pixels.shape[:2]
    scale = params["cells"] / max(height, width)
    small = cv2.resize(pixels, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
    palette, label = _palette(small, params["colours"], rng)
    art = cv2.resize(palette[label], (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    return _saturated(art / 255, 1.25), params


def halftone(pixels: np.ndarray, rng: np.random.Generator, unit: float) -> tuple[np.ndarray, Params]:
    """Newspaper print: black dots on a rotated grid, which grow where the photo is dark."""
    params = {"pitch": _draw(rng, 5, 8), "angle": _draw(rng, 30, 60)}
    tone = cv2.GaussianBlur(_equalised(pixels), (0, 0), params["pitch"] * unit / 4).astype(np.float32) / 255
    u, v = (2 * np.pi * axis / (params["pitch"] * unit) for axis in _rotated_grid(tone.shape, params["angle"]))
    screen = 0.5 + 0.25 * (np.cos(u) + np.cos(v))
    return _rgb(np.clip((tone - screen) * 6 + 0.5, 0.05, 0.96)), params


def stained_glass(pixels: np.ndarray, rng: np.random.Generator, unit: float) -> tuple[np.ndarray, Params]:
    """Voronoi cells in the mean colour of what they cover, with dark lead between them."""
    params = {"pitch": _draw(rng, 12, 20), "saturation": _draw(rng, 1.4, 1.8)}
    height, width = pixels.shape[:2]
    cells = _cells(height, width, params["pitch"] * unit, rng)
    glass = 1.15 * _mean_colours(pixels, cells)[cells]
    came = max(2, round(2 * unit) + 1)  # a lead strip
    lead = cv2.morphologyEx(cells.astype(np.float32), cv2.MORPH_GRADIENT, np.ones((came, came), np.uint8)) > 0
    glass[lead] = 20
    return _saturated(cv2.GaussianBlur(glass, (0, 0), 0.6) / 255, params["saturation"]), params


def pointillism(pixels: np.ndarray, rng: np.random.Generator, unit: float) -> tuple[np.ndarray, Params]:
    """Round dabs of slightly varied colour, large ones first, each layer covering the gaps of the last."""
    params = {"dab": _draw(rng, 3.6, 5.2), "jitter": _draw(rng, 10, 18)}
    height, width = pixels.shape[:2]
    smooth = cv2.GaussianBlur(pixels, (0, 0), unit)
    canvas = cv2.GaussianBlur(pixels, (0, 0), 6 * unit)
    for scale in (1.6, 1.0, 0.7):
        radius = params["dab"] * unit * scale
        count = int(0.8 * height * width / radius**2)
        ys, xs = rng.integers(0, height, count), rng.integers(0, width, count)
        colours = smooth[ys, xs] + rng.normal(0, params["jitter"], (count, 3))
        for x, y, colour in zip(xs.tolist(), ys.tolist(), colours.clip(0, 255).tolist(), strict=True):
            cv2.circle(canvas, (x, y), round(radius), colour, -1, cv2.LINE_AA)
    return _saturated(canvas / 255, 1.3), params


PROCEDURAL: dict[str, Styler] = {
    styler.__name__: styler
    for styler in (
        pencil_sketch,
        ink_drawing,
        crosshatch,
        watercolor,
        oil_painting,
        cartoon,
        poster,
        pixel_art,
        halftone,
        stained_glass,
        pointillism,
    )
}


def _draw(rng: np.random.Generator, low: float, high: float) -> float:
    return round(float(rng.uniform(low, high)), 3)


def _gray(pixels: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def _equalised(pixels: np.ndarray) -> np.ndarray:
    """Gray with local contrast stretched: a print has only black and white to tell things apart."""
    return cv2.createCLAHE(2, (4, 4)).apply(_gray(pixels))


def _rgb(values: np.ndarray) -> np.ndarray:
    """uint8 RGB of 0..1 values, [H, W] or [H, W, 3]."""
    image = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    return image if image.ndim == 3 else cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)


def _saturated(values: np.ndarray, factor: float) -> np.ndarray:
    """uint8 RGB of float RGB 0..1 with its distance from gray multiplied."""
    values = values.astype(np.float32)
    gray = cv2.cvtColor(values, cv2.COLOR_RGB2GRAY)[..., None]
    return _rgb(gray + factor * (values - gray))


def _contours(pixels: np.ndarray, unit: float) -> np.ndarray:
    """0..1 [H, W]: soft dark lines where a smoothed photo has its strongest edges."""
    gray = cv2.bilateralFilter(_gray(pixels), 0, 50, 3 * unit).astype(np.float32) / 255
    fine, coarse = (cv2.GaussianBlur(gray, (0, 0), sigma * unit) for sigma in (0.9, 1.8))
    return np.clip((coarse - fine - 0.012) * 30, 0, 1)


def _box(image: np.ndarray, size: tuple[int, int], anchor: tuple[int, int]) -> np.ndarray:
    return cv2.blur(image, size, anchor=anchor, borderType=cv2.BORDER_REFLECT_101)


def _odd(length: float) -> int:
    return 2 * max(1, round(length / 2)) + 1


def _rotated_grid(shape: tuple[int, ...], degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of every pixel along two perpendicular axes."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return c * x + s * y, c * y - s * x


def _palette(pixels: np.ndarray, colours: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(float32 [K, 3] colours, uint8 [H, W] index) by k-means in CIELAB, fitted to at most 4096 pixels."""
    lab = cv2.cvtColor(pixels.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    flat = lab.reshape(-1, 3)
    some = flat[rng.choice(len(flat), min(len(flat), 4096), replace=False)]
    colours = min(colours, len(np.unique(some, axis=0)))
    cv2.setRNGSeed(int(rng.integers(1 << 31)))
    stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 20, 0.5)
    _, _, centres = cv2.kmeans(some, colours, np.zeros((len(some), 1), np.int32), stop, 1, cv2.KMEANS_PP_CENTERS)
    label = np.stack([np.square(lab - centre).sum(-1) for centre in centres]).argmin(0).astype(np.uint8)
    return cv2.cvtColor(centres[None], cv2.COLOR_LAB2RGB)[0] * 255, label


def _cells(height: int, width: int, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """int32 [H, W]: the nearest point of a jittered grid of that pitch, numbered from 1."""
    ys, xs = np.meshgrid(np.arange(pitch / 2, height, pitch), np.arange(pitch / 2, width, pitch), indexing="ij")
    points = np.stack([ys, xs], -1).reshape(-1, 2)
    points += rng.uniform(-0.45, 0.45, points.shape) * pitch
    seeds = np.full((height, width), 255, np.uint8)
    rows, columns = points.astype(int).T
    seeds[rows.clip(0, height - 1), columns.clip(0, width - 1)] = 0
    return cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)[1]


def _mean_colours(pixels: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """float32 [cells + 1, 3]."""
    count = np.maximum(np.bincount(cells.ravel()), 1)
    sums = [np.bincount(cells.ravel(), pixels[..., c].ravel()) for c in range(3)]
    return (np.stack(sums, -1) / count[:, None]).astype(np.float32)
