"""Things in a photograph that an edit can be about: a mask, and words that mean this thing and no other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import cv2
import numpy as np

from builders.annotators.base import BoxSegmenter
from builders.annotators.grabcut import overlap, refine
from builders.annotators.layouts import bare_name
from builders.base import SourceImage
from builders.edit_pairs.claims import Placed, centre
from schemas.masks import decode_mask
from schemas.records import Entity

PERSONS = frozenset(
    [
        "person",
        "people",
        "man",
        "men",
        "woman",
        "women",
        "boy",
        "girl",
        "child",
        "children",
        "baby",
        "face",
        "human",
        "lady",
        "guy",
        "astronaut",
        "officer",
        "player",
    ]
)
_ANIMALS = frozenset(
    [
        "cat",
        "kitten",
        "dog",
        "puppy",
        "bird",
        "horse",
        "cow",
        "sheep",
        "animal",
        "rabbit",
        "fox",
        "lion",
        "tiger",
        "bear",
        "elephant",
    ]
)
_PLACE_WORDS = re.compile(r"\b(?:left|right|top|bottom|upper|lower)\b")
_MAX_PIECES = 3
_SAME_OUTLINE = 0.9  # a refined mask that differs by more has lost its thing
_COVERED = 0.03  # share of a thing's box that another one's may overlap
_SUPPORT = 0.25  # of a thing's height: what ends within it, from the top, stands on the thing


Found = tuple[np.ndarray, str]


class MaskFinder:
    """Masks of the entities of one image at a time; found once, however many edits are tried on the image.

    Args:
        segmenter: cuts entities out of their boxes; without it, only entities that come with a mask have one.
    """

    def __init__(self, segmenter: BoxSegmenter | None) -> None:
        self.segmenter = segmenter
        self._uid = ""
        self._found: dict[int, Found | None] = {}

    def find(self, image: SourceImage, index: int) -> Found | None:
        """The boolean [H, W] mask of an entity and where it comes from, or None if it has no usable one."""
        if image.record.uid != self._uid:
            self._uid, self._found = image.record.uid, {}
        if index not in self._found:
            self._found[index] = self._search(image, image.record.entities[index])
        return self._found[index]

    def _search(self, image: SourceImage, entity: Entity) -> Found | None:
        if entity.mask:
            mask, origin = decode_mask(entity.mask, *image.pixels.shape[:2]), "source"
            refined = refine(image.pixels, mask)
            mask = refined if overlap(mask, refined) >= _SAME_OUTLINE else mask
        elif self.segmenter is not None:
            mask, trust = self.segmenter.segment(image.pixels, entity.box)
            origin = f"{self.segmenter.name} {trust:.2f}"
        else:
            return None
        mask = _without_crumbs(mask)
        return (mask, origin) if mask.any() and not mask.all() else None


@dataclass(frozen=True)
class Thing:
    """One entity with an unambiguous name. Its mask is found when it is asked for, which may take long.

    Args:
        name: how an instruction calls it, without article, e.g. "left cup".
        plain: its bare label if that means it alone, else "". Says nothing about colour.
        placed: the claim behind a word for a place in the name, if there is one.
        carries: whether another entity stands on it.
        neighbours: boxes (x0, y0, x1, y1) of the other entities that do not surround it.
    """

    name: str
    plain: str
    find: Callable[[], Found | None] = field(repr=False)
    placed: tuple[Placed, ...] = ()
    is_person: bool = False
    is_living: bool = False
    carries: bool = False
    neighbours: tuple[tuple[int, int, int, int], ...] = ()

    @property
    def kind(self) -> str:
        """The name without words for places, which mean nothing to a detector."""
        return " ".join(_PLACE_WORDS.sub("", self.name).split())

    @property
    def mask(self) -> np.ndarray:
        """Boolean [H, W].

        Raises:
            ValueError: it has none; ask for `area` first.
        """
        found = self.find()
        if found is None:
            raise ValueError(f"{self.name!r} has no mask")
        return found[0]

    @property
    def origin(self) -> str:
        """Where the mask comes from, for the provenance."""
        found = self.find()
        return found[1] if found else ""

    @property
    def area(self) -> float:
        """Share of the picture; 0 if there is no mask."""
        found = self.find()
        return float(found[0].mean()) if found else 0.0

    @property
    def is_covered(self) -> bool:
        """Whether another entity reaches into its box: its outline may then be bitten into."""
        solid = self.mask.astype(np.uint8)
        x, y, w, h = cv2.boundingRect(solid)
        return any(
            (min(x1, x + w) - max(x0, x)) * (min(y1, y + h) - max(y0, y)) > _COVERED * w * h
            for x0, y0, x1, y1 in self.neighbours
            if min(x1, x + w) > max(x0, x) and min(y1, y + h) > max(y0, y)
        )

    @property
    def sides(self) -> int:
        """How many sides of the picture it touches."""
        edges = (self.mask[0], self.mask[-1], self.mask[:, 0], self.mask[:, -1])
        return sum(bool(edge.any()) for edge in edges)


def iter_things(image: SourceImage, masks: MaskFinder, rng: np.random.Generator) -> Iterator[Thing]:
    """The entities of an image that can be named without ambiguity, in random order."""
    entities, size = image.record.entities, image.pixels.shape[:2]
    for index in map(int, rng.permutation(len(entities))):
        named = name_alone(entities, index, size)
        if named is None:
            continue
        label = bare_name(entities[index].label)
        words = set(re.findall(r"[a-z]+", f"{entities[index].phrase} {label}".lower()))
        yield Thing(
            name=named[0],
            plain=label if label and not _rivals(entities, index, label) else "",
            find=partial(masks.find, image, index),
            placed=named[1],
            is_person=bool(words & PERSONS),
            is_living=bool(words & (PERSONS | _ANIMALS)),
            carries=_carries(entities, index),
            neighbours=_neighbours(entities, index),
        )


def _without_crumbs(mask: np.ndarray) -> np.ndarray:
    """Pieces of less than a fiftieth of the mask go; what is left in many pieces is no object."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    areas = stats[1:, cv2.CC_STAT_AREA]
    kept = 1 + np.flatnonzero(areas >= 0.02 * areas.sum()) if count > 1 else np.zeros(0, int)
    return np.isin(labels, kept) if 0 < len(kept) <= _MAX_PIECES else np.zeros_like(mask)


