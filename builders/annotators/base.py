"""The small interfaces behind which annotators with and without weights stand."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Inpainter(Protocol):
    """Fills a region of a picture."""

    @property
    def name(self) -> str:
        """Enters the provenance of what is made with it; for a model, its id."""

    @property
    def version(self) -> str:
        """For a model, its revision."""

    def inpaint(self, image: np.ndarray, mask: np.ndarray, prompt: str, rng: np.random.Generator) -> np.ndarray:
        """Fill what is True in `mask`.

        Args:
            image: uint8 RGB [H, W, 3].
            mask: boolean [H, W], True where the picture is to be made anew.
            prompt: what should be there; "" asks for a continuation of the surroundings.
            rng: the only source of randomness.

        Returns:
            uint8 RGB [H, W, 3]. Pixels outside of the mask may differ: callers paste the original ones back.
        """


class Editor(Protocol):
    """Changes a picture as an instruction says."""

    def edit(self, image: np.ndarray, instruction: str, rng: np.random.Generator) -> np.ndarray:
        """Follow an instruction.

        Args:
            image: uint8 RGB [H, W, 3].
            instruction: one plain sentence.
            rng: the only source of randomness.

        Returns:
            uint8 RGB [H, W, 3]. Any pixel may differ: callers of local edits paste the original ones back.
        """


class BoxSegmenter(Protocol):
    """Finds the thing in a box."""

    @property
    def name(self) -> str:
        """Enters the provenance of what is made with its masks; for a model, its id."""

    @property
    def version(self) -> str:
        """For a model, its revision."""

    def segment(self, image: np.ndarray, box: tuple[float, float, float, float]) -> tuple[np.ndarray, float]:
        """The mask of the main thing in a box, and how far to trust it.

        Args:
            image: uint8 RGB [H, W, 3].
            box: (x0, y0, x1, y1) in pixels.

        Returns:
            Boolean [H, W] mask, True on the thing, and a confidence in [0, 1]; 0 means that the mask is refused.
        """
