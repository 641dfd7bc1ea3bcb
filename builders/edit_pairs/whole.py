"""Edits of the geometry of the whole picture."""

from __future__ import annotations

import numpy as np

from builders.base import Rejected
from builders.edit_pairs.claims import Mirrored
from builders.edit_pairs.edit import Edit, Wording
from builders.edit_pairs.scene import Scene

_QUARTERS = {"rotate_left": 1, "rotate_half": 2, "rotate_right": 3}  # of a turn, counter-clockwise
_BACK = {"rotate_left": "rotate_right", "rotate_half": "rotate_half", "rotate_right": "rotate_left"}


def mirror(scene: Scene, rng: np.random.Generator) -> Edit | Rejected:
    """The picture mirrored left to right."""
    everywhere = np.ones(scene.pixels.shape[:2], bool)
    wording = Wording("mirror")
    return Edit(
        np.ascontiguousarray(scene.pixels[:, ::-1]),
        everywhere,
        wording,
        wording,
        claims=(Mirrored(everywhere),),
        in_place=False,
    )


def rotate(scene: Scene, rng: np.random.Generator) -> Edit | Rejected:
    """The picture turned upside down, or by a quarter if it is square: source and target keep one size."""
    height, width = scene.pixels.shape[:2]
    turn = str(rng.choice(list(_QUARTERS) if height == width else ["rotate_half"]))
    return Edit(
        np.ascontiguousarray(np.rot90(scene.pixels, _QUARTERS[turn])),
        np.ones((height, width), bool),
        Wording(turn),
        Wording(_BACK[turn]),
        params={"turn": turn},
        in_place=False,
    )
