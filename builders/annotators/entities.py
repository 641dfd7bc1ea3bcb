"""entities: boxes and masks of the things in an image, the source's own and those that its captions name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar

import cv2
import numpy as np
from pydantic import Field

from builders.annotators.annotator import Artefact
from builders.annotators.grabcut import GrabCut
from builders.annotators.grounders import GROUNDERS, Box, Found, Grounder
from builders.annotators.hub import TOKENIZER, check_architecture
from builders.annotators.model import ModelAnnotator
from builders.annotators.phrases import head_noun, listed_phrases, noun_phrases, unique
from builders.annotators.sam import Sam
from builders.base import Rejected, SourceImage
from builders.edit_pairs.claims import outline_contrast
from filters.models import CONFIG, PREPROCESSOR, WEIGHTS, Checkpoint, Choice, rounded
from schemas.masks import encode_rle
from schemas.models import ModelName, ModelParams
from schemas.records import Entity, ImageRecord, Op

Segment = Callable[[np.ndarray, Sequence[Box]], list[tuple[np.ndarray, float]]]
_OUTLINE_SHARE, _OUTLINE = 0.1, 5.0  # all but a tenth of a found outline differs (CIE76) from what is beside it
_LEAST_IN_MIDDLE = 0.05  # of the photograph, for a mask without a box that says where it is
_BORDER_PX = 1.5  # a box so close to the edge of the image reaches it


class SegmenterName(ModelName):
    """`grabcut`, which needs no weights, or a SAM."""

    plain_names: ClassVar[frozenset[str] | None] = frozenset({"grabcut"})


class EntitiesParams(ModelParams):
    """Parameters of the `entities` annotator. Shares are of the image's area, unless they say otherwise."""

    plain_names: ClassVar[frozenset[str] | None] = frozenset({"source"})

    model: str = Field(
        default="source", min_length=1, description="a GroundingDINO or OWLv2; source: only what the source says"
    )
    segmenter: SegmenterName | None = Field(default=SegmenterName(model="grabcut"), description="null: boxes alone")
    vocabulary: tuple[Annotated[str, Field(pattern=r"^\S.{0,59}$")], ...] = Field(
        default=(), description="look for these, and not for what the captions name"
    )
    min_score: float = Field(
        default=0.35, gt=0, lt=1, description="of a detection: 0.35 for GroundingDINO, 0.2 for OWLv2"
    )
    nms_iou: float = Field(default=0.5, gt=0, le=1, description="of two boxes that overlap more, the better one stays")
    area: tuple[float, float] = Field(default=(0.02, 0.6), description="least and largest share of a box")
    max_borders: int = Field(default=1, ge=0, le=4, description="edges of the image that a box may reach")
    min_mask_score: float = Field(default=0.8, ge=0, le=1, description="SAM's predicted overlap, GrabCut's stability")
    fill: tuple[float, float] = Field(default=(0.3, 0.98), description="least and largest share of its box for a mask")


