"""Colour words measured on pixels, and colours given to things without touching their lightness.

CIE L*a*b* in its own units (L 0..100). A pixel below `NEUTRAL_CHROMA` has no hue: it is black, grey or white.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

NEUTRAL_CHROMA = 11.0
_BLACK, _WHITE = 22.0, 84.0


@dataclass(frozen=True)
class Paint:
    """A colour to give: hue in degrees and chroma of CIE LCh, and the median lightness at which it bears its name."""

    hue: float
    chroma: float
    lightness: tuple[float, float]


PAINTS: dict[str, Paint] = {
    "red": Paint(30, 62, (24, 58)),
    "orange": Paint(62, 66, (52, 76)),
    "yellow": Paint(92, 66, (72, 94)),
    "green": Paint(142, 42, (28, 80)),
    "teal": Paint(195, 31, (30, 78)),
    "blue": Paint(275, 50, (24, 68)),
    "purple": Paint(314, 43, (24, 62)),
    "pink": Paint(358, 35, (60, 86)),
    "brown": Paint(60, 34, (24, 48)),
}
# Hue sectors in degrees, by the names that people give to them; brown and pink are split off by lightness below.
_SECTORS = (
    (12, "pink"), (45, "red"), (75, "orange"), (107, "yellow"), (170, "green"), (228, "teal"), (300, "blue"),
    (335, "purple"), (360, "pink"),
)  # fmt: skip
NAMES = ("black", "grey", "white", *PAINTS, "beige")
_PALE = ("white", "grey", "beige", "cream")


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """float32 L*a*b* of uint8 RGB [..., 3] (two or three axes)."""
    shape = rgb.shape
    return cv2.cvtColor((rgb.reshape(1, -1, 3) / 255).astype(np.float32), cv2.COLOR_RGB2Lab).reshape(shape)


def to_rgb(lab: np.ndarray) -> np.ndarray:
    """uint8 RGB of float32 L*a*b*, clipped to the gamut."""
    rgb = cv2.cvtColor(lab.reshape(1, -1, 3).astype(np.float32), cv2.COLOR_Lab2RGB).reshape(lab.shape)
    return np.rint(np.clip(rgb, 0, 1) * 255).astype(np.uint8)


def name_pixels(rgb: np.ndarray) -> np.ndarray:
    """Index into `NAMES` for every pixel of uint8 RGB [n, 3]."""
    lab = to_lab(rgb)
    light, chroma = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2])
    hue = np.degrees(np.arctan2(lab[:, 2], lab[:, 1])) % 360
    bounds, sectors = zip(*_SECTORS, strict=True)
    named = np.array([NAMES.index(sector) for sector in sectors])[np.searchsorted(bounds, hue, side="right") % 9]
    warm = (hue >= 20) & (hue < 85)
    named[warm & (light < 52) & (chroma < 46)] = NAMES.index("brown")
    named[warm & (light < 40) & (hue > 48)] = NAMES.index("brown")
    named[((hue < 40) | (hue >= 335)) & (light >= 62)] = NAMES.index("pink")
    named[(hue >= 300) & (hue < 312) & (chroma > 62)] = NAMES.index("blue")  # as the blue of a screen
    named[(hue >= 40) & (hue < 110) & (light >= 58) & (chroma < 27)] = NAMES.index("beige")
    neutral = np.select([light < _BLACK, light > _WHITE], [0, 2], 1)
    return np.where((chroma < NEUTRAL_CHROMA) | (light < 12), neutral, named)


def colour_shares(rgb: np.ndarray) -> dict[str, float]:
    """Share of the pixels of uint8 RGB [n, 3] that bear each name."""
    counts = np.bincount(name_pixels(rgb), minlength=len(NAMES))
    return {name: float(count / max(1, len(rgb))) for name, count in zip(NAMES, counts, strict=True)}


def dominant_colour(rgb: np.ndarray) -> tuple[str, float]:
    """The most frequent colour name and its share."""
    shares = colour_shares(rgb)
    name = max(shares, key=lambda candidate: shares[candidate])
    return name, shares[name]


def nameable_colour(rgb: np.ndarray, phrase: str) -> str:
    """The colour that people would call a thing with these uint8 RGB [n, 3] pixels, or "" if that is not clear.

    What its phrase says counts, as long as the pixels do not contradict: people see a white mug in the shade as white.
    """
    measured, share = dominant_colour(rgb)
    said = [word for word in phrase.lower().replace("gray", "grey").split() if word in (*NAMES, *_PALE)]
    if len(said) == 1:
        return said[0] if said[0] == measured or {said[0], measured} <= set(_PALE) else ""
    return "" if said or measured in _PALE or share < 0.7 else measured


def possible_paints(rgb: np.ndarray) -> list[str]:
    """Paints that would keep their name on pixels as light as these uint8 RGB [n, 3] ones."""
    light = float(np.median(to_lab(rgb)[:, 0]))
    return [name for name, paint in PAINTS.items() if paint.lightness[0] <= light <= paint.lightness[1]]


def paint(rgb: np.ndarray, name: str) -> np.ndarray:
    """uint8 RGB [n, 3] with the hue and saturation of a paint; lightness, and with it shading and texture, stays.

    Variations of saturation survive in part, and the deepest shadows and highlights stay neutral.
    """
    lab = to_lab(rgb)
    light, chroma = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2])
    typical = max(float(np.median(chroma)), NEUTRAL_CHROMA)
    texture = np.clip(0.75 + 0.25 * chroma / typical, 0.6, 1.2)
    shade = np.clip(light / 25, 0, 1) * np.clip((100 - light) / 12, 0, 1)
    target = PAINTS[name].chroma * texture * shade
    hue = np.radians(PAINTS[name].hue)
    return to_rgb(np.stack([light, target * np.cos(hue), target * np.sin(hue)], axis=1))
