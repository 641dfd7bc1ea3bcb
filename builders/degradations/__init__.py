"""Degradations by the restoration subtask that undoes them."""

from __future__ import annotations

from collections.abc import Callable

from builders.degradations.base import Degraded
from builders.degradations.blur import blurred
from builders.degradations.colour import cast, colourless, flat
from builders.degradations.compression import compressed, pixelated
from builders.degradations.holes import with_border, with_hole
from builders.degradations.light import dark, overexposed
from builders.degradations.noise import noisy
from builders.degradations.realesrgan import low_resolution
from builders.degradations.weather import hazy, rainy, snowy

DEGRADATIONS: dict[str, Callable[..., Degraded]] = {
    "super_resolution": low_resolution,
    "deblur": blurred,
    "denoise": noisy,
    "derain": rainy,
    "desnow": snowy,
    "dehaze": hazy,
    "low_light": dark,
    "over_exposure": overexposed,
    "jpeg": compressed,
    "pixelate": pixelated,
    "color_cast": cast,
    "contrast": flat,
    "colorize": colourless,
    "inpaint": with_hole,
    "outpaint": with_border,
}

__all__ = ["DEGRADATIONS", "Degraded"]
