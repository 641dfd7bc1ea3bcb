"""What an operation works with: the photograph, its things, and the annotators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import cv2
import numpy as np

from builders.annotators.base import Editor, Inpainter
from builders.base import Rejected, SourceImage
from builders.edit_pairs.colour import to_lab
from builders.edit_pairs.edit import Edit, grow
from builders.edit_pairs.things import MaskFinder, Thing, iter_things

_RING = 0.02  # width of the surroundings that are looked at, as a share of the shorter side
_GRAIN = 0.005  # σ of the blur that keeps texture out of the comparison, likewise
_WORST = 0.96  # quantile: a thread that crosses the rim shows up, a few odd pixels do not


@dataclass(frozen=True)
class Scene:
    """One photograph to be edited.

    Args:
        area: range of a thing's share of the picture.
        surroundings: limit of `uneven`.
        editor: None if the recipe has none.
        inpainting, editing: `model` and `revision` of the inpainter, if it is a model, and of the editor.
    """

    image: SourceImage
    inpainter: Inpainter
    masks: MaskFinder
    area: tuple[float, float]
    surroundings: float
    editor: Editor | None = None
    inpainting: dict[str, str] = field(default_factory=dict)
    editing: dict[str, str] = field(default_factory=dict)

    @property
    def pixels(self) -> np.ndarray:
        return self.image.pixels

    @property
    def side(self) -> int:
        """The shorter one, in pixels."""
        return min(self.pixels.shape[:2])

    def edit_thing(
        self,
        rng: np.random.Generator,
        make: Callable[[Thing], Edit | Rejected],
        suits: Callable[[Thing], bool] = lambda _: True,
        fits: Callable[[Thing], bool] = lambda _: True,
    ) -> Edit | Rejected:
        """The first edit that can be made of a thing, in random order; or why the last one could not.

        Args:
            make: the edit of one thing.
            suits: asked before the mask is found.
            fits: asked with the mask there.
        """
        low, high = self.area
        outcome: Edit | Rejected = Rejected("no_suitable_thing")
        for thing in iter_things(self.image, self.masks, rng):
            if suits(thing) and low <= thing.area <= high and fits(thing):
                outcome = make(thing)
                if isinstance(outcome, Edit):
                    break
        return outcome

    def uneven(self, pixels: np.ndarray, hole: np.ndarray, ignore: np.ndarray | None = None) -> float:
        """How far the colours around a hole are from a smooth gradient, CIE76; 0 if the hole has no surroundings.

        Args:
            pixels: uint8 RGB [H, W, 3].
            hole: boolean [H, W].
            ignore: boolean [H, W], surroundings that do not count.
        """
        ring = grow(hole, max(3, round(_RING * self.side))) & ~hole
        if ignore is not None:
            ring &= ~ignore
        return unevenness(pixels, ring, _GRAIN * self.side)

    def fill(self, hole: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float] | Rejected:
        """The picture with the hole filled and how uneven its surroundings are, or "structured_surroundings"."""
        value = self.uneven(self.pixels, hole)
        if value > self.surroundings:
            return Rejected("structured_surroundings", value)
        return self.inpainter.inpaint(self.pixels, hole, "", rng), value


def unevenness(pixels: np.ndarray, where: np.ndarray, sigma: float) -> float:
    """A high quantile of the CIE76 distance between pixels and the linear gradient that fits them best."""
    y, x = np.nonzero(where)
    if len(x) < 16:
        return 0.0
    window = (slice(y.min(), y.max() + 1), slice(x.min(), x.max() + 1))
    smooth = cv2.GaussianBlur(pixels[window], (0, 0), max(sigma, 0.5))
    colours = to_lab(smooth[where[window]])
    scale = max(pixels.shape[:2])
    terms = np.stack([np.ones(len(x)), x / scale, y / scale], axis=1).astype(np.float32)
    plane, *_ = np.linalg.lstsq(terms, colours, rcond=None)
    return float(np.quantile(np.linalg.norm(colours - terms @ plane, axis=1), _WORST))
