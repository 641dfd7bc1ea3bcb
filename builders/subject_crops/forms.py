"""References of a subject: what is handed to the model so that it knows which cup is meant.

Models that only ever see the identical crop learn to paste it. So most references differ from the target in what is
around the subject, in its outline, or in how it is seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from builders.annotators.inpaint import continue_smoothly
from builders.base import Rejected, SourceImage
from builders.edit_pairs.edit import grow, matte, shrink
from builders.subject_crops.acceptance import Box, Subject, box_of
from builders.subject_crops.backgrounds import PLAIN, any_colour, first_visible, plain, region, texture
from builders.subject_crops.views import LEAST_SIDE, View, crop_of, cut_out_of, draw_changes, tint
from builders.subject_crops.words import bears_text, is_person
from schemas.codec import encode_jpeg
from schemas.records import Entity

CROP, AUGMENTED, CUT_OUT, SCENE, GROUP, PHOTO = "crop", "augmented", "cutout", "scene", "group", "photo"
FORMS = (CROP, AUGMENTED, CUT_OUT, SCENE, GROUP, PHOTO)
EROSION = (2.0, 6.0)  # pixels
_THIN = 0.35  # of its half width: no more is taken off what is thin
_RADII = (2, 4, 8, 12, 18)
_GRAIN, _CRUMB = 12, 16  # size of the irregularities, and of loose bits: pixels
_MARGIN = (0.06, 0.2)  # around a cut-out, of its sides
_MOST_OF_PHOTO = 0.45  # of the photograph, for a group of things in it
_WHOLE = 0.9  # of the photograph: a larger crop is the photograph


@dataclass(frozen=True)
class Reference:
    """A reference image. `shown` are the entities in it, the subject first, boxes in its pixels."""

    form: str
    jpeg: bytes = field(repr=False)
    size: tuple[int, int]
    shown: tuple[Entity, ...]
    changes: dict[str, Any] = field(default_factory=dict)


def possible_forms(image: SourceImage, subject: Subject, *, is_cross: bool) -> list[str]:
    """The forms that a subject can take; `is_cross` if it is another photograph than the target."""
    forms = [CUT_OUT, SCENE] if subject.mask is not None else []
    x0, y0, x1, y1 = subject.box
    if _share(subject.box, image) <= _WHOLE and min(x1 - x0, y1 - y0) >= LEAST_SIDE:
        forms += [CROP, AUGMENTED]
    if _group_box(image, subject) is not None:
        forms.append(GROUP)
    return [*forms, PHOTO] if is_cross else forms


def make_reference(image: SourceImage, subject: Subject, form: str, rng: np.random.Generator) -> Reference | Rejected:
    """A reference of one of `possible_forms`."""
    if form == PHOTO:
        return Reference(PHOTO, image.jpeg, (image.pixels.shape[0], image.pixels.shape[1]), _all(image, subject))
    if form in (CUT_OUT, SCENE):
        return _cut_out(image, subject, form, rng)
    box = _group_box(image, subject) if form == GROUP else subject.box
    assert box is not None
    changes = {} if form == CROP else draw_changes(rng, may_flip(image, box))
    view = crop_of(box, image.pixels.shape[:2], changes)
    shown = tuple(seen for entity in _all(image, subject) if (seen := view.sees(entity)) is not None)
    return Reference(form, encode_jpeg(tint(view.warp(image.pixels), changes)), view.size, shown, changes)


def _cut_out(image: SourceImage, subject: Subject, form: str, rng: np.random.Generator) -> Reference | Rejected:
    assert subject.mask is not None
    changes = draw_changes(rng, may_flip(image, subject.box)) if rng.random() < 0.5 else {}
    view = cut_out_of(subject.box, round(float(rng.uniform(*_MARGIN)), 3), changes)
    alpha, pixels = view.warp_alpha(matte(erode(subject.mask, rng))), tint(view.warp(image.pixels), changes)
    found = first_visible(pixels, alpha, _backgrounds(image, subject, form, view, rng))
    if isinstance(found, Rejected):
        return found
    pasted, background = found
    shown = view.sees(subject.entity)
    assert shown is not None
    return Reference(form, encode_jpeg(pasted), view.size, (shown,), {**changes, "background": background})


def _backgrounds(
    image: SourceImage, subject: Subject, form: str, view: View, rng: np.random.Generator
) -> list[tuple[str, np.ndarray]]:
    """Backgrounds in random order, by name; the next is taken where the subject does not stand out."""
    if form == CUT_OUT:
        colours: dict[str, tuple[int, ...]] = {**PLAIN, **{f"colour_{i}": any_colour(rng) for i in (1, 2, 3)}}
        return [(str(name), plain(view.size, colours[name])) for name in rng.permutation(list(colours))]
    drawn = [("texture", texture(view.size, rng)) for _ in range(3)]
    part = region(image.pixels, subject.box, view.size, rng)
    if part is not None:
        drawn.insert(0 if rng.random() < 0.6 else 1, ("region", part))
    return drawn


def extracted(
    pixels: np.ndarray, mask: np.ndarray, colours: Sequence[str], margin: float = 0.1
) -> tuple[np.ndarray, str] | Rejected:
    """A thing as it is, cleanly cut out, on the first of the plain `colours` on which it can be seen."""
    view = cut_out_of(box_of(mask), margin, {})
    # What is under the soft edge is the thing's own colour, not a mixture with its old surroundings.
    core = shrink(mask, 2)
    own = continue_smoothly(pixels.astype(np.float32), core) if core.any() else pixels
    cut, alpha = view.warp(np.clip(own, 0, 255).astype(np.uint8)), view.warp_alpha(matte(mask, 1))
    return first_visible(cut, alpha, [(name, plain(view.size, PLAIN[name])) for name in colours])


def erode(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The boolean mask without an irregular rim of 2 to 6 pixels; thin parts lose less, so that none is cut off."""
    depth = _depth(mask)
    (low, high), (x, y, w, h) = EROSION, cv2.boundingRect(mask.astype(np.uint8))
    noise = np.zeros(mask.shape, np.float32)
    grid = rng.random((math.ceil(h / _GRAIN) + 1, math.ceil(w / _GRAIN) + 1), np.float32)
    noise[y : y + h, x : x + w] = np.clip(cv2.resize(grid, (w, h), interpolation=cv2.INTER_CUBIC), 0, 1)
    thickness = _thickness(mask, depth)
    left = depth > np.minimum(low + (high - low) * noise, _THIN * thickness)
    # Where a thin part sets out from a thick one, the rim of the latter must not cut it off.
    thin = (thickness > 0) & (thickness <= _RADII[1]) & (depth >= thickness)
    left |= grow(thin, round(high) + 2) & (depth > 1)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(left.astype(np.uint8))
    crumbs = [i for i in range(1, count) if stats[i, cv2.CC_STAT_AREA] < _CRUMB]
    return left & ~np.isin(labels, crumbs)


