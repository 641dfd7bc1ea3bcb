"""control (map -> photo) and perceive (photo -> map): each map is made once and used in both directions.

`control` is the forward direction, because its target is the real photo; `perceive` is its inverse. Palette works both
ways ("reduce to blocks" is well defined: the instruction says to how many). The `referring` maps paint on the photo
itself, so they are targets only.
"""

from __future__ import annotations

import json
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from builders.annotators.layouts import Boxes, Referring, ReferringOutline, Segmentation
from builders.annotators.maps import Canny, ConditionMap, Depth, Detector, Lineart, Lines, Luminance, Palette
from builders.base import (
    Builder,
    BuilderParams,
    Outcome,
    Rejected,
    Sample,
    SourceImage,
    Weights,
    check_names,
    draft,
    draw_names,
)
from builders.captions import Style, draw_style, strip_meta_talk, usable_captions
from builders.templates import phrase
from schemas.codec import encode_png
from schemas.records import ImageRecord, Op

Direction = Literal["control", "perceive"]

PHOTO_MAPS = {detector.name: detector for detector in (Canny, Lineart, Lines, Luminance, Palette)}
ENTITY_MAPS = {detector.name: detector for detector in (Boxes, Segmentation, Referring, ReferringOutline)}
MAPS = (*PHOTO_MAPS, *ENTITY_MAPS, Depth.name)
TARGET_ONLY = (Referring.name, ReferringOutline.name)
CAPTION_MIX: dict[Style, float] = {"short": 0.6, "long": 0.3, "alt": 0.1}
VARIANTS = 2  # further phrasings kept beside the instruction


class ConditionMapsParams(BuilderParams):
    """`maps` weighs the maps to choose from (a list weighs them alike); `per_image` are chosen for every image.

    `depth` needs sources that bring their own depth, so a recipe has to ask for it.
    """

    maps: Weights = Field(dict.fromkeys((*PHOTO_MAPS, *ENTITY_MAPS), 1.0))
    per_image: int = Field(2, ge=1)
    directions: tuple[Direction, ...] = Field(("control", "perceive"), min_length=1)

    @field_validator("maps")
    @classmethod
    def _maps_are_known(cls, maps: Weights) -> Weights:
        return check_names(maps, MAPS, "condition map")


class ConditionMaps(Builder):
    """An attempt is the name of a map; its samples are the asked directions of that map."""

    name: ClassVar[str] = "condition_maps"
    version: ClassVar[str] = "1"
    Params: ClassVar[type[BuilderParams]] = ConditionMapsParams
    params: ConditionMapsParams

    def attempts(self, record: ImageRecord, rng: np.random.Generator) -> list[str]:
        """Maps that the record does not rule out, drawn without replacement by weight."""
        possible = {name: w for name, w in self.params.maps.items() if self._is_possible(name, record)}
        return draw_names(possible, self.params.per_image, rng) if possible else []

    def build(self, image: SourceImage, attempt: str, rng: np.random.Generator) -> Outcome:
        detector = _detector(attempt, image)
        found = detector(image.pixels, rng)
        if isinstance(found, Rejected):
            return found
        png = encode_png(found.image)
        make = {"control": _control, "perceive": _perceive}
        return [make[direction](image, detector, found, png, rng) for direction in self._directions(attempt)]

    def _directions(self, name: str) -> tuple[Direction, ...]:
        return tuple(d for d in self.params.directions if d == "perceive" or name not in TARGET_ONLY)

    def _is_possible(self, name: str, record: ImageRecord) -> bool:
        has_entities = name not in ENTITY_MAPS or not ENTITY_MAPS[name](record.entities).missing
        return has_entities and bool(self._directions(name))


def _detector(name: str, image: SourceImage) -> Detector:
    if name in ENTITY_MAPS:
        return ENTITY_MAPS[name](image.record.entities)
    return Depth(image.depth) if name == Depth.name else PHOTO_MAPS[name]()


def _control(
    image: SourceImage, detector: Detector, found: ConditionMap, png: bytes, rng: np.random.Generator
) -> Sample:
    """map -> photo, with a caption in the instruction where the image has a usable one."""
    template, words = f"{detector.name}_control", dict(found.words)
    captions = usable_captions(image.record.captions, CAPTION_MIX)
    if not isinstance(captions, Rejected):
        caption = strip_meta_talk(captions[draw_style(captions, CAPTION_MIX, rng)])
        template, words["caption"] = f"{template}_captioned", caption if caption[-1] in ".!?" else f"{caption}."
    record = draft(
        image.record,
        "control",
        detector.name,
        _op(detector, found),
        **vars(phrase("condition_maps", template, rng, VARIANTS, **words)),
        direction="forward",
        input_roles=(f"condition:{detector.name}",),
        real_input=False,
        scores=_scores(found),
    )
    return Sample(record, {"input_1.png": png, "output.jpg": image.jpeg})


def _perceive(
    image: SourceImage, detector: Detector, found: ConditionMap, png: bytes, rng: np.random.Generator
) -> Sample:
    """photo -> map."""
    record = draft(
        image.record,
        "perceive",
        detector.name,
        _op(detector, found),
        **vars(phrase("condition_maps", f"{detector.name}_perceive", rng, VARIANTS, **found.words)),
        direction="inverse",
        input_roles=("photo",),
        output_kind=f"map:{detector.name}",
        real_output=False,
        scores=_scores(found),
    )
    return Sample(record, {"input_1.jpg": image.jpeg, "output.png": png})


def _op(detector: Detector, found: ConditionMap) -> Op:
    return Op.of(f"map:{detector.name}", detector.version, **found.params)


def _scores(found: ConditionMap) -> str:
    return json.dumps({name: round(value, 4) for name, value in found.stats.items()}, sort_keys=True)
