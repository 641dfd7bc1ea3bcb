"""Colours that an instruction can name and a reader cannot confuse. Black is left out: it is the background of maps."""

from __future__ import annotations

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 160, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
    "orange": (255, 140, 0),
    "purple": (110, 0, 160),
    "brown": (130, 70, 20),
    "white": (255, 255, 255),
}


def draw_colours(rng: np.random.Generator, count: int) -> list[str]:
    """`count` different colour names in random order.

    Raises:
        ValueError: more colours are asked for than there are.
    """
    return [str(name) for name in rng.choice(list(COLOURS), size=count, replace=False)]
