"""try_on: a person without a garment, and the garment, become the real photograph; try_off, in `extract`, the way back.

Garments are entities with a mask: the source's own, or those of the annotator `garments`. In the picture of the person
a smooth region around the garment is blank, so that neither its colour nor its outline tells what it was.
"""

from __future__ import annotations

import json
from typing import ClassVar, Literal

import cv2
import numpy as np
from pydantic import Field, PositiveInt, field_validator

from builders.alignment import measure_pair
from builders.annotators.garments import HEAD, Garments
from builders.annotators.inpaint import continue_smoothly
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
from builders.edit_pairs.claims import centre
from builders.edit_pairs.edit import grow
from builders.edit_pairs.things import MaskFinder
from builders.subject_crops.acceptance import Subject, SubjectRules, accept, refused_person, whole_pixels
from builders.subject_crops.backgrounds import PLAIN
from builders.subject_crops.described import about, describe, scores_of
from builders.subject_crops.forms import CUT_OUT, extracted, make_reference
from builders.subject_crops.words import ends_in, is_person, name_of
from builders.templates import Phrasing, load_templates, phrase
from schemas.codec import decode_raw, decode_rgb, encode_jpeg
from schemas.masks import decode_mask
from schemas.records import Entity, ImageRecord, Op

Direction = Literal["try_on", "try_off"]
FILLS = {"grey": 1.0, "smooth": 1.0}
VARIANTS = 2  # further phrasings kept beside the instruction
_GREY = (128, 128, 128)
_GROWTH, _LEAST_GROWTH = (0.06, 0.1), 4.0  # of the blank region, as a share of the garment's size; in pixels
_SMOOTHING = 1.5  # of the region's outline, in units of its growth
_WORN = 0.8  # least part of a garment's box that lies in the box of who wears it


class TryOnParams(BuilderParams):
    """The `try_on` section of a recipe.

    Args:
        per_image: how many garments of an image to try, by direction; a direction that is left out is not made.
        fills: weights of what the blank region holds: grey, or the surroundings, continued smoothly.
        accept: rules for garments; `persons` is about who wears them.
        border: largest share of a garment's outline that lies on the edges of the picture.
    """

    per_image: dict[Direction, PositiveInt] = Field(default={"try_on": 1, "try_off": 1}, min_length=1)
    fills: Weights = Field(default_factory=lambda: dict(FILLS))
    accept: SubjectRules = SubjectRules(fill=(0.2, 0.98), whole=0.8, outline=5.0)
    border: float = Field(default=0.3, ge=0, le=1)

    @field_validator("fills")
    @classmethod
    def _fills_are_known(cls, fills: Weights) -> Weights:
        return check_names(fills, FILLS, "fill")


class TryOn(Builder):
    """An attempt is a direction and the number of an entity."""

    name: ClassVar[str] = "try_on"
    version: ClassVar[str] = "1"
    Params: ClassVar[type[BuilderParams]] = TryOnParams
    params: TryOnParams

    def __init__(self, params: TryOnParams) -> None:
        super().__init__(params)
        self.masks = MaskFinder(None)  # a garment does not stand out from who wears it as a thing does from a table

    def attempts(self, record: ImageRecord, rng: np.random.Generator) -> list[str]:
        garments = [i for i, entity in enumerate(record.entities) if entity.mask and is_garment(entity)]
        drawn = [int(i) for i in rng.permutation(garments)]
        return [f"{direction}-{i}" for direction, count in self.params.per_image.items() for i in drawn[:count]]

    def build(self, image: SourceImage, attempt: str, rng: np.random.Generator) -> Outcome:
        direction, number = attempt.rsplit("-", 1)
        entity = image.record.entities[int(number)]
        garment = self._accept(image, int(number))
        if isinstance(garment, Rejected):
            return about(garment, entity)
        wearer = wearer_of(image.record, entity)
        if wearer is None:
            return about(Rejected("not_worn"), entity)
        outcome = (self._try_on if direction == "try_on" else self._try_off)(image, garment, wearer, rng)
        return about(outcome, entity) if isinstance(outcome, Rejected) else outcome

    def _accept(self, image: SourceImage, number: int) -> Subject | Rejected:
        if (refused := refused_person(image.record, self.params.accept.persons)) is not None:
            return refused
        garment = accept(image, number, self.masks, self.params.accept)
        if isinstance(garment, Rejected):
            return garment
        if garment.mask is None:
            return garment.why_no_mask or Rejected("no_mask")
        contact = border_contact(garment.mask)
        return Rejected("cut_off", contact) if contact > self.params.border else garment

    def _try_on(self, image: SourceImage, garment: Subject, wearer: Entity, rng: np.random.Generator) -> Outcome:
        reference = make_reference(image, garment, CUT_OUT, rng)
        if isinstance(reference, Rejected):
            return reference
        assert garment.mask is not None
        fill = draw_names(self.params.fills, 1, rng)[0]
        region = blank_region(garment.mask, head_of(image, garment.mask, wearer), rng)
        agnostic = encode_jpeg(blank(image.pixels, region, fill))
        measure = measure_pair(decode_rgb(agnostic), image.pixels, region)
        size = (image.record.height, image.record.width)
        person = describe(image.record, wearer, whole_pixels(wearer.box, size), "agnostic", {"fill": fill})
        worn = describe(image.record, garment.entity, garment.box, reference.form, reference.changes)
        record = draft(
            image.record,
            "try_on",
            "in_image",
            Op.of(self.name, self.version, garment=garment.entity.phrase, fill=fill),
            variant=garment.number,
            **vars(self._wording("try_on", garment.entity, wearer, rng)),
            input_roles=("person", "garment"),
            real_input=False,
            edit_source_index=0,
            edit_area_ratio=round(float(region.mean()), 6),
            aligned=measure.aligned,
            align=measure.align,
            change=measure.change,
            references=json.dumps([person, worn], sort_keys=True),
            scores=scores_of([garment]),
        )
        return [Sample(record, {"input_1.jpg": agnostic, "input_2.jpg": reference.jpeg, "output.jpg": image.jpeg})]

    def _try_off(self, image: SourceImage, garment: Subject, wearer: Entity, rng: np.random.Generator) -> Outcome:
        assert garment.mask is not None
        name = name_of(garment.entity).plain
        if sum(name_of(entity).plain == name for entity in image.record.entities) > 1:
            return Rejected("ambiguous_name")
        found = extracted(image.pixels, garment.mask, [str(c) for c in ("white", *rng.permutation(list(PLAIN)))])
        if isinstance(found, Rejected):
            return found
        pixels, background = found
        record = draft(
            image.record,
            "extract",
            "garment",
            Op.of("try_off", self.version, garment=garment.entity.phrase, background=background),
            variant=garment.number,
            **vars(self._wording("try_off", garment.entity, wearer, rng, background=background)),
            direction="inverse",
            input_roles=("photo",),
            output_kind="cutout",
            real_output=False,
            scores=scores_of([garment]),
        )
        return [Sample(record, {"input_1.jpg": image.jpeg, "output.jpg": encode_jpeg(pixels)})]

    def _wording(
        self, template: str, garment: Entity, wearer: Entity, rng: np.random.Generator, background: str = ""
    ) -> Phrasing:
        words = {"person": name_of(wearer).plain, "garment": name_of(garment).plain, "background": background}
        return phrase(self.name, template, rng, variants=VARIANTS, **words)


