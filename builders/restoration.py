"""Restoration: a photograph is degraded, and the instruction asks to undo it. The target is always the photograph.

Stream `restore`: `input_1.jpg` (degraded), `output.jpg`, `edit_mask.png`. Whole-image degradations have a mask of all
ones and pass the target's bytes through. Holes have their exact mask, and both sides are encoded from pixels by the
same encoder, so that every 8x8 block away from the hole decodes to the same pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, field_validator, model_validator

from builders.alignment import measure_pair, psnr
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
from builders.degradations import DEGRADATIONS, Degraded
from builders.degradations.base import uniform
from builders.degradations.holes import INPAINT_AREA, OUTPAINT_WINDOW
from builders.templates import Phrasing, load_templates, phrase
from schemas.codec import decode_rgb, encode_jpeg, encode_mask
from schemas.instructions import lint_instruction
from schemas.masks import decode_mask
from schemas.records import Captions, ImageRecord, Op

WEIGHTS: dict[str, float] = dict.fromkeys(DEGRADATIONS, 1.0) | {
    "super_resolution": 2.0,
    "inpaint": 2.0,
    "outpaint": 2.0,
    "desnow": 0.5,
    "pixelate": 0.5,
    "color_cast": 0.5,
    "contrast": 0.5,
}
HOLE_AREA = {"inpaint": INPAINT_AREA, "outpaint": (1 - OUTPAINT_WINDOW[1], 1 - OUTPAINT_WINDOW[0])}
# A quarter of the side is left of a picture at x4: below 64 px nothing can be recognised.
LEAST_SIDE = {"super_resolution": 256}


class RestorationParams(BuilderParams):
    """The `restoration` section of a recipe.

    Args:
        subtasks: which degradations, with weights (or a list: equal weights).
        per_image: how many different ones are tried on each image.
        severity: range from which the severity is drawn uniformly.
        min_side: images with a shorter side are rejected (super-resolution needs 256 in any case).
        psnr: a degraded picture above the upper bound has hardly changed, below the lower one it is lost (dB).
        caption_probability: how often the instruction of a hole tells what the picture shows, if that is known.
    """

    subtasks: Weights = Field(default_factory=lambda: dict(WEIGHTS))
    per_image: int = Field(2, ge=1)
    severity: tuple[float, float] = (0.0, 1.0)
    min_side: int = Field(128, ge=32)
    psnr: tuple[float, float] = (8.0, 40.0)
    caption_probability: float = Field(0.5, ge=0, le=1)

    @field_validator("subtasks")
    @classmethod
    def _subtasks_are_known(cls, subtasks: Weights) -> Weights:
        return check_names(subtasks, DEGRADATIONS, "restoration subtask")

    @model_validator(mode="after")
    def _ranges_make_sense(self) -> RestorationParams:
        if self.per_image > len(self.subtasks):
            raise ValueError(f"per_image {self.per_image} exceeds the {len(self.subtasks)} subtask(s)")
        if not 0 <= self.severity[0] <= self.severity[1] <= 1:
            raise ValueError(f"severity {list(self.severity)} is not a range inside [0, 1]")
        if not self.psnr[0] < self.psnr[1]:
            raise ValueError(f"psnr {list(self.psnr)} is not a range (low, high)")
        return self


class Restoration(Builder):
    """Attempts are subtask names; each makes one sample."""

    name: ClassVar[str] = "restoration"
    version: ClassVar[str] = "1"
    Params: ClassVar[type[BuilderParams]] = RestorationParams
    params: RestorationParams

    def attempts(self, record: ImageRecord, rng: np.random.Generator) -> list[str]:
        return draw_names(self.params.subtasks, self.params.per_image, rng)

    def build(self, image: SourceImage, attempt: str, rng: np.random.Generator) -> Outcome:
        side = min(image.pixels.shape[:2])
        if side < max(self.params.min_side, LEAST_SIDE.get(attempt, 0)):
            return Rejected("too_small", side, attempt)
        severity = uniform(rng, *self.params.severity)
        pixels = image.pixels.astype(np.float32) / 255
        degraded = DEGRADATIONS[attempt](pixels, rng, severity, **_extras(image, attempt))
        hole = degraded.hole
        mask = np.ones(image.pixels.shape[:2], bool) if hole is None else hole
        members = {
            "input_1.jpg": encode_jpeg(np.rint(degraded.pixels * 255).astype(np.uint8)),
            "output.jpg": image.jpeg if hole is None else encode_jpeg(image.pixels),
            "edit_mask.png": encode_mask(mask),
        }
        source = decode_rgb(members["input_1.jpg"])
        target = image.pixels if hole is None else decode_rgb(members["output.jpg"])
        if rejected := self._gate(attempt, degraded, source, target):
            return rejected
        measure = measure_pair(source, target, mask)
        wording = self._phrase(attempt, degraded, image.record.captions, rng)
        record = draft(
            image.record,
            "restore",
            attempt,
            Op.of(f"degrade_{attempt}", self.version, severity=degraded.severity, **degraded.params),
            instruction=wording.instruction,
            instruction_variants=wording.instruction_variants,
            template_id=wording.template_id,
            input_roles=("degraded",),
            real_input=False,
            edit_source_index=0,
            edit_area_ratio=round(float(mask.mean()), 6),
            aligned=measure.aligned,
            align=measure.align,
            change=measure.change,
            severity=degraded.severity,
        )
        return [Sample(record, members)]

    def _gate(self, attempt: str, degraded: Degraded, source: np.ndarray, target: np.ndarray) -> Rejected | None:
        if degraded.hole is not None:
            low, high = HOLE_AREA[attempt]
            area = float(degraded.hole.mean())
            return None if low <= area <= high else Rejected("hole_area", area, attempt)
        low, high = self.params.psnr
        value = psnr(source, target)
        if low <= value <= high:
            return None
        return Rejected("no_op" if value > high else "unrecoverable", value, attempt)

    def _phrase(self, attempt: str, degraded: Degraded, captions: Captions, rng: np.random.Generator) -> Phrasing:
        name = f"{attempt}_{degraded.wording}" if degraded.wording else attempt
        fields: Mapping[str, str] = degraded.fields
        caption = " ".join((captions.short or captions.best()).split()).rstrip(".")
        with_caption = f"{name}_caption"
        usable = caption and not lint_instruction(caption, 0)
        if with_caption in load_templates(self.name) and usable and rng.random() < self.params.caption_probability:
            name, fields = with_caption, {**fields, "caption": caption}
        return phrase(self.name, name, rng, 2, **fields)


def _extras(image: SourceImage, attempt: str) -> dict[str, Any]:
    """What some degradations take from the image beside its pixels."""
    if attempt == "dehaze":
        return {"depth": image.depth}
    if attempt == "inpaint":
        size = image.pixels.shape[:2]
        masks = (decode_mask(entity.mask, *size) for entity in image.record.entities if entity.mask)
        return {"masks": [mask for mask in masks if mask.any()]}
    return {}
