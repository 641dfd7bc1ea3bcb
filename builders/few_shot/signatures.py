"""When two samples show the same mapping from input to output.

What defines a mapping is in the last operation of a sample: `RULES` says for each operation which of its parameters
count, and how finely; all others may differ between the examples of a group. An operation without such parameters is
one mapping (all mirrored pictures), one whose result depends on what no example can show (the words of a text) is
listed with the reason why its samples are left out.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from schemas.records import SampleRecord

# One photograph or map in, one out; a group of those has the inputs of `few_shot_1` or `few_shot_2`.
STREAMS = ("edit", "style", "restore", "control", "perceive", "extract")

Count = Callable[[Any], Any]  # a parameter -> what of it counts, as plain JSON
Rule = Mapping[str, Count] | str  # parameters that define the mapping, or why there is no group of such samples

_PREPOSITION = re.compile(
    r"\b(?:of|with|without|on|in|at|under|over|above|below|behind|beside|between|near|to|from|by|and|that|which|for)\b"
)


@dataclass(frozen=True)
class Signature:
    """What the examples of a group have in common. `params` is canonical JSON of the parameters that count."""

    stream: str
    subtask: str
    direction: str
    model: str
    params: str

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "params": json.loads(self.params)}


@dataclass(frozen=True)
class Shown:
    """The mapping of a sample. It is `complete` if examples alone tell what to do with a new input.

    It is not if the instruction points at one thing among several ("the left cup"), or says where something comes.
    """

    signature: Signature
    complete: bool


@dataclass(frozen=True)
class Ungrouped:
    """Why a sample is in no group."""

    reason: str


def exact(value: Any) -> Any:
    return value


def binned(*edges: float) -> Count:
    """The number of the interval between `edges` in which a value lies."""
    return lambda value: bisect(edges, value)


def legend(pairs: list[list[Any]]) -> list[list[str]]:
    """Which name has which colour, whatever the order."""
    return sorted([str(name).lower(), str(colour)] for *_, name, colour in pairs)


def sign(value: float) -> int:
    return (value > 0) - (value < 0)


def noun(phrase: str) -> str:
    """What a thing is, without what tells it apart from others: "white pot of orange flowers" -> "pot"."""
    words = _PREPOSITION.split(phrase.lower(), maxsplit=1)[0].split() or phrase.lower().split()
    return words[-1] if words else ""


_SEVERITY = {"severity": binned(0.5)}
_THING = {"thing": noun}
_TEXT = "the words are made up for every picture, so no example tells them"
RULES: dict[str, Rule] = {
    # Maps, in both directions.
    "map:canny": {"low_threshold": binned(100)},
    "map:lineart": {"guassian_sigma": binned(6), "intensity_threshold": binned(8)},
    "map:lines": {"min_length": binned(0.045)},
    "map:luminance": {},
    "map:palette": {"cells": exact},
    "map:softedge": {},
    "map:scribble": {"sigma": binned(2.25)},
    "map:edges": {"annotator": exact},
    "map:mlsd": {"min_length": binned(0.045)},
    "map:lineart_realistic": {},
    "map:lineart_anime": {},
    "map:semantic": {"legend": legend},
    "map:pose": {},
    "map:boxes": {"legend": legend},
    "map:segmentation": {"legend": legend},
    "map:referring": {"phrase": noun, "colour": exact, "alpha": exact},
    "map:referring_outline": {"phrase": noun, "colour": exact},
    "map:depth": {},
    "map:normal": {},
    # Edits.
    "edit_remove": _THING,
    "edit_move": {**_THING, "shift": sign},
    "edit_resize": _THING,
    "edit_flip": _THING,
    "edit_recolor": {**_THING, "colour": exact},
    "edit_attribute": {**_THING, "kind": exact},
    "edit_background": {**_THING, "kind": exact, "colour": exact},
    "edit_replace": {**_THING, "new": exact},
    "edit_material": {**_THING, "material": exact},
    "edit_surroundings": {**_THING, "place": exact},
    "edit_restyle_scene": {"look": exact},
    "edit_mirror": {},
    "edit_rotate": {"turn": exact},
    "edit_text_add": _TEXT,
    "edit_text_replace": _TEXT,
    "edit_compose": "two edits drawn at random hardly ever meet the same two",
    # Degradations, to be undone.
    "degrade_super_resolution": _SEVERITY,
    "degrade_deblur": {"kind": exact, **_SEVERITY},
    "degrade_denoise": {"kind": exact, **_SEVERITY},
    "degrade_derain": _SEVERITY,
    "degrade_desnow": _SEVERITY,
    "degrade_dehaze": _SEVERITY,
    "degrade_low_light": {"kind": exact, **_SEVERITY},
    "degrade_over_exposure": _SEVERITY,
    "degrade_jpeg": _SEVERITY,
    "degrade_pixelate": _SEVERITY,
    "degrade_color_cast": {"angle": binned(-math.pi / 2, 0, math.pi / 2), **_SEVERITY},
    "degrade_contrast": _SEVERITY,
    "degrade_colorize": {"kind": exact},
    "degrade_inpaint": {"fill": exact, "kind": exact},
    "degrade_outpaint": {"fill": exact},
    # A style is its own subtask; what else is drawn varies its strokes.
    "style:*": {},
    # A thing cut out.
    "subject_crops": {**_THING, "background": exact},
    "try_off": {"garment": noun, "background": exact},
    "x2i_import": "made elsewhere: what defines its mapping is not known",
}
# The way back of an operation, where that is another mapping than the same parameters backwards.
INVERSE: dict[str, Rule] = {
    "edit_recolor": {**_THING, "before": exact},
    "edit_text_add": {},  # text is removed, whatever it says
}
# No example tells where the thing is to appear.
_PLACE_UNTOLD = {("edit_remove", "inverse")}


def shown_by(record: SampleRecord) -> Shown | Ungrouped:
    """The mapping that a sample of one of `STREAMS` shows, or why it can be in no group."""
    op = record.ops[-1]
    name = "style:*" if op.name.startswith("style:") else op.name
    rule = RULES.get(name, f"there is no rule for the operation {name}")
    if record.direction == "inverse":
        rule = INVERSE.get(name, rule)
    if isinstance(rule, str):
        return Ungrouped(rule)
    params = json.loads(op.params)
    counted = {key: (count, params[key]) for key, count in rule.items() if key in params}
    values = json.dumps({key: count(value) for key, (count, value) in counted.items()}, sort_keys=True)
    named_barely = all(count(value) == value for count, value in counted.values() if count is noun)
    complete = named_barely and (name, record.direction) not in _PLACE_UNTOLD
    return Shown(Signature(record.stream, record.subtask, record.direction, op.model, values), complete)
