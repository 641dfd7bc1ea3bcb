"""Condition maps that need no weights: edges, line art, line segments, luminance, colour blocks, source depth.

Every detector draws its own parameters and stores them, so that a model sees more than one setting (ControlNet trains
with random Canny thresholds) and any map can be rendered again. White means *there is something here*, or *near*.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from types import ModuleType
from typing import Any, ClassVar

import cv2
import numpy as np

from builders.base import Rejected
from schemas.records import Op

Params = dict[str, Any]
Limits = Mapping[str, tuple[float, float]]
MIN_CONTRAST = 5.0  # standard deviation, of 255: a flatter map says next to nothing


@dataclass(frozen=True)
class ConditionMap:
    """A map of a photo.

    Args:
        image: uint8 [H, W] or RGB [H, W, 3], exactly the size of the photo.
        params: what the detector drew, as plain JSON values.
        stats: measurements that the gates compare.
        words: fields for instruction templates, e.g. which colour stands for what.
    """

    image: np.ndarray
    params: Params
    stats: dict[str, float] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)


class Detector(ABC):
    """One kind of map: `detector(pixels, rng)` draws parameters, renders and gates.

    `limits` are inclusive bounds on the stats of a map. `missing` is why no map can be made at all, or "". `made_by` is
    the annotator of the artefact from which the map is drawn, if there is one.
    """

    name: ClassVar[str]
    limits: ClassVar[Limits] = {}
    missing: str = ""
    made_by: Op | None = None

    @property
    def version(self) -> str:
        """The library that draws the map, with its version."""
        return f"opencv {cv2.__version__}"

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> Params:
        """Random parameters, as plain JSON values."""

    @abstractmethod
    def render(self, pixels: np.ndarray, params: Params) -> ConditionMap:
        """The map of a uint8 RGB [H, W, 3] photo: a pure function, so stored parameters give it again."""

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> ConditionMap | Rejected:
        """A map of a uint8 RGB [H, W, 3] photo, or the gate that refused it.

        Raises:
            ValueError: the map does not have the size of the photo.
        """
        if self.missing:
            return Rejected(self.missing)
        rendered = self.render(pixels, self.draw(rng))
        if rendered.image.shape[:2] != pixels.shape[:2]:
            raise ValueError(f"{self.name} map is {rendered.image.shape[:2]}, its photo {pixels.shape[:2]}")
        stats = {"contrast": float(cv2.meanStdDev(rendered.image)[1].max()), **rendered.stats}
        refusal = _outside({"contrast": (MIN_CONTRAST, math.inf), **self.limits}, stats)
        return refusal or replace(rendered, stats=stats)


class Canny(Detector):
    """Canny edges by controlnet_aux, white on black, with thresholds around the usual 100/200."""

    name = "canny"
    limits: ClassVar[Limits] = {"density": (0.0, 0.30), "density_at_512": (0.01, math.inf)}

    @property
    def version(self) -> str:
        return _controlnet_aux_version()

    def draw(self, rng: np.random.Generator) -> Params:
        low = int(rng.integers(50, 151))
        return {"low_threshold": low, "high_threshold": low + int(rng.integers(50, 151))}

    def render(self, pixels: np.ndarray, params: Params) -> ConditionMap:
        # Replication is also how Canny itself continues an image, so the padding makes no edges.
        padded, resolution = _pad_to_64(pixels, 0, cv2.BORDER_REPLICATE)
        detector = controlnet_aux().CannyDetector()
        edges = detector(padded, detect_resolution=resolution, image_resolution=resolution, **params)
        image = _crop(edges, pixels)
        return ConditionMap(image, params, line_density(image))


class Lineart(Detector):
    """Standard line art by controlnet_aux: how much darker a pixel is than its surroundings, white on black."""

    name = "lineart"
    limits: ClassVar[Limits] = {"density": (0.01, 0.45)}

    @property
    def version(self) -> str:
        return _controlnet_aux_version()

    def draw(self, rng: np.random.Generator) -> Params:
        # "guassian" is how the library spells it.
        return {"guassian_sigma": round(float(rng.uniform(3, 9)), 2), "intensity_threshold": int(rng.integers(4, 13))}

    def render(self, pixels: np.ndarray, params: Params) -> ConditionMap:
        # OpenCV blurs float images with a kernel of radius 4 sigma and reflects at the border.
        radius = math.ceil(4 * params["guassian_sigma"]) + 1
        padded, resolution = _pad_to_64(pixels, radius, cv2.BORDER_REFLECT_101)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the median of no line at all: a gate tells
            ink = controlnet_aux().LineartStandardDetector()(
                padded, detect_resolution=resolution, output_type="np", **params
            )
        image = _crop(ink, pixels)
        return ConditionMap(image, params, {"density": share(image >= 64)})


class Lines(Detector):
    """Straight line segments (LSD: von Gioi et al., 2012), one pixel wide, white on black."""

    name = "lines"
    limits: ClassVar[Limits] = {"segments": (10, math.inf), "density_at_512": (0.005, math.inf)}

    def draw(self, rng: np.random.Generator) -> Params:
        return {"min_length": round(float(rng.uniform(0.03, 0.06)), 3)}  # of the shorter side

    def render(self, pixels: np.ndarray, params: Params) -> ConditionMap:
        found = cv2.createLineSegmentDetector().detect(_gray(pixels))[0]
        ends = np.empty((0, 2, 2)) if found is None else found.reshape(-1, 2, 2)
        lengths = np.linalg.norm(ends[:, 1] - ends[:, 0], axis=1)
        ends = ends[lengths >= params["min_length"] * min(pixels.shape[:2])]
        image = np.zeros(pixels.shape[:2], np.uint8)
        cv2.polylines(image, list(np.rint(ends).astype(np.int32)), False, 255)
        return ConditionMap(image, params, {"segments": float(len(ends)), **line_density(image)})


class Luminance(Detector):
    """ITU-R BT.601 luma: the photo in grayscale."""

    name = "luminance"

    def draw(self, rng: np.random.Generator) -> Params:
        return {}

    def render(self, pixels: np.ndarray, params: Params) -> ConditionMap:
        return ConditionMap(_gray(pixels), params)


class Palette(Detector):
    """Mean colours of a coarse grid of blocks, of which `cells` stand along the longer side."""

    name = "palette"

    def draw(self, rng: np.random.Generator) -> Params:
        return {"cells": int(rng.choice([8, 12, 16, 24, 32]))}

    def render(self, pixels: np.ndarray, params: Params) -> ConditionMap:
        height, width = pixels.shape[:2]
        scale = min(1.0, params["cells"] / max(height, width))
        rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
        blocks = cv2.resize(pixels, (columns, rows), interpolation=cv2.INTER_AREA)
        image = cv2.resize(blocks, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
        return ConditionMap(image, params, words={"columns": str(columns), "rows": str(rows)})


class Depth(Detector):
    """Depth as gray values: white is near, black is far or unknown."""

    name = "depth"
    limits: ClassVar[Limits] = {"range": (0.2, math.inf), "known": (0.7, 1.0)}

    def __init__(self, inverse_depth: np.ndarray | None, made_by: Op | None = None) -> None:
        """`inverse_depth` is uint16 [H, W]: larger is nearer, 0 is unknown."""
        self.made_by = made_by
        self.inverse_depth = np.zeros((1, 1), np.uint16) if inverse_depth is None else inverse_depth
        self.missing = "" if self.inverse_depth.any() else "no_depth"

    def draw(self, rng: np.random.Generator) -> Params:
        return {"far_percentile": 2, "near_percentile": 98}

    def render(self, pixels: np.ndarray, params: Params) -> ConditionMap:
        raw = self.inverse_depth.astype(np.float32)
        far = float(np.percentile(raw[raw > 0], params["far_percentile"]))
        near = float(np.percentile(raw[raw > 0], params["near_percentile"]))
        image = np.rint(np.clip((raw - far) / max(near - far, 1.0), 0, 1) * 255).astype(np.uint8)
        return ConditionMap(image, params, {"range": (near - far) / near, "known": share(raw > 0)})


def share(mask: np.ndarray) -> float:
    """The share of pixels that are True."""
    return float(np.count_nonzero(mask) / mask.size)


def _outside(limits: Limits, stats: Mapping[str, float]) -> Rejected | None:
    for key, (low, high) in limits.items():
        if not stats[key] >= low:
            return Rejected(f"{key}_too_low", stats[key])
        if not stats[key] <= high:
            return Rejected(f"{key}_too_high", stats[key])
    return None


def line_density(image: np.ndarray) -> dict[str, float]:
    """Share of line pixels, and what it would be at 512 px: lines one pixel wide cover less of a larger photo."""
    density = share(image > 0)
    return {"density": density, "density_at_512": density * min(image.shape) / 512}


def _gray(pixels: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def _pad_to_64(pixels: np.ndarray, margin: int, border: int) -> tuple[np.ndarray, int]:
    """The photo with at least `margin` more pixels below and at the right, and its resolution for controlnet_aux.

    controlnet_aux resizes every image to multiples of 64 around that resolution; sides that already are multiples
    pass unchanged, so the map needs only a crop and stays aligned to the pixel.
    """
    height, width = pixels.shape[:2]
    tall, wide = (-(-(side + margin) // 64) * 64 if side % 64 else side for side in (height, width))
    return cv2.copyMakeBorder(pixels, 0, tall - height, 0, wide - width, border), min(tall, wide)


def _crop(rendered: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """One channel of a padded gray map, cut to the photo."""
    return np.ascontiguousarray(rendered[: pixels.shape[0], : pixels.shape[1], 0])


def _controlnet_aux_version() -> str:
    return f"controlnet_aux {controlnet_aux().__version__}, opencv {cv2.__version__}"


@cache
def controlnet_aux() -> ModuleType:
    """The library, imported on first use: it loads torch and all its detectors, and warns about parts not installed.

    Raises:
        ImportError: it is not installed, or mediapipe >= 0.10.30 is, which breaks its import.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import controlnet_aux
    except (ImportError, AttributeError) as error:
        raise ImportError(
            "this map needs controlnet_aux: pip install controlnet_aux, and uninstall mediapipe"
        ) from error
    return controlnet_aux
