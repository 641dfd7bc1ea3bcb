"""What an instruction says about its pair, each as a measurement that can fail.

A claim sees decoded pixels only, the source and the target, so it also finds what went wrong after the edit was made:
a pair that was swapped, an instruction of another pair, an edit that was applied in part.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import cv2
import numpy as np

from builders.edit_pairs.colour import colour_shares, to_lab

Scores = dict[str, float]
_BAND = 3  # pixels on each side of an outline that are compared
_CLEAR_EDGE = 5.0  # CIE76 colour difference across an outline: below it, there is nothing to see


@dataclass(frozen=True)
class Finding:
    """What a claim measured, and the slug of the fault if it does not hold; `said` is what a judge wrote."""

    scores: Scores
    fault: str = ""
    value: float = 0.0
    said: str = ""


class Claim(ABC):
    """Something that has to be true of a pair."""

    @abstractmethod
    def check(self, source: np.ndarray, target: np.ndarray) -> Finding:
        """Measure it on uint8 RGB [H, W, 3] images of one size."""


@dataclass(frozen=True)
class Coloured(Claim):
    """The region bears the colour name in one picture of the pair, normally the target, and not in the other."""

    region: np.ndarray = field(repr=False)
    colour: str
    in_target: bool = True
    least: ClassVar[float] = 0.5
    most_before: ClassVar[float] = 0.3

    def check(self, source: np.ndarray, target: np.ndarray) -> Finding:
        order = (source, target) if self.in_target else (target, source)
        before, after = (colour_shares(image[self.region])[self.colour] for image in order)
        scores = {"colour_before": before, "colour_after": after}
        if after < self.least:
            return Finding(scores, "wrong_colour", after)
        return Finding(scores, "colour_was_there", before) if before > self.most_before else Finding(scores)


@dataclass(frozen=True)
class Visible(Claim):
    """The outline of a thing can be seen in one picture of the pair and not in the other.

    Judged piece by piece along the outline, so that a thing of which a part is left is found.
    """

    region: np.ndarray = field(repr=False)
    in_target: bool
    least_share: ClassVar[float] = 0.5
    most_left: ClassVar[float] = 0.25

    def check(self, source: np.ndarray, target: np.ndarray) -> Finding:
        shown, other = (target, source) if self.in_target else (source, target)
        there, elsewhere = (outline_contrast(image, self.region) for image in (shown, other))
        clear = there > _CLEAR_EDGE
        share = float(clear.mean()) if clear.size else 0.0
        left = float((elsewhere > np.maximum(_CLEAR_EDGE, 0.5 * there))[clear].mean()) if clear.any() else 1.0
        scores = {"outline_visible": share, "outline_left": left}
        if share < self.least_share:
            return Finding(scores, "not_visible", share)
        if left > self.most_left:
            return Finding(scores, "was_there" if self.in_target else "still_there", left)
        return Finding(scores)


@dataclass(frozen=True)
class Seamless(Claim):
    """In the target, nothing is to be seen along the rim of a region that was filled."""

    region: np.ndarray = field(repr=False)
    most: ClassVar[float] = 4.0  # CIE76, 95th percentile

    def check(self, source: np.ndarray, target: np.ndarray) -> Finding:
        contrast = outline_contrast(target, self.region)
        seam = float(np.quantile(contrast, 0.95)) if contrast.size else 0.0
        return Finding({"seam": seam}, "visible_seam" if seam > self.most else "", seam)


@dataclass(frozen=True)
class Shifted(Claim):
    """Median lightness or chroma of the region goes up (sign 1) or down (-1) by at least `least` CIE units."""

    region: np.ndarray = field(repr=False)
    quantity: str
    sign: int
    least: float

    def check(self, source: np.ndarray, target: np.ndarray) -> Finding:
        before, after = (self._median(image) for image in (source, target))
        change = self.sign * (after - before)
        scores = {f"{self.quantity}_before": before, f"{self.quantity}_after": after}
        return Finding(scores, f"wrong_{self.quantity}", change) if change < self.least else Finding(scores)

    def _median(self, image: np.ndarray) -> float:
        lab = to_lab(image[self.region])
        return float(np.median(lab[:, 0] if self.quantity == "lightness" else np.hypot(lab[:, 1], lab[:, 2])))


@dataclass(frozen=True)
class Placed(Claim):
    """A word for a place agrees with where a region lies, among `others` or, if there are none, in the picture.

    In every direction that the word names, the region's centre lies further by at least `least` of the picture's side.
    """

    region: np.ndarray = field(repr=False)
    word: str
    others: tuple[np.ndarray, ...] = field(default=(), repr=False)
    least: ClassVar[float] = 0.03

    def check(self, source: np.ndarray, target: np.ndarray) -> Finding:
        height, width = self.region.shape
        here = centre(self.region)
        rivals = [centre(other) for other in self.others] or [(width / 2, height / 2)]
        margins = [
            sign * (here[axis] - rival[axis]) / (width, height)[axis]
            for rival in rivals
            for part, (axis, sign) in DIRECTIONS.items()
            if part in self.word.split()
        ]
        worst = min(margins, default=1.0)
        return Finding({"place_margin": worst}, "wrong_place" if worst < self.least else "", worst)


@dataclass(frozen=True)
class Moved(Claim):
    """What lies in the region is found again in the target, in the direction that the word says."""

    region: np.ndarray = field(repr=False)
    word: str
    least: ClassVar[float] = 0.03

    def check(self, source: np.ndarray, target: np.ndarray) -> Finding:
        x, y, w, h = cv2.boundingRect(self.region.astype(np.uint8))
        shape = np.dstack([self.region[y : y + h, x : x + w].astype(np.uint8)] * 3)
        surface = cv2.matchTemplate(target, source[y : y + h, x : x + w], cv2.TM_SQDIFF, mask=shape)
        top, left = np.unravel_index(int(surface.argmin()), surface.shape)
        axis, sign = DIRECTIONS[self.word]
        shift = sign * int((left - x, top - y)[axis]) / target.shape[1 - axis]
        return Finding({"moved_by": shift}, "wrong_direction" if shift < self.least else "", shift)


@dataclass(frozen=True)
class Mirrored(Claim):
    """What lies in the region looks more like its mirror image than like what it was."""

    region: np.ndarray = field(repr=False)

    def check(self, source: np.ndarray, target: np.ndarray) -> Finding:
        x, y, w, h = cv2.boundingRect(self.region.astype(np.uint8))
        window = (slice(y, y + h), slice(x, x + w))
        both = self.region[window] & self.region[window][:, ::-1]
        before, after = source[window], target[window]
        as_mirrored, as_it_was = (
            float(cv2.absdiff(np.ascontiguousarray(reference), after)[both].mean()) if both.any() else 0.0
            for reference in (before[:, ::-1], before)
        )
        scores = {"difference_to_mirrored": as_mirrored, "difference_to_source": as_it_was}
        fault = "" if as_mirrored < 0.5 * as_it_was else "not_mirrored"
        return Finding(scores, fault, as_mirrored)


# Word -> (axis, sign): 0 is horizontal, and larger is to the right and down.
DIRECTIONS = {
    "left": (0, -1), "right": (0, 1), "top": (1, -1), "upper": (1, -1), "bottom": (1, 1), "lower": (1, 1),
    "up": (1, -1), "down": (1, 1),
}  # fmt: skip


def centre(mask: np.ndarray) -> tuple[float, float]:
    """(x, y) of a boolean mask's centroid.

    Raises:
        ValueError: the mask is empty.
    """
    y, x = np.nonzero(mask)
    if not len(x):
        raise ValueError("an empty mask has no centre")
    return float(x.mean()), float(y.mean())


def outline_contrast(image: np.ndarray, region: np.ndarray) -> np.ndarray:
    """CIE76 difference between just inside and just outside of a region, float32 [n] along its outline."""
    kernel = np.ones((2 * _BAND + 1,) * 2, np.uint8)
    solid = region.astype(np.uint8)
    x, y, w, h = cv2.boundingRect(solid)
    m = 3 * _BAND
    window = (slice(max(0, y - m), y + h + m), slice(max(0, x - m), x + w + m))
    solid, lab = solid[window], to_lab(image[window])
    outer = cv2.dilate(solid, kernel) - solid
    inner = solid - cv2.erode(solid, kernel, borderValue=1)
    means = [_local_mean(lab, band.astype(np.float32)) for band in (inner, outer)]
    line = solid - cv2.erode(solid, np.ones((3, 3), np.uint8), borderValue=1)
    use = (line > 0) & (means[0][1] > 0) & (means[1][1] > 0)
    return np.linalg.norm(means[0][0] - means[1][0], axis=2)[use]


def _local_mean(lab: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    size = (2 * _BAND + 3,) * 2
    total = cv2.blur(weight, size, borderType=cv2.BORDER_CONSTANT)
    mean = cv2.blur(lab * weight[..., None], size, borderType=cv2.BORDER_CONSTANT) / np.maximum(total, 1e-6)[..., None]
    return mean, total * (total > 1e-3)
