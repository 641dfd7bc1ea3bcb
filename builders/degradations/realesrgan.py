"""Blind super-resolution: the two-stage degradation of Real-ESRGAN, then back to the original size.

Source: Wang et al. 2021 and its options/train_realesrgan_x4plus.yml: the numbers below. Kernels are in `kernels`.
Unlike all other degradations the listed lengths are pixels as they are: the degradation is defined on the 4x grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from builders.degradations.base import Degraded, choose, filter_image, finish, pick, uniform
from builders.degradations.compression import jpeg_round_trip
from builders.degradations.kernels import SIZES, draw_blur, draw_sinc, gaussian_blur, render
from builders.degradations.noise import add_gaussian, add_poisson

SCALE = 4
GAUSSIAN_PROBABILITY = 0.5
GRAY_PROBABILITY = 0.4
JPEG_QUALITY = (30, 95)
SECOND_BLUR_PROBABILITY = 0.8
FINAL_SINC_PROBABILITY = 0.8
CANDIDATES = 16
_MODES = {"area": cv2.INTER_AREA, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


@dataclass(frozen=True)
class Stage:
    """Ranges of one pass of blur, resize, noise and JPEG."""

    sigma: tuple[float, float]
    resize: dict[str, float]
    scale: tuple[float, float]
    gaussian: tuple[float, float]
    poisson: tuple[float, float]


FIRST = Stage((0.2, 3), {"up": 0.2, "down": 0.7, "keep": 0.1}, (0.15, 1.5), (1, 30), (0.05, 3))
SECOND = Stage((0.2, 1.5), {"up": 0.3, "down": 0.4, "keep": 0.3}, (0.3, 1.2), (1, 25), (0.05, 2.5))


def low_resolution(image: np.ndarray, rng: np.random.Generator, severity: float) -> Degraded:
    """The x4 blind degradation at the requested severity, with exactly the published distribution of parameters.

    Severity cannot set a dozen parameters without bending their joint distribution. So several plans are drawn and
    ordered by the damage they do, and `severity` picks the rank: a rank drawn uniformly from independent plans is
    itself a plan of the original distribution.
    """
    plans = sorted((draw_plan(rng) for _ in range(CANDIDATES)), key=damage)
    plan = plans[min(int(severity * CANDIDATES), CANDIDATES - 1)]
    return finish(apply_plan(image, plan, rng), severity, **plan)


def draw_plan(rng: np.random.Generator) -> dict[str, Any]:
    """All random decisions of the degradation, as plain JSON types."""
    return {
        "first": _draw_stage(rng, FIRST, blur=True),
        "second": _draw_stage(rng, SECOND, blur=bool(rng.random() < SECOND_BLUR_PROBABILITY)),
        "sinc": _draw_final_sinc(rng) if rng.random() < FINAL_SINC_PROBABILITY else {},
        "jpeg_last": bool(rng.random() < 0.5),
        "resize_back": choose(rng, list(_MODES)),
    }


def apply_plan(image: np.ndarray, plan: dict[str, Any], rng: np.random.Generator) -> np.ndarray:
    """Degrade float32 [H, W, 3] by a plan; the noise comes from `rng`. Sharpened ground truth is the input only."""
    height, width = image.shape[:2]
    first, second = plan["first"], plan["second"]
    out = filter_image(sharpened(image), render(first["blur"]))
    out = _resized(out, height * first["scale"], width * first["scale"], first["mode"])
    out = jpeg_round_trip(_with_noise(out, first["noise"], rng), first["jpeg"])
    if second["blur"]:
        out = filter_image(out, render(second["blur"]))
    out = _resized(out, height / SCALE * second["scale"], width / SCALE * second["scale"], second["mode"])
    out = _with_noise(out, second["noise"], rng)
    # Sinc and resize stay together: other orders leave twisted lines (Real-ESRGAN, realesrgan_model.py).
    if plan["jpeg_last"]:
        out = jpeg_round_trip(_small(out, image.shape, plan), second["jpeg"])
    else:
        out = _small(jpeg_round_trip(out, second["jpeg"]), image.shape, plan)
    return cv2.resize(np.clip(out, 0, 1), (width, height), interpolation=cv2.INTER_CUBIC)


def sharpened(image: np.ndarray, weight: float = 0.5, radius: int = 51, threshold: float = 10 / 255) -> np.ndarray:
    """Unsharp masking where the residual exceeds `threshold`, with a soft mask (BasicSR's USMSharp)."""
    sigma = 0.3 * ((radius - 1) / 2 - 1) + 0.8
    residual = image - gaussian_blur(image, sigma)
    mask = gaussian_blur((np.abs(residual) > threshold).astype(np.float32), sigma)
    return image + mask * (np.clip(image + weight * residual, 0, 1) - image)


def damage(plan: dict[str, Any]) -> float:
    """An order of plans by what they destroy: a linear fit to PSNR and SSIM (rank correlation 0.8 on photographs)."""
    first, second = plan["first"], plan["second"]
    shrink = 0.5 * np.log(max(1, 1 / first["scale"])) + 0.9 * np.log(max(1, 1 / second["scale"]))
    noise = 0.01 * _noise_level(first["noise"]) * min(1, first["scale"]) + 0.03 * _noise_level(second["noise"])
    return float(shrink + 0.1 * _width(first["blur"]) + noise)


def _draw_stage(rng: np.random.Generator, stage: Stage, blur: bool) -> dict[str, Any]:
    direction = pick(rng, stage.resize)
    low, high = stage.scale
    scale = {"up": uniform(rng, 1, high), "down": uniform(rng, low, 1), "keep": 1.0}[direction]
    gaussian = bool(rng.random() < GAUSSIAN_PROBABILITY)
    return {
        "blur": draw_blur(rng, stage.sigma) if blur else {},
        "scale": scale,
        "mode": choose(rng, list(_MODES)),
        "noise": {
            "kind": "gaussian" if gaussian else "poisson",
            "level": uniform(rng, *(stage.gaussian if gaussian else stage.poisson)),
            "gray": bool(rng.random() < GRAY_PROBABILITY),
        },
        "jpeg": int(rng.integers(JPEG_QUALITY[0], JPEG_QUALITY[1] + 1)),
    }


def _draw_final_sinc(rng: np.random.Generator) -> dict[str, Any]:
    return draw_sinc(rng, choose(rng, SIZES), np.pi / 3)


def _small(image: np.ndarray, shape: tuple[int, ...], plan: dict[str, Any]) -> np.ndarray:
    out = _resized(image, shape[0] / SCALE, shape[1] / SCALE, plan["resize_back"])
    return filter_image(out, render(plan["sinc"])) if plan["sinc"] else out


def _resized(image: np.ndarray, height: float, width: float, mode: str) -> np.ndarray:
    size = (max(1, round(width)), max(1, round(height)))
    return cv2.resize(image, size, interpolation=_MODES[mode])


def _with_noise(image: np.ndarray, noise: dict[str, Any], rng: np.random.Generator) -> np.ndarray:
    add = add_gaussian if noise["kind"] == "gaussian" else add_poisson
    return np.clip(add(image, rng, noise["level"], noise["gray"]), 0, 1)


def _width(blur: dict[str, Any]) -> float:
    """Rough standard deviation of a drawn kernel, in pixels."""
    return 1 / blur["cutoff"] if blur["family"] == "sinc" else float(np.mean(blur["sigma"]))


def _noise_level(noise: dict[str, Any]) -> float:
    """Standard deviation in 0..255; Poisson at mid-gray is about 11 of 255."""
    return float(noise["level"]) * (1 if noise["kind"] == "gaussian" else 11)
