"""control (map -> photo) and perceive (photo -> map): each map is made once and used in both directions.

`control` is the forward direction, because its target is the real photo; `perceive` is its inverse. Palette works both
ways ("reduce to blocks" is well defined: the instruction says to how many). The `referring` maps paint on the photo
itself, so they are targets only. `together` gives two or three different maps of one photo as inputs of one sample.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from builders.annotators import stored
from builders.annotators.hed import MODEL as HED
from builders.annotators.layouts import Boxes, Referring, ReferringOutline, Segmentation, enumerate_words
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
from builders.templates import load_templates, phrase
from filters.models import ModelMissing
from schemas.codec import encode_png
from schemas.instructions import placeholder
from schemas.records import ImageRecord, Op

Direction = Literal["control", "perceive"]

WEIGHT_FREE_MAPS = {detector.name: detector for detector in (Canny, Lineart, Lines, Luminance, Palette)}
ENTITY_MAPS = {detector.name: detector for detector in (Boxes, Segmentation, Referring, ReferringOutline)}
# Only an annotator of the same name makes these.
ANNOTATED_MAPS = {
    detector.name: detector
    for detector in (
        stored.StoredEdges,
        stored.StoredLines,
        stored.StoredLineartRealistic,
        stored.StoredLineartAnime,
        stored.Semantic,
        stored.Pose,
    )
}
HED_MAPS = ("softedge", stored.Scribble.name)  # packaged HED, or the annotator `softedge`
DEPTH_MAPS = (Depth.name, stored.Normals.name)  # the source's own depth, or an annotator's
MAPS = (*WEIGHT_FREE_MAPS, *HED_MAPS, *ANNOTATED_MAPS, *ENTITY_MAPS, *DEPTH_MAPS)
TARGET_ONLY = (Referring.name, ReferringOutline.name)
# Maps that say much the same: at most one of each kind goes into one sample. The others are kinds of their own.
KINDS = {
    **dict.fromkeys((*HED_MAPS, "canny", "lineart", "lines", "luminance"), "shape"),
    **dict.fromkeys(("edges", "mlsd", "lineart_realistic", "lineart_anime"), "shape"),
    **dict.fromkeys(DEPTH_MAPS, "surface"),
    **dict.fromkeys(("boxes", "segmentation", "semantic"), "layout"),
}
CAPTION_MIX: dict[Style, float] = {"short": 0.6, "long": 0.3, "alt": 0.1}
VARIANTS = 2  # further phrasings kept beside the instruction


class ConditionMapsParams(BuilderParams):
    """`maps` weighs the maps to choose from (a list weighs them alike); `per_image` are chosen for every image.

    Unless a recipe asks for others, maps need neither a model nor a depth. `together` makes, of each image, a sample of
    two and/or three maps at once, drawn by the same weights.
    """

    maps: Weights = Field(dict.fromkeys((*WEIGHT_FREE_MAPS, *ENTITY_MAPS), 1.0))
    per_image: int = Field(2, ge=1)
    directions: tuple[Direction, ...] = Field(("control", "perceive"), min_length=1)
    together: tuple[Literal[2, 3], ...] = Field((), description="numbers of maps in multi-condition samples")

    @field_validator("maps")
    @classmethod
    def _maps_are_known(cls, maps: Weights) -> Weights:
        return check_names(maps, MAPS, "condition map")

    @model_validator(mode="after")
    def _together_is_possible(self) -> ConditionMapsParams:
        if len(set(self.together)) < len(self.together):
            raise ValueError("together: each number of maps can be given once")
        kinds = {KINDS.get(name, name) for name in self.maps if name not in TARGET_ONLY}
        if self.together and max(self.together) > len(kinds):
            raise ValueError(
                f"together: of these maps at most {len(kinds)} differ in kind (edges, lines and luminance are one)"
            )
        if self.together and "control" not in self.directions:
            raise ValueError("together: such samples are of direction control, which is not among the directions")
        return self


@dataclass(frozen=True)
class _Made:
    """A map of the photo, ready to be an input or a target."""

    detector: Detector
    found: ConditionMap
    png: bytes

    @property
    def op(self) -> Op:
        """The map's provenance. A map from an artefact names its model, and the annotator's parameters."""
        detector, made_by = self.detector, self.detector.made_by
        if made_by is None:
            return Op.of(f"map:{detector.name}", detector.version, **self.found.params)
        op = Op.of(f"map:{detector.name}", detector.version, **self.found.params, annotator=json.loads(made_by.params))
        return op.model_copy(update={"model": made_by.model, "revision": made_by.revision})


class ConditionMaps(Builder):
    """An attempt is the name of a map, or names joined by "+"; its samples are the asked directions of that map."""

    name: ClassVar[str] = "condition_maps"
    version: ClassVar[str] = "1"
    Params: ClassVar[type[BuilderParams]] = ConditionMapsParams
    params: ConditionMapsParams

    def required_annotators(self) -> frozenset[str]:
        needed = set(self.params.maps) & set(ANNOTATED_MAPS)
        if set(self.params.maps) & set(HED_MAPS) and not _has_packaged_hed():
            needed.add("softedge")
        return frozenset(needed)

    def attempts(self, record: ImageRecord, rng: np.random.Generator) -> list[str]:
        """Maps that the record does not rule out, drawn without replacement by weight."""
        possible = {name: w for name, w in self.params.maps.items() if self._is_possible(name, record)}
        if not possible:
            return []
        names = draw_names(possible, self.params.per_image, rng)
        return names + ["+".join(several) for n in self.params.together if (several := _draw_kinds(possible, n, rng))]

    def build(self, image: SourceImage, attempt: str, rng: np.random.Generator) -> Outcome:
        names = attempt.split("+")
        maps = []
        for name in names:
            detector = _detector(name, image)
            found = detector(image.pixels, rng)
            if isinstance(found, Rejected):
                return replace(found, detail=name) if len(names) > 1 else found
            maps.append(_Made(detector, found, encode_png(found.image)))
        if len(maps) > 1:
            return [_control(image, maps, rng)]
        make = {"control": lambda: _control(image, maps, rng), "perceive": lambda: _perceive(image, maps[0], rng)}
        return [make[direction]() for direction in self._directions(attempt)]

    def _directions(self, name: str) -> tuple[Direction, ...]:
        return tuple(d for d in self.params.directions if d == "perceive" or name not in TARGET_ONLY)

    def _is_possible(self, name: str, record: ImageRecord) -> bool:
        has_entities = name not in ENTITY_MAPS or not ENTITY_MAPS[name](record.entities).missing
        return has_entities and bool(self._directions(name))


def _has_packaged_hed() -> bool:
    try:
        return HED.path.exists()
    except ModelMissing:
        return False


def _detector(name: str, image: SourceImage) -> Detector:
    if name in ENTITY_MAPS:
        return ENTITY_MAPS[name](image.record.entities)
    if name in ANNOTATED_MAPS:
        return ANNOTATED_MAPS[name](image)
    if name in WEIGHT_FREE_MAPS:
        return WEIGHT_FREE_MAPS[name]()
    views: dict[str, Callable[[SourceImage], Detector]] = {
        "softedge": stored.soft_edges,
        "scribble": stored.Scribble,
        "depth": stored.depth_map,
        "normal": stored.Normals,
    }
    return views[name](image)


def _draw_kinds(weights: Weights, count: int, rng: np.random.Generator) -> list[str]:
    """`count` maps of different kinds, drawn by weight; none if there are not as many."""
    inputs = {name: w for name, w in weights.items() if name not in TARGET_ONLY}
    drawn = draw_names(inputs, len(inputs), rng) if inputs else []
    first_of_kind = {KINDS.get(name, name): name for name in reversed(drawn)}
    chosen = [name for name in drawn if name in first_of_kind.values()][:count]
    return chosen if len(chosen) == count else []


def _control(image: SourceImage, maps: Sequence[_Made], rng: np.random.Generator) -> Sample:
    """maps -> photo, with a caption in the instruction where the image has a usable one."""
    several = len(maps) > 1
    subtask = "together" if several else maps[0].detector.name
    template, words = (
        f"{subtask}_control",
        {"conditions": _conditions(maps, rng)} if several else dict(maps[0].found.words),
    )
    captions = usable_captions(image.record.captions, CAPTION_MIX)
    if not isinstance(captions, Rejected):
        caption = strip_meta_talk(captions[draw_style(captions, CAPTION_MIX, rng)])
        template, words["caption"] = f"{template}_captioned", caption if caption[-1] in ".!?" else f"{caption}."
    record = draft(
        image.record,
        f"control_{len(maps)}" if several else "control",
        subtask,
        *(made.op for made in maps),
        **vars(phrase("condition_maps", template, rng, VARIANTS, **words)),
        direction="forward",
        input_roles=tuple(f"condition:{made.detector.name}" for made in maps),
        real_input=False,
        scores=_scores(maps),
    )
    inputs = {f"input_{i}.png": made.png for i, made in enumerate(maps, start=1)}
    return Sample(record, {**inputs, "output.jpg": image.jpeg})


def _conditions(maps: Sequence[_Made], rng: np.random.Generator) -> str:
    """What each input image is: "the depth map <img><|image_1|></img> and the color blocks <img><|image_2|></img>"."""
    nouns = load_templates("condition_nouns")
    return enumerate_words(
        [
            str(rng.choice(nouns[made.detector.name])).format(image=placeholder(i), **made.found.words)
            for i, made in enumerate(maps, start=1)
        ]
    )


def _perceive(image: SourceImage, made: _Made, rng: np.random.Generator) -> Sample:
    """photo -> map."""
    name = made.detector.name
    record = draft(
        image.record,
        "perceive",
        name,
        made.op,
        **vars(phrase("condition_maps", f"{name}_perceive", rng, VARIANTS, **made.found.words)),
        direction="inverse",
        input_roles=("photo",),
        output_kind=f"map:{name}",
        real_output=False,
        scores=_scores([made]),
    )
    return Sample(record, {"input_1.jpg": image.jpeg, "output.png": made.png})


def _scores(maps: Sequence[_Made]) -> str:
    prefixes = [f"{made.detector.name}_" if len(maps) > 1 else "" for made in maps]
    stats = {
        f"{p}{k}": round(v, 4) for p, made in zip(prefixes, maps, strict=True) for k, v in made.found.stats.items()
    }
    return json.dumps(stats, sort_keys=True)