class Entities(ModelAnnotator):
    """Data: `found` (entities with `mask_score` and `mask_problem`), `rejected` (phrase, box, score, reason, value),
    and `source`, for each of the source's own entities the `mask` that it lacks, or {}, and the `box` found for it,
    or [].

    An entity without a mask whose box is the whole photograph is named, not located (a folder of a subject). The
    grounder looks for it; without a grounder, GrabCut looks for what stands out in the middle. Where nothing is found,
    the whole photograph stays its box.

    The source wins: what it has boxed is not found a second time. An entity whose mask is refused keeps its box.
    Thresholds follow public builders: GRIT for phrases and NMS, OpenS2V-5M and X2Edit for areas and masks.
    """

    name: ClassVar[str] = "entities"
    version: ClassVar[str] = "2"
    Params: ClassVar[type[ModelParams]] = EntitiesParams
    needs: ClassVar[tuple[str, ...]] = ("caption",)
    params: EntitiesParams

    @property
    def files(self) -> tuple[Choice, ...]:
        return CONFIG, WEIGHTS, TOKENIZER, PREPROCESSOR

    def op(self) -> Op:
        return self._made_by

    @cached_property
    def _made_by(self) -> Op:
        """Names both models: the grounder as `model`, the segmenter among the parameters."""
        grounder = self.checkpoint.provenance if self._finds else {"model": self.params.model}
        elsewhere = {"model", "revision", "segmenter", "batch_size", *self.params.resources}
        params = self.params.model_dump(mode="json", exclude=elsewhere) | {"segmenter": self._segmenter_provenance}
        return Op.of(f"annotate:{self.name}", self.version, **params).model_copy(update=grounder)

    def preflight(self) -> None:
        if self._finds:
            super().preflight()
            _ = self._kind
        if (params := self._sam_params) is not None:
            checkpoint = Checkpoint(params, "segmenter.model")
            checkpoint.check(CONFIG, WEIGHTS, PREPROCESSOR)
            check_architecture(checkpoint, "segmenter", "MODEL_FOR_MASK_GENERATION_MAPPING_NAMES")

    def annotate(self, images: Sequence[SourceImage]) -> list[Artefact]:
        pictures = [image.pixels for image in images]
        phrases = [self._phrases(image.record) if self._finds else [] for image in images]
        found = (
            self._grounder.ground(pictures, phrases, self.params.min_score) if any(phrases) else [[] for _ in images]
        )
        return [Artefact(self._describe(image, own)) for image, own in zip(images, found, strict=True)]

    def enrich(self, record: ImageRecord, artefact: Artefact) -> ImageRecord:
        own = [
            entity.model_copy(update=_located(made))
            for entity, made in zip(record.entities, artefact.data["source"], strict=True)
        ]
        found = [
            Entity(**{key: entity[key] for key in Entity.model_fields if key in entity})
            for entity in artefact.data["found"]
        ]
        return record.model_copy(update={"entities": (*own, *found)})

    def _phrases(self, record: ImageRecord) -> list[str]:
        nowhere = _unlocated(record).values()
        if self.params.vocabulary:
            return unique([*self.params.vocabulary, *nowhere])
        return unique([*noun_phrases(record.captions.best()), *listed_phrases(record.captions.tags), *nowhere])

    def _describe(self, image: SourceImage, found: Iterable[Found]) -> dict[str, Any]:
        rejected: list[dict[str, Any]] = []
        accepted: list[Found] = []
        nowhere = _unlocated(image.record)
        own = [entity.box for i, entity in enumerate(image.record.entities) if i not in nowhere]
        for one in sorted(_clipped(found, image.pixels.shape), key=lambda f: (-f.score, f.phrase, f.box)):
            if (why := self._problem(one.box, image.pixels.shape, own, [a.box for a in accepted])) is None:
                accepted.append(one)
            else:
                rejected.append({**_plain(one), "reason": why.reason, "value": rounded(why.value)})
        source = self._source(image, accepted)
        masks = self._masks(image.pixels, [one.box for one in accepted])
        entities = [{**_plain(one), **made} for one, made in zip(accepted, masks, strict=True)]
        return {"found": entities, "rejected": rejected, "source": source}

    def _source(self, image: SourceImage, accepted: list[Found]) -> list[dict[str, Any]]:
        """`mask` and `box` for each of the source's entities. What a named one is found to be is taken from the list.

        The boxes accepted are sorted by their score.
        """
        entities, nowhere = image.record.entities, _unlocated(image.record)
        source: list[dict[str, Any]] = [{"mask": {}, "box": []} for _ in entities]
        bare = [i for i, entity in enumerate(entities) if not entity.mask and i not in nowhere]
        for i, made in zip(bare, self._masks(image.pixels, [entities[i].box for i in bare]), strict=True):
            source[i]["mask"] = made["mask"]
        for i, name in nowhere.items():
            found = next((one for one in accepted if f" {one.phrase}".endswith(f" {name}")), None)
            if found is not None:
                accepted.remove(found)
                source[i] = {"mask": self._masks(image.pixels, [found.box])[0]["mask"], "box": list(found.box)}
            elif not self._finds and self.params.segmenter is not None:
                source[i] = self._middle(image.pixels)
        return source

    def _middle(self, pixels: np.ndarray) -> dict[str, Any]:
        """`mask` and `box` of what stands out in the middle of a photograph; empty if nothing does."""

        def is_thing(picture: np.ndarray, mask: np.ndarray) -> bool:
            clear = outline_contrast(picture, mask)
            enough = clear.size > 0 and float(np.quantile(clear, _OUTLINE_SHARE)) >= _OUTLINE
            return enough and _LEAST_IN_MIDDLE <= mask.mean() <= self.params.area[1]

        mask, score = GrabCut(self.params.min_mask_score).locate(pixels, is_thing)
        if not score:
            return {"mask": {}, "box": []}
        x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
        box = (float(x), float(y), float(x + w), float(y + h))
        made = self._masks(pixels, [box])[0] if self._sam_params else self._judged(box, mask, score)
        return {"mask": made["mask"], "box": list(box) if made["mask"] else []}

    def _problem(self, box: Box, shape: tuple[int, ...], own: Sequence[Box], better: Sequence[Box]) -> Rejected | None:
        """Why a box is no entity, or None."""
        height, width = shape[:2]
        x0, y0, x1, y1 = box
        share = (x1 - x0) * (y1 - y0) / (height * width)
        borders = (x0 < _BORDER_PX, y0 < _BORDER_PX, x1 > width - _BORDER_PX, y1 > height - _BORDER_PX)
        if not self.params.area[0] <= share <= self.params.area[1]:
            return Rejected("area", share)
        if sum(borders) > self.params.max_borders:
            return Rejected("cut_off", sum(borders))
        for reason, others in (("source_has_it", own), ("duplicate", better)):
            if (iou := max((box_iou(box, other) for other in others), default=0.0)) > self.params.nms_iou:
                return Rejected(reason, iou)
        return None

    def _masks(self, pixels: np.ndarray, boxes: Sequence[Box]) -> list[dict[str, Any]]:
        """`mask`, `mask_score` and `mask_problem` for each box; the mask is {} if there is a problem."""
        if self._segment is None:
            return [{"mask": {}, "mask_score": 0.0, "mask_problem": "no_segmenter"} for _ in boxes]
        return [self._judged(box, *made) for box, made in zip(boxes, self._segment(pixels, boxes), strict=True)]

    def _judged(self, box: Box, mask: np.ndarray, score: float) -> dict[str, Any]:
        x0, y0, x1, y1 = box
        inside = mask[max(0, round(y0)) : round(y1), max(0, round(x0)) : round(x1)]
        fill = float(inside.sum()) / max(1.0, (x1 - x0) * (y1 - y0))
        problem = ""
        if score < self.params.min_mask_score:
            problem = "mask_score"
        elif not self.params.fill[0] <= fill <= self.params.fill[1]:
            problem = "fill"
        return {"mask": {} if problem else encode_rle(mask), "mask_score": rounded(score), "mask_problem": problem}

    @property
    def _finds(self) -> bool:
        return self.params.is_hub or self.params.is_path

    @cached_property
    def _grounder(self) -> Grounder:
        return GROUNDERS[self._kind](self.params)

    @property
    def _kind(self) -> str:
        """The grounder's model type.

        Raises:
            ModelMissing: it is no grounder.
        """
        kind = str(self.checkpoint.config().get("model_type", ""))
        if kind not in GROUNDERS:
            known = ", ".join(GROUNDERS)
            raise self.checkpoint.missing(f"a {kind or 'model of no type'} finds no phrases; known are {known}")
        return kind

    @property
    def _sam_params(self) -> ModelParams | None:
        """Where the segmenter is, and on the grounder's device; None if it is no model."""
        name = self.params.segmenter
        if name is None or not (name.is_hub or name.is_path):
            return None
        where = self.params.model_dump(include=set(ModelParams.model_fields) - set(ModelName.model_fields))
        return ModelParams(**name.model_dump(), **where)

    @cached_property
    def _segment(self) -> Segment | None:
        if (params := self._sam_params) is not None:
            return Sam(params).segment_boxes
        if self.params.segmenter is None:
            return None
        grabcut = GrabCut()
        return lambda pixels, boxes: [grabcut.segment(pixels, box) for box in boxes]

    @property
    def _segmenter_provenance(self) -> dict[str, str]:
        if (params := self._sam_params) is not None:
            return Checkpoint(params).provenance
        return {"model": GrabCut.name, "revision": GrabCut.version} if self.params.segmenter else {}