def is_garment(entity: Entity) -> bool:
    """Whether an entity is, by its name, something to wear."""
    return ends_in(entity, load_templates("garments")["nouns"])


def wearer_of(record: ImageRecord, garment: Entity) -> Entity | None:
    """The person in whose box most of the garment's box lies, or None: clothes also lie on chairs."""
    x0, y0, x1, y1 = garment.box
    inside = {
        i: max(0.0, min(x1, p.box[2]) - max(x0, p.box[0])) * max(0.0, min(y1, p.box[3]) - max(y0, p.box[1]))
        for i, p in enumerate(record.entities)
        if is_person(p)
    }
    best = max(inside, key=lambda i: inside[i], default=None)
    return record.entities[best] if best is not None and inside[best] >= _WORN * (x1 - x0) * (y1 - y0) else None


def border_contact(mask: np.ndarray) -> float:
    """Share of the boolean mask's outline that lies on the edges of the picture."""
    padded = np.pad(mask, 1).astype(np.uint8)
    rim = (padded - cv2.erode(padded, np.ones((3, 3), np.uint8)))[1:-1, 1:-1].astype(bool)
    on_edge = np.zeros_like(rim)
    on_edge[[0, -1]], on_edge[:, [0, -1]] = True, True
    return float((rim & on_edge).sum() / max(1, rim.sum()))


def blank_region(mask: np.ndarray, head: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Boolean [H, W]: the garment, grown and rounded so that its outline does not show; the head stays, mostly."""
    growth = max(_LEAST_GROWTH, float(rng.uniform(*_GROWTH)) * float(np.sqrt(mask.sum())))
    rounded = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), _SMOOTHING * growth) > 0.5
    rounded = grow(rounded, round(growth))  # grown first, every bump would be grown with it
    return (rounded & ~head) | grow(mask, max(round(_LEAST_GROWTH), round(growth / 3)))


def blank(pixels: np.ndarray, region: np.ndarray, fill: str) -> np.ndarray:
    """uint8 RGB with nothing to see in the boolean region: grey, or the surroundings without detail."""
    if fill == "grey":
        return np.where(region[..., None], np.array(_GREY, np.uint8), pixels)
    continued = continue_smoothly(pixels.astype(np.float32), ~region)
    soft = cv2.GaussianBlur(continued, (0, 0), max(2.0, 0.02 * max(region.shape)))
    return np.where(region[..., None], np.clip(np.rint(soft), 0, 255).astype(np.uint8), pixels)


def head_of(image: SourceImage, garment: np.ndarray, wearer: Entity) -> np.ndarray:
    """Boolean [H, W]: hair and face by the annotator `garments`, else the wearer above the garment's centre."""
    size = image.pixels.shape[:2]
    artefact = image.artefacts.get(Garments.name)
    if artefact is not None and HEAD in artefact.members:
        return decode_raw(artefact.members[HEAD]) > 0
    above = decode_mask(wearer.mask, *size) & ~garment if wearer.mask else np.zeros(size, bool)
    above[round(centre(garment)[1]) :] = False
    return above
