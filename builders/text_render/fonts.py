"""Fonts with their licences: those that matplotlib ships, or files that a recipe names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from PIL import ImageFont

from filters.packaged import PackagedModel

SHIPPED = PackagedModel("matplotlib fonts", "matplotlib", "matplotlib", "mpl-data/fonts/ttf", ("fontTools",))
_DEJAVU, _STIX = "Bitstream-Vera (DejaVu)", "OFL-1.1"


@dataclass(frozen=True)
class Font:
    """A font file. `look` is how an instruction calls it: an adjective, e.g. "bold serif"."""

    path: Path
    family: str
    look: str
    license: str

    def covers(self, text: str) -> bool:
        """Whether there is a glyph for every character (line breaks and spaces aside)."""
        return {ord(c) for c in text if not c.isspace()} <= _characters(self.path)

    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """The font at `size` px per em, laid out without libraries that may be missing elsewhere."""
        return _sized(self.path, size)


_SHIPPED_FILES = {
    "DejaVuSans.ttf": ("DejaVu Sans", "sans-serif", _DEJAVU),
    "DejaVuSans-Bold.ttf": ("DejaVu Sans", "bold sans-serif", _DEJAVU),
    "DejaVuSans-Oblique.ttf": ("DejaVu Sans", "slanted sans-serif", _DEJAVU),
    "DejaVuSans-BoldOblique.ttf": ("DejaVu Sans", "bold slanted sans-serif", _DEJAVU),
    "DejaVuSerif.ttf": ("DejaVu Serif", "slab serif", _DEJAVU),
    "DejaVuSerif-Bold.ttf": ("DejaVu Serif", "bold slab serif", _DEJAVU),
    "DejaVuSerif-Italic.ttf": ("DejaVu Serif", "italic slab serif", _DEJAVU),
    "DejaVuSansMono.ttf": ("DejaVu Sans Mono", "monospaced", _DEJAVU),
    "DejaVuSansMono-Bold.ttf": ("DejaVu Sans Mono", "bold monospaced", _DEJAVU),
    "STIXGeneral.ttf": ("STIX General", "serif", _STIX),
    "STIXGeneralBol.ttf": ("STIX General", "bold serif", _STIX),
    "STIXGeneralItalic.ttf": ("STIX General", "italic serif", _STIX),
    "STIXGeneralBolIta.ttf": ("STIX General", "bold italic serif", _STIX),
}


def shipped_fonts() -> tuple[Font, ...]:
    """The fonts inside the installed matplotlib.

    Raises:
        filters.models.ModelMissing: it is not installed.
    """
    return tuple(Font(SHIPPED.path / file, *rest) for file, rest in _SHIPPED_FILES.items())


def fonts_for(text: str, fonts: Iterable[Font]) -> list[Font]:
    """Those that can write `text`."""
    return [font for font in fonts if font.covers(text)]


@lru_cache(maxsize=256)
def _sized(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@cache
def _characters(path: Path) -> frozenset[int]:
    from fontTools.ttLib import TTFont

    with TTFont(path, lazy=True) as font:
        return frozenset(font.getBestCmap())
