"""Setting text: line breaks, sizes, positions, boxes and contrast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from builders.text_render.fonts import Font
from schemas.records import Entity

Box = tuple[float, float, float, float]
Colour = tuple[int, int, int]
Align = Literal["left", "center", "right"]

LEADING = 1.25  # distance of baselines, in font sizes
_SHRINK = 0.92
_ANCHOR = {"left": 0.0, "center": 0.5, "right": 1.0}


@dataclass(frozen=True)
class Block:
    """Text to be set inside of a region; a line break in it is kept.

    Args:
        region: (x0, y0, x1, y1) in pixels.
        size: font size to start from; it shrinks until the text fits.
        align: of the lines; across, the block stands in the middle of its region, or at its top.
    """

    text: str
    region: Box
    size: float
    align: Align = "center"
    top: bool = False


@dataclass(frozen=True)
class Line:
    """One line of text: left end of its baseline in pixels, and the font size."""

    text: str
    x: float
    y: float
    size: int
    block: int = 0

    def box(self, font: Font, start: int = 0, end: int | None = None) -> Box:
        """(x0, y0, x1, y1) of the ink of the characters from `start` to `end`."""
        sized = font.at(self.size)
        left = self.x + sized.getlength(self.text[:start])
        x0, y0, x1, y1 = sized.getbbox(self.text[start:end], anchor="ls")
        return left + x0, self.y + y0, left + x1, self.y + y1


def place(blocks: Sequence[Block], font: Font, least: int) -> list[Line] | None:
    """Lines of all blocks, each at the largest size that fits its region, or None if one does not fit at `least` px."""
    lines: list[Line] = []
    for i, block in enumerate(blocks):
        set_ = _fit(block, font, least)
        if set_ is None:
            return None
        lines += _position(block, font, *set_, i)
    return lines


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str] | None:
    """Greedy line breaks at spaces, or None if a word is wider than the line."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) <= width:
                line = longer
            elif font.getlength(word) <= width:
                lines.append(line)
                line = word
            else:
                return None
        lines.append(line)
    return [line for line in lines if line]


def draw(canvas: np.ndarray, lines: Sequence[Line], font: Font, ink: Colour) -> np.ndarray:
    """uint8 RGB [H, W, 3] with the lines written on it."""
    image = Image.fromarray(canvas)
    pen = ImageDraw.Draw(image)
    for line in lines:
        pen.text((line.x, line.y), line.text, fill=ink, font=font.at(line.size), anchor="ls")
    return np.asarray(image)


def entities(lines: Sequence[Line], font: Font) -> list[Entity]:
    """Every line, and every word after its line, with its box."""
    found = []
    for line in lines:
        found.append(Entity(phrase=line.text, label="line", box=_rounded(line.box(font))))
        start = 0
        for word in line.text.split(" "):
            box = line.box(font, start, start + len(word))
            found.append(Entity(phrase=word, label="word", box=_rounded(box)))
            start += len(word) + 1
    return found


def luminance_behind(canvas: np.ndarray, boxes: Sequence[Box]) -> np.ndarray:
    """Relative luminance, float [2 n], of the darkest and the brightest percentile of the pixels of every box."""
    inside = (canvas[max(0, round(y0)) : round(y1) + 1, max(0, round(x0)) : round(x1) + 1] for x0, y0, x1, y1 in boxes)
    return np.concatenate([np.percentile(relative_luminance(pixels), (1, 99)) for pixels in inside])


def least_contrast(ink: Colour, luminance: np.ndarray) -> float:
    """The lowest contrast ratio, 1..21, of the ink with any of these: (L1 + 0.05) / (L2 + 0.05), WCAG 2.2."""
    own = relative_luminance(np.array(ink, np.uint8)) + 0.05
    ratio = own / (luminance + 0.05)
    return round(float(np.maximum(ratio, 1 / ratio).min()), 3)


def relative_luminance(pixels: np.ndarray) -> np.ndarray:
    """WCAG 2.2 relative luminance, 0..1, of uint8 sRGB [..., 3]."""
    value = pixels.astype(np.float32) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722], np.float32)


def _fit(block: Block, font: Font, least: int) -> tuple[int, list[str]] | None:
    width, height = block.region[2] - block.region[0], block.region[3] - block.region[1]
    size = max(block.size, least)
    while size >= least:
        lines = wrap(block.text, font.at(int(size)), width)
        if lines and len(lines) * LEADING * int(size) <= height:
            return int(size), lines
        size *= _SHRINK
    return None


def _position(block: Block, font: Font, size: int, lines: Sequence[str], index: int) -> list[Line]:
    x0, y0, x1, y1 = block.region
    slack = 0 if block.top else (y1 - y0 - len(lines) * LEADING * size) / 2
    ascent, descent = font.at(size).getmetrics()
    first = y0 + slack + (LEADING * size - ascent - descent) / 2 + ascent
    share = _ANCHOR[block.align]
    return [
        Line(text, x0 + share * (x1 - x0 - font.at(size).getlength(text)), first + i * LEADING * size, size, index)
        for i, text in enumerate(lines)
    ]


def _rounded(box: Box) -> Box:
    x0, y0, x1, y1 = (round(side, 1) for side in box)
    return x0, y0, x1, y1
