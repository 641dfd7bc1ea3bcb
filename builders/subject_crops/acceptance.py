"""Which entities can be subjects, and why the others cannot.

Thresholds follow public builders (GRIT, OpenS2V-5M, X2Edit): a subject is a whole thing of a fair size, with a
mask that hangs together. Body parts are none; people are a matter of policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import cv2
import numpy as np
from pydantic import Field, model_validator

from builders.annotators.entities import box_iou
from builders.base import BuilderParams, Rejected, SourceImage
from builders.edit_pairs.claims import outline_contrast
from builders.edit_pairs.things import MaskFinder
from builders.subject_crops.words import is_body_part, is_person, name_of
from schemas.records import UNKNOWN, Entity, ImageRecord

Box = tuple[int, int, int, int]
Persons = Literal["licensed", "all", "none"]
_BORDER = 2  # pixels: a box so close to the edge of the picture touches it
_SAME_BOX = 0.5  # least overlap of an entity's box with that of its mask


class SubjectRules(BuilderParams):
    """The `accept` part of the `subject_crops` section.

    Args:
        area: range of the share of the picture that the mask covers, or the box where there is no mask.
        max_borders: how many edges of the picture the box may touch.
        covered: largest share of the mask's convex hull that other things may take away, for it to be extracted.
        fill: range of the share of its box that the mask covers.
        whole: least share of the mask in its largest piece.
        outline: least colour difference (CIE76, median) across the mask's outline, for it to be cut out.
        min_score: of a detection, where the record knows it.
        min_side: pixels, of the shorter side of the box.
        persons: people of photographs with a licence, all people, or none.
    """

    area: tuple[float, float] = (0.02, 0.6)
    max_borders: int = Field(default=1, ge=0, le=4)
    fill: tuple[float, float] = (0.3, 0.98)
    covered: float = Field(default=0.04, ge=0, le=1)
    whole: float = Field(default=0.9, ge=0, le=1)
    outline: float = Field(default=8.0, ge=0)
    min_score: float = Field(default=0.35, ge=0, le=1)
    min_side: int = Field(default=64, ge=48)
    persons: Persons = "licensed"

    @model_validator(mode="after")
    def _ranges_make_sense(self) -> SubjectRules:
        for name in ("area", "fill"):
            low, high = getattr(self, name)
            if not 0 <= low < high <= 1:
                raise ValueError(f"{name} {[low, high]} is not a range inside [0, 1]")
        return self


@dataclass(frozen=True)
class Subject:
    """An accepted entity.

    Attributes:
        number: of the entity in the record.
        box: (x0, y0, x1, y1) in whole pixels, tight around the mask if there is one.
        mask: boolean [H, W]; None if there is none that a cut-out could be made with.
        origin: where the mask comes from.
        why_no_mask: the reason, if there is none.
        scores: what was measured.
    """

    number: int
    entity: Entity
    box: Box
    mask: np.ndarray | None = field(repr=False)
    origin: str = ""
    why_no_mask: Rejected | None = None
    scores: dict[str, float] = field(default_factory=dict)


def accept(image: SourceImage, number: int, masks: MaskFinder, rules: SubjectRules) -> Subject | Rejected:
    """The entity as a subject, or the first rule that it breaks."""
    entity, size = image.record.entities[number], image.pixels.shape[:2]
    if (refused := refused_kind(entity, image.record, rules)) is not None:
        return refused
    found = masks.find(image, number)
    if found is None and entity.mask:
        return Rejected("split_mask", 0.0)
    mask, origin = found or (None, "")
    box = whole_pixels(entity.box, size) if mask is None else box_of(mask)
    if (refused := _refused_shape(entity, box, mask, size, rules)) is not None:
        return refused
    if mask is None:
        return Subject(number, entity, box, None, "", Rejected("no_mask"))
    contrast = outline_contrast(image.pixels, mask)
    clear = float(np.median(contrast)) if contrast.size else 0.0
    scores = {"area": float(mask.mean()), "fill": fill_of(mask, box), "outline": clear}
    if clear < rules.outline:
        return Subject(number, entity, box, None, "", Rejected("faint_outline", clear), scores)
    return Subject(number, entity, box, mask, origin, None, scores)


def refused_kind(entity: Entity, record: ImageRecord, rules: SubjectRules) -> Rejected | None:
    """Why something of this name and score is no subject in this photograph, or None."""
    if not name_of(entity).plain:
        return Rejected("unusable_name")
    if is_body_part(entity):
        return Rejected("body_part")
    if is_person(entity) and (refused := refused_person(record, rules.persons)) is not None:
        return refused
    if entity.score != UNKNOWN and entity.score < rules.min_score:
        return Rejected("score", entity.score)
    return None


def refused_person(record: ImageRecord, persons: Persons) -> Rejected | None:
    """Why people in this photograph are left out, or None."""
    if persons == "none":
        return Rejected("person")
    return Rejected("person_without_license") if persons == "licensed" and not record.license else None


def _refused_shape(
    entity: Entity, box: Box, mask: np.ndarray | None, size: tuple[int, int], rules: SubjectRules
) -> Rejected | None:
    x0, y0, x1, y1 = box
    sides = x1 - x0, y1 - y0
    share = math.prod(sides) / math.prod(size) if mask is None else float(mask.mean())
    broken = [
        ("area", share, not rules.area[0] <= share <= rules.area[1]),
        ("too_small", min(sides), min(sides) < rules.min_side),
        ("cut_off", touched := borders(box, size), touched > rules.max_borders),
    ]
    if mask is not None:
        same, whole = box_iou(box, whole_pixels(entity.box, size)), share_of_largest_piece(mask)
        fill = fill_of(mask, box)
        broken += [
            ("mask_off_box", same, same < _SAME_BOX),
            ("split_mask", whole, whole < rules.whole),
            ("fill", fill, not rules.fill[0] <= fill <= rules.fill[1]),
        ]
    return next((Rejected(reason, value) for reason, value, is_broken in broken if is_broken), None)


def covered(image: SourceImage, subject: Subject) -> float:
    """Share of a subject's convex hull that other entities take away from its mask: what stands before it."""
    assert subject.mask is not None
    outlines, _ = cv2.findContours(subject.mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    size = image.pixels.shape[:2]
    hull, others = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    cv2.fillConvexPoly(hull, cv2.convexHull(np.concatenate(outlines)), 1)
    for i, other in enumerate(image.record.entities):
        x0, y0, x1, y1 = whole_pixels(other.box, size)
        a0, b0, a1, b1 = subject.box
        if i != subject.number and not (x0 <= a0 and y0 <= b0 and x1 >= a1 and y1 >= b1):
            others[y0:y1, x0:x1] = 1
    return float((hull & others & ~subject.mask).sum() / hull.sum())


def box_of(mask: np.ndarray) -> Box:
    """The tight box of a boolean mask."""
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    return x, y, x + w, y + h


def whole_pixels(box: tuple[float, float, float, float], size: tuple[int, int]) -> Box:
    """The box in whole pixels, inside a picture of (height, width), with at least one pixel."""
    x0, y0 = min(max(0, round(box[0])), size[1] - 1), min(max(0, round(box[1])), size[0] - 1)
    return x0, y0, min(max(x0 + 1, round(box[2])), size[1]), min(max(y0 + 1, round(box[3])), size[0])


def borders(box: Box, size: tuple[int, int]) -> int:
    """How many edges of a picture of (height, width) the box touches."""
    x0, y0, x1, y1 = box
    return sum((x0 < _BORDER, y0 < _BORDER, x1 > size[1] - _BORDER, y1 > size[0] - _BORDER))


def fill_of(mask: np.ndarray, box: Box) -> float:
    x0, y0, x1, y1 = box
    return float(mask.sum()) / ((x1 - x0) * (y1 - y0))


def share_of_largest_piece(mask: np.ndarray) -> float:
    count, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    return float(stats[1:, cv2.CC_STAT_AREA].max() / mask.sum()) if count > 1 else 0.0