def _unlocated(record: ImageRecord) -> dict[int, str]:
    """Number and name of the source's subjects of which only is said that they are in the photograph."""
    whole = (0.0, 0.0, float(record.width), float(record.height))
    return {
        i: (entity.label or entity.phrase).lower()
        for i, entity in enumerate(record.entities)
        if entity.subject_id and not entity.mask and entity.box == whole
    }


def _located(made: dict[str, Any]) -> dict[str, Any]:
    """What changes in an entity."""
    mask = {"mask": made["mask"]} if made["mask"] else {}
    return mask | ({"box": tuple(made["box"])} if made["box"] else {})


def _clipped(found: Iterable[Found], shape: tuple[int, ...]) -> list[Found]:
    """Boxes inside the image, to a hundredth of a pixel; those with no area are no boxes."""
    limits = np.array([shape[1], shape[0]] * 2)
    boxes = [(one, np.clip(one.box, 0, limits).round(2).tolist()) for one in found]
    return [Found(one.phrase, (x0, y0, x1, y1), one.score) for one, (x0, y0, x1, y1) in boxes if x0 < x1 and y0 < y1]


def _plain(one: Found) -> dict[str, Any]:
    return {"phrase": one.phrase, "label": head_noun(one.phrase), "box": list(one.box), "score": rounded(one.score)}


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, wide) * max(0.0, high)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)
