"""Typed records: a source image, its entities, a training sample and the operations that made it.

Every record has fixed keys and no nulls: unknown text is "", unknown numbers are -1. Free-form parts (operation
parameters, entities, scores) are JSON strings, because readers that infer a type from the first samples of a shard
(Hugging Face `datasets`, Ray Data) silently drop or reject keys that appear later.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from schemas.identity import check_key
from schemas.instructions import check_instruction
from schemas.vocabulary import STREAMS

Split = Literal["train", "val", "test"]
UNKNOWN = -1.0


class Record(BaseModel):
    """Base of all records: immutable, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Entity(Record):
    """Something in an image. `box` is (x0, y0, x1, y1) in pixels; `mask` as in `schemas.masks`, empty if unknown.

    Entities of one `subject_id`, in whatever image, are the same individual; "" if the source does not say.
    """

    phrase: str
    label: str = ""
    box: tuple[float, float, float, float]
    mask: dict[str, Any] | list[list[float]] = Field(default_factory=dict)
    score: float = UNKNOWN
    subject_id: str = ""

    @model_validator(mode="after")
    def _box_is_ordered(self) -> Entity:
        x0, y0, x1, y1 = self.box
        if not (x0 < x1 and y0 < y1):
            raise ValueError(f"box {list(self.box)} of {self.phrase!r} is not (x0 < x1, y0 < y1)")
        return self


class Captions(Record):
    """What the source says about an image. `alt` is text found beside it (alt text, sidecar)."""

    short: str = ""
    long: str = ""
    alt: str = ""
    tags: str = ""

    def best(self) -> str:
        """The most complete caption there is, or ""."""
        return self.long or self.short or self.alt


class Op(Record):
    """One operation in a sample's provenance. `params` is a JSON object."""

    name: str
    version: str
    params: str = "{}"
    seed: int = -1
    model: str = ""
    revision: str = ""

    @classmethod
    def of(cls, name: str, version: str, /, **params: Any) -> Op:
        """An operation without a model, from plain parameters."""
        return cls(name=name, version=version, params=json.dumps(params, sort_keys=True))


class Pair(Record):
    """One subject in two photographs: entity number `entity` here is entity `other_entity` of the image `other`.

    `similarity` is the cosine of the embeddings of both crops, -1 if not measured. `evidence` says who claims that
    they are the same: `features`, `subject_id` or `judge`.
    """

    entity: int = Field(ge=0)
    other: str
    other_entity: int = Field(ge=0)
    similarity: float = UNKNOWN
    evidence: str


class ImageRecord(Record):
    """One source image after ingest. Geometry refers to the normalised image (upright, capped, 8-bit sRGB)."""

    uid: str
    width: int
    height: int
    captions: Captions = Captions()
    entities: tuple[Entity, ...] = ()
    pairs: tuple[Pair, ...] = ()
    scene_id: str = ""
    license: str = ""
    license_url: str = ""
    author: str = ""
    source_url: str = ""
    optout: bool = False
    split: Split = "train"
    ops: tuple[Op, ...] = ()


class Alignment(Record):
    """Agreement of edit source and target outside the edit mask; measured on decoded pixels, -1 if not measured."""

    psnr_outside: float = UNKNOWN
    ssim_outside: float = UNKNOWN
    l1_outside: float = UNKNOWN
    shift_px: float = UNKNOWN


class Change(Record):
    """Difference of edit source and target inside the edit mask; mean absolute difference in 0..255, -1 if unknown."""

    l1_inside: float = UNKNOWN


class SampleRecord(Record):
    """The JSON member of a sample: everything a trainer, a filter or an auditor asks about it.

    `edit_source_index` is the 0-based input that the weighted flow loss compares with the target (-1: none).
    `aligned` says that this input and the target agree pixel for pixel outside the mask: measured, never assumed.
    `references` is a JSON list with what each reference of a subject is and how it was made, `group` a JSON object
    with what the examples of a few-shot group have in common.
    """

    key: str
    stream: str
    task: str
    subtask: str
    direction: Literal["forward", "inverse"] = "forward"
    instruction: str
    instruction_variants: tuple[str, ...] = ()
    template_id: str = ""
    input_roles: tuple[str, ...] = ()
    output_kind: str = "photo"
    real_input: bool = True
    real_output: bool = True
    edit_source_index: int = -1
    edit_area_ratio: float = UNKNOWN
    aligned: bool = False
    align: Alignment = Alignment()
    change: Change = Change()
    captions: Captions = Captions()
    entities: str = "[]"
    references: str = "[]"
    group: str = "{}"
    scores: str = "{}"
    severity: float = UNKNOWN
    parents: tuple[str, ...] = Field(min_length=1)
    ops: tuple[Op, ...] = Field(min_length=1)
    scene_id: str = ""
    split: Split = "train"
    license: str = ""
    license_url: str = ""
    author: str = ""
    source_url: str = ""
    optout: bool = False

    @field_validator("key")
    @classmethod
    def _key_is_safe(cls, key: str) -> str:
        return check_key(key)

    @model_validator(mode="after")
    def _is_consistent(self) -> SampleRecord:
        stream = STREAMS.get(self.stream)
        if stream is None or stream.task != self.task:
            raise ValueError(f"stream {self.stream!r} does not belong to task {self.task!r}")
        if len(self.input_roles) != len(stream.inputs):
            raise ValueError(f"{self.stream} needs {len(stream.inputs)} input roles, got {self.input_roles}")
        if not -1 <= self.edit_source_index < len(stream.inputs):
            raise ValueError(f"edit_source_index {self.edit_source_index} names no input of {self.stream}")
        for text in (self.instruction, *self.instruction_variants):
            check_instruction(text, len(stream.inputs))
        return self

    def to_json(self) -> bytes:
        """Canonical bytes: declared key order, UTF-8, no spaces; floats keep their decimal point."""
        plain = self.model_dump(mode="json")
        return json.dumps(plain, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