def name_alone(entities: Sequence[Entity], index: int, size: tuple[int, ...]) -> tuple[str, tuple[Placed, ...]] | None:
    """A name that means this entity alone, with what its words for places claim; None if there is none."""
    entity, mask = entities[index], _box_mask(entities[index], size)
    phrase, label = bare_name(entity.phrase), bare_name(entity.label)
    others = [e for i, e in enumerate(entities) if i != index]
    word = _PLACE_WORDS.search(phrase)
    if phrase and word is None and not _rivals(entities, index, phrase):
        return phrase, ()
    kind = label or phrase
    siblings = [_box_mask(e, size) for e in others if kind and _answers_to(e, kind)]
    if word is not None and len(_PLACE_WORDS.findall(phrase)) == 1:
        claim = Placed(mask, word.group(), tuple(siblings))
        return (phrase, (claim,)) if _holds(claim) and not _rivals(entities, index, phrase) else None
    if not kind or not siblings:
        return None
    for place in ("left", "right", "upper", "lower"):
        claim = Placed(mask, place, tuple(siblings))
        if _holds(claim):
            return f"{place} {kind}", (claim,)
    return None


def _rivals(entities: Sequence[Entity], index: int, name: str) -> list[Entity]:
    return [e for i, e in enumerate(entities) if i != index and _answers_to(e, name)]


def _answers_to(entity: Entity, name: str) -> bool:
    """Whether somebody who says `name` could mean this entity: a "brown dog" is also a "dog"."""
    phrase, label = bare_name(entity.phrase).lower(), bare_name(entity.label).lower()
    return name.lower() in (phrase, label) or phrase.endswith(f" {name.lower()}")


def _holds(claim: Placed) -> bool:
    nothing = np.zeros((1, 1, 3), np.uint8)
    return not claim.check(nothing, nothing).fault


def _box_mask(entity: Entity, size: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(size, bool)
    x0, y0, x1, y1 = (max(0, round(side)) for side in entity.box)
    mask[min(y0, size[0] - 1) : max(y1, y0 + 1), min(x0, size[1] - 1) : max(x1, x0 + 1)] = True
    return mask


def _carries(entities: Sequence[Entity], index: int) -> bool:
    x0, y0, x1, y1 = entities[index].box
    for i, other in enumerate(entities):
        middle, foot = (other.box[0] + other.box[2]) / 2, other.box[3]
        height = y1 - y0
        stands = x0 < middle < x1 and y0 - 0.1 * height < foot < y1 - _SUPPORT * height and other.box[1] < foot
        if i != index and stands and other.box[3] - other.box[1] < 4 * height:
            return True
    return False


def _neighbours(entities: Sequence[Entity], index: int) -> tuple[tuple[int, int, int, int], ...]:
    x0, y0, x1, y1 = entities[index].box
    boxes = []
    for i, other in enumerate(entities):
        a0, b0, a1, b1 = other.box
        surrounds = a0 <= x0 + 2 and b0 <= y0 + 2 and a1 >= x1 - 2 and b1 >= y1 - 2
        if i != index and not surrounds:
            boxes.append((max(0, round(a0)), max(0, round(b0)), round(a1), round(b1)))
    return tuple(boxes)


def place_of(mask: np.ndarray) -> tuple[str, tuple[Placed, ...]]:
    """Where in the picture a region lies, in words ("at the top left"), with the claims behind them."""
    height, width = mask.shape
    x, y = centre(mask)
    across = "left" if x < 0.36 * width else "right" if x > 0.64 * width else ""
    down = "top" if y < 0.36 * height else "bottom" if y > 0.64 * height else ""
    words = " ".join(filter(None, (down, across)))
    if not words:
        return "in the middle", ()
    return f"{'at' if down else 'on'} the {words}", (Placed(mask, words),)


def with_article(name: str) -> str:
    """ "red cup" -> "a red cup"; plurals and counted things stay as they are."""
    words = name.split()
    if words[0] in ("pair", "row", "stack", "bunch", "set"):
        return f"a {name}"
    if words[0] in ("two", "three", "four", "several", "some") or re.search(r"[^su]s$", words[-1]):
        return name
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"
