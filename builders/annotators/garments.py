"""garments: what people wear, with masks, by a human-parsing model of transformers.

Such a model gives every pixel a class like `Upper-clothes` or `Left-arm`; its label set is read from its configuration.
What it finds becomes entities, so every builder can use them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, cast

import cv2
import numpy as np
from pydantic import Field

from builders.annotators.annotator import Artefact
from builders.annotators.entities import box_iou
from builders.annotators.model import ModelAnnotator
from builders.annotators.pose import is_person
from builders.annotators.semantic import SemanticParams, SemanticSegmenter
from builders.base import SourceImage
from builders.templates import load_templates
from filters.models import Choice
from schemas.codec import decode_raw, encode_mask
from schemas.masks import encode_rle
from schemas.models import ModelParams
from schemas.records import Entity, ImageRecord

HEAD = "head.png"  # 255 where hair and face are
_SAME_PERSON = 0.5  # overlap of boxes


class GarmentsParams(ModelParams):
    """Parameters of the `garments` annotator. Shares are of the image's area."""

    min_area: float = Field(default=0.01, ge=0, le=1, description="of a garment")
    min_body: float = Field(
        default=0.005, ge=0, le=1, description="of hair, face and limbs: clothes alone are no person"
    )


class Garments(ModelAnnotator):
    """Data: `found`, entities of the garments, and `person`, one of everybody who wears them, or {}. Member: `HEAD`.

    Models: whatever `AutoModelForSemanticSegmentation` opens and `templates/garments.yaml` knows the classes of.
    """

    name: ClassVar[str] = "garments"
    version: ClassVar[str] = "1"
    Params: ClassVar[type[ModelParams]] = GarmentsParams
    needs: ClassVar[tuple[str, ...]] = ("entities",)
    params: GarmentsParams

    @property
    def files(self) -> tuple[Choice, ...]:
        return self._parser.files

    def preflight(self) -> None:
        super().preflight()
        labels = [str(label) for label in self.checkpoint.config().get("id2label", {}).values()]
        if not {_slug(label) for label in labels} & garment_classes().keys():
            raise self.checkpoint.missing(f"none of its classes is a garment: {', '.join(labels) or 'it names none'}")

    def annotate(self, images: Sequence[SourceImage]) -> list[Artefact]:
        return [self._describe(parsed) for parsed in self._parser.annotate(images)]

    def enrich(self, record: ImageRecord, artefact: Artefact) -> ImageRecord:
        """The garments are added, and their wearer unless the record has a person there."""
        found = [Entity(**entity) for entity in artefact.data.get("found", [])]
        if found and not any(_is_there(entity, artefact.data["person"]["box"]) for entity in record.entities):
            found.append(Entity(**artefact.data["person"]))
        return record.model_copy(update={"entities": (*record.entities, *found)}) if found else record

    @cached_property
    def _parser(self) -> SemanticSegmenter:
        return SemanticSegmenter(SemanticParams(**self.params.model_dump(include=set(ModelParams.model_fields))))

    def _describe(self, parsed: Artefact) -> Artefact:
        words, classes = load_templates("garments"), garment_classes()
        ids = decode_raw(parsed.members["semantic.png"])
        masks = {_slug(segment["label"]): ids == segment["id"] for segment in parsed.data["segments"]}
        body, head = _union(masks, words["body"], ids), _union(masks, words["head"], ids)
        worn: dict[str, np.ndarray] = {}
        for slug in masks.keys() & classes.keys():
            name = classes[slug]
            worn[name] = worn.get(name, np.zeros(ids.shape, bool)) | masks[slug]
        worn = {name: worn[name] for name in sorted(worn) if worn[name].mean() >= self.params.min_area}
        if not worn or body.mean() < self.params.min_body:
            return self.found({}, found=[], person={})
        everybody = np.logical_or.reduce([body, head, *worn.values()])
        return self.found(
            {HEAD: encode_mask(head)},
            found=[_entity(name, mask) for name, mask in worn.items()],
            person=_entity("person", everybody),
        )


def garment_classes() -> Mapping[str, str]:
    """What human parsers call garments, and what they are called here."""
    return cast(Mapping[str, str], load_templates("garments")["classes"])


def _slug(label: str) -> str:
    return label.strip().lower().replace(" ", "-").replace("_", "-")


def _union(masks: Mapping[str, np.ndarray], slugs: Sequence[str], ids: np.ndarray) -> np.ndarray:
    return np.logical_or.reduce([np.zeros(ids.shape, bool), *(masks[slug] for slug in slugs if slug in masks)])


def _entity(name: str, mask: np.ndarray) -> dict[str, Any]:
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    return {"phrase": f"the {name}", "label": name, "box": [x, y, x + w, y + h], "mask": encode_rle(mask)}


def _is_there(entity: Entity, box: Sequence[float]) -> bool:
    """Whether the entity is a person in about this box."""
    x0, y0, x1, y1 = box
    return is_person(entity.label or entity.phrase) and box_iou(entity.box, (x0, y0, x1, y1)) > _SAME_PERSON
