"""Edits of text: a line is written on the photograph, or another one is written in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from builders.base import Rejected
from builders.edit_pairs.claims import Coloured, Placed, Visible
from builders.edit_pairs.colour import PAINTS, to_lab, to_rgb
from builders.edit_pairs.edit import Edit, Wording, paste
from builders.edit_pairs.scene import Scene
from builders.text_render.fonts import Font, fonts_for

# What stands on signs, posters and covers.
LINES = (
    "OPEN", "SALE", "WELCOME", "HELLO", "CLOSED", "Good Morning", "Coffee & Tea", "SUMMER", "Happy Birthday", "No. 42",
    "Fresh Bread", "The End", "CHAPTER ONE", "Room 101", "Sunday", "NEW", "50% OFF", "Thank You", "Bon Voyage", "EXIT",
    "Quiet Please", "Be Kind", "Made by Hand", "GRAND HOTEL", "Vol. 7", "Stay Curious", "Spring 1987", "Library",
    "Hotel Europa", "Fish Market", "Winter Tales", "Platform 3", "Bakery", "Museum", "Jazz Night", "Lost & Found",
    "Est. 1924", "Sea View", "Take a Seat", "Garden Party", "Do Not Disturb", "Postcards", "Gate B12", "Cheese",
    "Tomorrow", "Old Town", "Follow the River", "Café Luna", "2 for 1", "Paris", "Tokyo", "Road Trip", "Weekend",
)  # fmt: skip
_INKS = {"white": (97.0, 0.0, 0.0), "black": (6.0, 0.0, 0.0)} | {
    name: (float(np.mean(p.lightness)), p.chroma, p.hue) for name, p in PAINTS.items() if name not in ("brown", "teal")
}
_CONTRAST = 45.0  # CIE76 between ink and ground
_LIGHT_CONTRAST = 30.0  # of which in lightness: letters in another hue alone flicker
_HEIGHT = (0.06, 0.13)  # of the letters, as a share of the shorter side
_MARGIN = 0.05
_CALM = 12.0  # standard deviation of lightness under the line: more is hard to read on
_ROWS = {"top": 0.0, "": 0.5, "bottom": 1.0}
_COLUMNS = {"left": 0.0, "": 0.5, "right": 1.0}


@dataclass(frozen=True)
class Style:
    """How a line is written: font, size in pixels, named ink, and the place as shares of the free room."""

    font: Font
    size: int
    ink: str
    row: str
    column: str

    @property
    def place(self) -> str:
        """In words that follow the text: "at the bottom left"."""
        words = " ".join(filter(None, (self.row, self.column)))
        return f"{'at' if self.row else 'on'} the {words}" if words else "in the middle"


def add_text(scene: Scene, rng: np.random.Generator, fonts: Sequence[Font]) -> Edit | Rejected:
    """A line of text on a calm part of the photograph. Its inverse removes it, with the photograph as the target."""
    text = str(rng.choice(LINES))
    style = _draw_style(scene, rng, fonts, [text])
    if isinstance(style, Rejected):
        return style
    pixels, mask, glyphs = _write(scene.pixels, text, style)
    fields = {"text": text, "ink": style.ink, "place": style.place}
    return Edit(
        pixels,
        mask,
        Wording("text_add", fields),
        Wording("text_remove", fields),
        inverse_subtask="text_remove",
        claims=(Visible(glyphs, in_target=True), Coloured(glyphs, style.ink), *_placed(glyphs, style)),
        params=_params(style, text=text),
    )


def replace_text(scene: Scene, rng: np.random.Generator, fonts: Sequence[Font]) -> Edit | Rejected:
    """One line stands on the photograph and another takes its place, in the same letters."""
    old, new = (str(line) for line in rng.choice(LINES, 2, replace=False))
    style = _draw_style(scene, rng, fonts, [old, new])
    if isinstance(style, Rejected):
        return style
    source, before, old_glyphs = _write(scene.pixels, old, style)
    target, after, new_glyphs = _write(scene.pixels, new, style)
    only_old, only_new = old_glyphs & ~after, new_glyphs & ~before
    return Edit(
        target,
        before | after,
        Wording("text_replace", {"text": old, "new": new}),
        claims=(Coloured(only_old, style.ink, in_target=False), Coloured(only_new, style.ink)),
        params=_params(style, text=new, old=old),
        source=source,
    )


def _draw_style(scene: Scene, rng: np.random.Generator, fonts: Sequence[Font], texts: list[str]) -> Style | Rejected:
    """Font, size, place and ink for which all texts fit and can be read."""
    able = fonts_for("".join(texts), fonts)
    if not able:
        return Rejected("no_font", 0.0, "".join(texts))
    font, height = able[int(rng.integers(len(able)))], float(rng.uniform(*_HEIGHT))
    width, longest = scene.pixels.shape[1], max(texts, key=len)
    size = max(12, round(height * scene.side / 0.72))  # capitals are about 0.72 em high
    while size >= 12 and font.at(size).getlength(longest) > (1 - 2 * _MARGIN) * width:
        size = round(size * 0.85)
    if size < 12:
        return Rejected("text_does_not_fit", size)
    light = to_lab(scene.pixels)
    places = [(row, column) for row in _ROWS for column in _COLUMNS if row or not column]
    for row, column in rng.permutation(places):
        style = Style(font, size, "white", str(row), str(column))
        # A line across half of the picture is neither on its left nor on its right.
        if column and font.at(size).getlength(longest) > 0.5 * width:
            continue
        grounds = [light[_box(scene.pixels, text, style)].reshape(-1, 3) for text in texts]
        ground = np.concatenate(grounds)
        if ground[:, 0].std() > _CALM:
            continue
        inks = [name for name in _INKS if _is_legible(_lab(name), ground.mean(axis=0))]
        if inks:
            return Style(font, size, str(rng.choice(inks)), style.row, style.column)
    return Rejected("no_calm_place", _CALM)


def _is_legible(ink: np.ndarray, ground: np.ndarray) -> bool:
    return bool(np.linalg.norm(ink - ground) >= _CONTRAST and abs(ink[0] - ground[0]) >= _LIGHT_CONTRAST)


def _write(pixels: np.ndarray, text: str, style: Style) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The picture with the line, the pixels that may differ, and those that are mostly ink."""
    rows, columns = _box(pixels, text, style)
    canvas = Image.new("L", pixels.shape[1::-1])
    font = style.font.at(style.size)
    left, top, _, _ = font.getbbox(text)
    ImageDraw.Draw(canvas).text((columns.start - left, rows.start - top), text, fill=255, font=font)
    alpha = np.asarray(canvas, np.float32) / 255
    ink = np.broadcast_to(to_rgb(_lab(style.ink)), pixels.shape)
    written, mask = paste(pixels, ink, alpha)
    return written, mask, alpha > 0.6


def _box(pixels: np.ndarray, text: str, style: Style) -> tuple[slice, slice]:
    left, top, right, bottom = style.font.at(style.size).getbbox(text)
    width, height = round(right - left), round(bottom - top)
    margin = round(_MARGIN * min(pixels.shape[:2]))
    y = margin + round(_ROWS[style.row] * (pixels.shape[0] - 2 * margin - height))
    x = margin + round(_COLUMNS[style.column] * (pixels.shape[1] - 2 * margin - width))
    x = max(0, x)
    return slice(y, y + height), slice(x, x + width)


def _placed(glyphs: np.ndarray, style: Style) -> tuple[Placed, ...]:
    words = " ".join(filter(None, (style.row, style.column)))
    return (Placed(glyphs, words),) if words else ()


def _params(style: Style, **texts: str) -> dict[str, Any]:
    return {
        **texts,
        "font": style.font.path.name,
        "font_license": style.font.license,
        "size": style.size,
        "ink": style.ink,
        "place": style.place,
    }


def _lab(ink: str) -> np.ndarray:
    light, chroma, hue = _INKS[ink]
    return np.array([light, chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))], np.float32)
