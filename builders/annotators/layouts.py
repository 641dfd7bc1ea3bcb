"""Maps drawn from a photo's entities: boxes, segmentation, and referring segmentation on the photo itself.

Colours are drawn anew for every map and named in `words`, so a model has to read the instruction. Whatever is named
is complete (all entities of that name are painted) and visible. Polarity as in `schemas.masks`: paint is the thing.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import cv2
import numpy as np

from builders.annotators.maps import ConditionMap, Detector, Limits, Params, share
from builders.colours import COLOURS, draw_colours
from schemas.instructions import lint_instruction
from schemas.masks import decode_mask
from schemas.records import Entity

MAX_NAMES = 6  # more colours than this are hard to follow in one sentence
MIN_VISIBLE_PX = 32  # a name with less paint than this is left out

Groups = dict[str, list[Entity]]


def bare_name(text: str) -> str:
    """A label or phrase without article, underscores or closing punctuation: "The traffic_light." -> "traffic light".

    It is "" where an instruction could not hold the text.
    """
    name = " ".join(text.replace("_", " ").split()).rstrip(".,;:!")
    name = re.sub(r"^(?:an?|the)\s+", "", name, flags=re.IGNORECASE)
    return "" if lint_instruction(name, 0) else name


class _Layout(Detector):
    """Entities grouped by label (or phrase, where there is none), each group in its own colour, on black."""

    needs: ClassVar[str] = "entities"

    def __init__(self, entities: Sequence[Entity]) -> None:
        self.groups = self.group(entities)
        self.missing = "" if self.groups else f"no_{self.needs}"

    def group(self, entities: Sequence[Entity]) -> Groups:
        """The entities that can be painted, by the name that an instruction gives them."""
        return _by_name(entities, lambda entity: entity.label or entity.phrase)

    @abstractmethod
    def paint(self, index: np.ndarray, entity: Entity, value: int) -> None:
        """Write `value` into uint8 [H, W] `index` where the entity is."""

    def draw(self, rng: np.random.Generator) -> Params:
        largest = sorted(self.groups, key=lambda name: -sum(map(_box_area, self.groups[name])))[:MAX_NAMES]
        return {"legend": [list(pair) for pair in zip(largest, draw_colours(rng, len(largest)), strict=True)]}

    def render(self, pixels: np.ndarray, params: Params) -> ConditionMap:
        legend: list[list[str]] = params["legend"]
        index = np.zeros(pixels.shape[:2], np.uint8)
        places = [(entity, i) for i, (name, _) in enumerate(legend, start=1) for entity in self.groups[name]]
        for entity, i in sorted(places, key=lambda place: -_box_area(place[0])):  # small ones on top
            self.paint(index, entity, i)
        seen = np.bincount(index.ravel(), minlength=len(legend) + 1) >= MIN_VISIBLE_PX
        table = np.array([(0, 0, 0), *(COLOURS[colour] for _, colour in legend)], np.uint8)
        table[~seen] = 0
        named = [f"{colour} for {name}" for i, (name, colour) in enumerate(legend, start=1) if seen[i]]
        return ConditionMap(table[index], params, {"names": float(len(named))}, {"legend": enumerate_words(named)})


class Boxes(_Layout):
    """Outlines of the entities' boxes."""

    name = "boxes"

    def paint(self, index: np.ndarray, entity: Entity, value: int) -> None:
        x0, y0, x1, y1 = (max(0, round(side)) for side in entity.box)
        box = index[y0:y1, x0:x1]
        width = max(2, round(min(index.shape) / 100))
        rim = np.ones(box.shape, bool)
        rim[width:-width, width:-width] = False
        box[rim] = value


class Segmentation(_Layout):
    """Filled masks. A name of which any entity has no mask is left out: half a segmentation would be a wrong one."""

    name = "segmentation"
    needs = "masks"

    def group(self, entities: Sequence[Entity]) -> Groups:
        return _with_masks(super().group(entities))

    def paint(self, index: np.ndarray, entity: Entity, value: int) -> None:
        index[decode_mask(entity.mask, *index.shape)] = value


class Referring(Detector):
    """The photo with everything of one name painted in one colour, opaque or translucent."""

    name = "referring"
    limits: ClassVar[Limits] = {
        "area": (0.002, 0.9),
        "change": (20.0, math.inf),  # mean absolute change of the painted pixels, of 255: no white paint on snow
    }
    alphas: ClassVar[tuple[float, ...]] = (1.0, 0.5)

    def __init__(self, entities: Sequence[Entity]) -> None:
        names = _by_name(entities, lambda entity: entity.phrase or entity.label)
        self.groups = _with_masks({name: [e for e in entities if _answers_to(e, name)] for name in names})
        self.missing = "" if self.groups else "no_masks"

    def draw(self, rng: np.random.Generator) -> Params:
        name, alpha = rng.choice(list(self.groups)), rng.choice(self.alphas)
        return {"phrase": str(name), "colour": draw_colours(rng, 1)[0], "alpha": float(alpha)}

    def region(self, masks: list[np.ndarray]) -> np.ndarray:
        """Boolean [H, W]: what is painted."""
        return np.logical_or.reduce(masks)

    def render(self, pixels: np.ndarray, params: Params) -> ConditionMap:
        name, alpha = params["phrase"], params["alpha"]
        group = self.groups[name]
        masks = [decode_mask(entity.mask, *pixels.shape[:2]) for entity in group]
        region = self.region(masks)
        paint = np.array(COLOURS[params["colour"]])
        image = pixels.copy()
        image[region] = np.rint(alpha * paint + (1 - alpha) * pixels[region])
        change = cv2.absdiff(image, pixels)[region]
        stats = {"area": share(region), "change": float(change.mean()) if change.size else 0.0}
        several = len(group) > 1
        words = {
            "thing": name,
            "target": f"{'every' if several else 'the'} {name}",
            "pronoun": "them" if several else "it",
            "colour": params["colour"] if alpha == 1 else f"translucent {params['colour']}",
        }
        return ConditionMap(image, params, stats, words)


class ReferringOutline(Referring):
    """The photo with the inner rim of everything of one name drawn in one colour."""

    name = "referring_outline"
    alphas: ClassVar[tuple[float, ...]] = (1.0,)

    def region(self, masks: list[np.ndarray]) -> np.ndarray:
        radius = max(1, round(min(masks[0].shape) / 128))
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
        inner = [cv2.erode(mask.astype(np.uint8), kernel, borderValue=0) > 0 for mask in masks]
        return np.logical_or.reduce([mask & ~core for mask, core in zip(masks, inner, strict=True)])


def _by_name(entities: Sequence[Entity], name_of: Callable[[Entity], str]) -> Groups:
    groups: Groups = {}
    for entity in entities:
        if name := bare_name(name_of(entity)):
            groups.setdefault(name, []).append(entity)
    return groups


def _with_masks(groups: Groups) -> Groups:
    return {name: group for name, group in groups.items() if all(entity.mask for entity in group)}


def _answers_to(entity: Entity, name: str) -> bool:
    """Whether somebody who says `name` would mean this entity too: a "brown dog" is also a "dog"."""
    phrase, label = bare_name(entity.phrase), bare_name(entity.label)
    return name in (phrase, label) or phrase.endswith(f" {name}")


def _box_area(entity: Entity) -> float:
    x0, y0, x1, y1 = entity.box
    return (x1 - x0) * (y1 - y0)


def enumerate_words(parts: Sequence[str]) -> str:
    """`["a", "b", "c"]` as "a, b and c"."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))
