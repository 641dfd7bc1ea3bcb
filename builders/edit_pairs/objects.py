"""Edits that take a thing out of its place: remove, move, resize, flip.

Without a model, the hole is filled from its surroundings, so these edits are made only where the surroundings are even.
Things on which something stands, and persons, stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from builders.annotators.inpaint import continue_smoothly
from builders.base import Rejected
from builders.edit_pairs.claims import Mirrored, Moved, Seamless, Visible
from builders.edit_pairs.edit import Edit, Presence, Wording, fade_in, grow, matte, paste, shrink
from builders.edit_pairs.scene import Scene
from builders.edit_pairs.things import Thing, place_of, with_article

_MARGIN = 0.018  # by which a hole is larger than its thing, as a share of the shorter side
_SHADOW = 0.05  # by which it reaches further down, as a share of the thing's height
_ENLARGE = (1.15, 1.4)
_SHIFT = (0.35, 1.2)  # of the thing's width
_DEPTH = 0.04  # of the shorter side: feet that are level stand side by side
_BARE = 0.01  # share of a thing that may stay uncovered by its new self without filling a hole


def remove(scene: Scene, rng: np.random.Generator) -> Edit | Rejected:
    """The thing is gone. Its inverse adds it: the target is then the photograph."""
    return scene.edit_thing(rng, lambda thing: _remove(scene, thing, rng), _can_go, lambda t: t.sides <= 1)


def _remove(scene: Scene, thing: Thing, rng: np.random.Generator) -> Edit | Rejected:
    hole = _hole(scene, thing.mask)
    filled = scene.fill(hole, rng)
    if isinstance(filled, Rejected):
        return filled
    background, uneven = filled
    pixels, mask = paste(scene.pixels, background, fade_in(hole))
    place, placed = place_of(thing.mask)
    return Edit(
        pixels,
        mask,
        Wording("remove", {"thing": f"the {thing.name}"}),
        Wording("add", {"thing": with_article(thing.name), "place": place}) if not thing.placed else None,
        inverse_subtask="add",
        claims=(Visible(thing.mask, in_target=False), Seamless(hole), *placed, *thing.placed),
        params={"thing": thing.name, "mask": thing.origin, "inpainter": scene.inpainter.name},
        scores={"surroundings": uneven},
        presences=(Presence(thing.kind, thing.mask, in_target=False),),
        captions=(f"a photo of {with_article(thing.kind)}", "a photo of an empty background"),
        model=scene.inpainting,
    )


def resize(scene: Scene, rng: np.random.Generator) -> Edit | Rejected:
    """The thing grows from its foot; its inverse shrinks it, with the photograph as the target."""
    return scene.edit_thing(rng, lambda thing: _resize(scene, thing, rng), _can_go, lambda t: t.sides == 0)


def _resize(scene: Scene, thing: Thing, rng: np.random.Generator) -> Edit | Rejected:
    factor = round(float(rng.uniform(*_ENLARGE)), 3)
    x, y, w, h = cv2.boundingRect(thing.mask.astype(np.uint8))
    foot_x, foot_y = x + w / 2, float(y + h)
    matrix = np.array([[factor, 0, (1 - factor) * foot_x], [0, factor, (1 - factor) * foot_y]])
    placed = transplant(scene, thing, matrix, rng)
    if isinstance(placed, Rejected):
        return placed
    fields = {"thing": f"the {thing.name}"}
    return Edit(
        placed.pixels,
        placed.mask,
        Wording("resize_larger", fields),
        Wording("resize_smaller", fields),
        claims=(Visible(placed.outline, in_target=True), *thing.placed),
        params={"thing": thing.name, "mask": thing.origin, "factor": factor},
        scores={"surroundings": placed.uneven},
        model=placed.model,
    )


def move(scene: Scene, rng: np.random.Generator) -> Edit | Rejected:
    """The thing goes to the left or to the right; its inverse goes back, with the photograph as the target."""
    return scene.edit_thing(rng, lambda thing: _move(scene, thing, rng), _can_go, lambda t: t.sides == 0)


def _move(scene: Scene, thing: Thing, rng: np.random.Generator) -> Edit | Rejected:
    x, _, w, _ = cv2.boundingRect(thing.mask.astype(np.uint8))
    word, back = ("left", "right") if rng.random() < 0.5 else ("right", "left")
    room = x if word == "left" else scene.pixels.shape[1] - x - w
    shift = round(float(rng.uniform(*_SHIFT)) * w)
    if shift >= room:
        word, back, room = back, word, scene.pixels.shape[1] - w - room
    if shift >= room:
        return Rejected("no_room", room / w)
    dx = -shift if word == "left" else shift
    placed = transplant(scene, thing, np.array([[1.0, 0, dx], [0, 1.0, 0]]), rng)
    if isinstance(placed, Rejected):
        return placed
    fields = {"thing": f"the {thing.name}"}
    return Edit(
        placed.pixels,
        placed.mask,
        Wording("move", {**fields, "direction": word}),
        Wording("move", {**fields, "direction": back}) if not thing.placed else None,
        claims=(
            Visible(thing.mask & ~placed.outline, in_target=False),
            Moved(thing.mask, word),
            *thing.placed,
        ),
        params={"thing": thing.name, "mask": thing.origin, "shift": dx},
        scores={"surroundings": placed.uneven},
        model=placed.model,
    )


def flip(scene: Scene, rng: np.random.Generator) -> Edit | Rejected:
    """The thing is mirrored left to right where it is; so is its inverse."""
    return scene.edit_thing(rng, lambda thing: _flip(scene, thing, rng), _can_go, lambda t: t.sides == 0)


def _flip(scene: Scene, thing: Thing, rng: np.random.Generator) -> Edit | Rejected:
    x, _, w, _ = cv2.boundingRect(thing.mask.astype(np.uint8))
    placed = transplant(scene, thing, np.array([[-1.0, 0, 2 * x + w - 1], [0, 1.0, 0]]), rng)
    if isinstance(placed, Rejected):
        return placed
    wording = Wording("flip", {"thing": f"the {thing.name}"})
    return Edit(
        placed.pixels,
        placed.mask,
        wording,
        wording,
        claims=(Mirrored(thing.mask), *thing.placed),
        params={"thing": thing.name, "mask": thing.origin},
        scores={"surroundings": placed.uneven},
        model=placed.model,
    )


@dataclass(frozen=True)
class Transplant:
    """A thing in its new place: the picture, what may differ, the thing's new mask, how uneven the surroundings are.

    `model` is that of the inpainter, if a hole had to be filled.
    """

    pixels: np.ndarray
    mask: np.ndarray
    outline: np.ndarray
    uneven: float
    model: dict[str, str]


def transplant(scene: Scene, thing: Thing, matrix: np.ndarray, rng: np.random.Generator) -> Transplant | Rejected:
    """Cut the thing out, fill its hole where the thing does not cover it, and set it down transformed.

    Args:
        matrix: float [2, 3] affine map from old to new pixel coordinates.
    """
    size = scene.pixels.shape[1::-1]
    alpha = cv2.warpAffine(matte(thing.mask, 1), matrix, size, flags=cv2.INTER_LINEAR)
    outline = alpha > 0.5
    if outline[0].any() or outline[-1].any() or outline[:, 0].any() or outline[:, -1].any():
        return Rejected("leaves_picture")
    ground = outline & ~grow(thing.mask, 3)
    foot = np.flatnonzero(thing.mask.any(axis=1))[-1]
    # What stands further back may be covered, what stands beside or before it may not.
    beside = (box for box in thing.neighbours if box[3] >= foot - _DEPTH * scene.side)
    if any(ground[y0:y1, x0:x1].any() for x0, y0, x1, y1 in beside):
        return Rejected("collides")
    background, hole, uneven, model = scene.pixels, np.zeros_like(outline), 0.0, {}
    if (thing.mask & ~shrink(outline, 2)).sum() > _BARE * thing.mask.sum():
        hole = _hole(scene, thing.mask)
        # It must fit in where it goes as well: the surroundings of both places are one smooth ground.
        uneven = scene.uneven(scene.pixels, hole | outline, grow(thing.mask, 3))
        if uneven > scene.surroundings:
            return Rejected("structured_surroundings", uneven)
        background = scene.inpainter.inpaint(scene.pixels, hole, "", rng)
        background, hole = paste(scene.pixels, background, fade_in(hole))
        model = scene.inpainting
    # The cut-out keeps none of its old surroundings in its edge.
    inner = continue_smoothly(scene.pixels.astype(np.float32), shrink(thing.mask, 2))
    moved = cv2.warpAffine(inner, matrix, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    pixels, covered = paste(background, np.clip(moved, 0, 255), alpha)
    return Transplant(pixels, covered | hole, outline, uneven, model)


def _can_go(thing: Thing) -> bool:
    return not (thing.is_person or thing.carries)


def _hole(scene: Scene, mask: np.ndarray) -> np.ndarray:
    """The thing with a margin, and a little further down, where its contact shadow is."""
    _, _, _, height = cv2.boundingRect(mask.astype(np.uint8))
    reach = max(1, round(_SHADOW * height))
    lower = np.zeros_like(mask)
    lower[reach:] = mask[:-reach]
    return grow(mask | lower, max(3, round(_MARGIN * scene.side)))