def _thickness(mask: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """float32 [H, W]: the radius, of `_RADII`, of the largest disc inside the mask that covers a pixel; 0 if none."""
    thickness = np.zeros(mask.shape, np.float32)
    for radius in _RADII:
        thickness[mask & (_depth(~(depth > radius)) <= radius)] = radius
    return thickness


def _depth(mask: np.ndarray) -> np.ndarray:
    """float32 distance of every pixel of the mask to the next one outside, or to the border of the picture."""
    return cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]


def may_flip(image: SourceImage, box: Box) -> bool:
    """Whether what lies in the box has no text to mirror: by the annotator `ocr`, else by what the things there are."""
    if "ocr" in image.artefacts:
        lines = image.artefacts["ocr"].data["lines"]
        corners = [np.array(line["corners"]) for line in lines]
        return not any(_meet(box, (*c.min(axis=0), *c.max(axis=0))) for c in corners)
    things = [entity for entity in image.record.entities if _meet(box, entity.box)]
    return not any(is_person(thing) or bears_text(thing) for thing in things)


def _meet(a: Sequence[float], b: Sequence[float]) -> bool:
    return bool(a[0] < b[2] and a[2] > b[0] and a[1] < b[3] and a[3] > b[1])


def _all(image: SourceImage, subject: Subject) -> tuple[Entity, ...]:
    """The entities of the photograph, the subject first, with the box that is used for it."""
    box = tuple(float(side) for side in subject.box)
    others = (entity for i, entity in enumerate(image.record.entities) if i != subject.number)
    return (subject.entity.model_copy(update={"box": box, "mask": {}}), *others)


def _group_box(image: SourceImage, subject: Subject) -> Box | None:
    """The smallest box of the subject and one other thing that leaves enough of the photograph out, or None."""
    x0, y0, x1, y1 = subject.box
    boxes = []
    for i, other in enumerate(image.record.entities):
        a0, b0, a1, b1 = (round(side) for side in other.box)
        if i != subject.number and not _meet(subject.box, (a0, b0, a1, b1)):
            boxes.append((min(a0, x0), min(b0, y0), max(a1, x1), max(b1, y1)))
    boxes = [box for box in boxes if _share(box, image) <= _MOST_OF_PHOTO]
    return min(boxes, key=lambda box: _share(box, image), default=None)


def _share(box: Box, image: SourceImage) -> float:
    height, width = image.pixels.shape[:2]
    return (box[2] - box[0]) * (box[3] - box[1]) / (height * width)
