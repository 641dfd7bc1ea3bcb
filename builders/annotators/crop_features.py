"""crop_features: what each entity looks like, as a vector, for finding the same subject in other photographs."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
from pydantic import BaseModel, Field

from builders.annotators.annotator import Annotator, Artefact
from builders.annotators.phrases import head_noun
from builders.base import SourceImage
from filters.scorers.base import ScorerInput
from filters.scorers.features import Features, FeaturesParams
from filters.scorers.phash import gray_thumbnail, phash
from schemas.codec import encode_png
from schemas.masks import decode_mask
from schemas.records import Captions, Entity, Op

MEMBER = "features.npy"
_NEUTRAL = (124, 116, 104)  # ImageNet's mean colour: nothing, to a network that was trained on it
_CONTEXT = 8 / 7  # networks look at the middle 224 of 256 pixels, and nothing of the thing is to be cut off
_MAX_SIDE = 448  # networks see no more


class CropFeaturesParams(FeaturesParams):
    """Parameters of the `crop_features` annotator; the models are those of the `features` scorer."""

    crop: Literal["box", "mask"] = Field(
        default="box", description="box: as it stands; mask: cut out on a neutral background, where there is a mask"
    )
    min_side: int = Field(default=32, ge=8, description="entities with a box of fewer pixels are left out")


class CropFeatures(Annotator):
    """Data: `entities`, for each embedded one its number in the record, `noun`, `subject_id`, `box`, `masked`, and
    the perceptual hashes `phash` and `phash_mirror` (hexadecimal) of its crop; and those hashes of the photograph.

    The member `features.npy` is float16 [entities, d], rows of length 1; it is not there if there are none.
    """

    name: ClassVar[str] = "crop_features"
    version: ClassVar[str] = "1"
    Params: ClassVar[type[BaseModel]] = CropFeaturesParams
    needs: ClassVar[tuple[str, ...]] = ("entities", "garments")
    params: CropFeaturesParams

    @property
    def batch_size(self) -> int:
        return self.params.batch_size

    @property
    def num_gpus(self) -> float:
        return self.params.num_gpus

    def op(self) -> Op:
        left_out = {"model", "revision", "batch_size", *self.params.resources}
        params = self.params.model_dump(mode="json", exclude=left_out)
        return Op.of(f"annotate:{self.name}", self.version, **params).model_copy(update=self._encoder.provenance)

    def preflight(self) -> None:
        self._encoder.preflight()

    def annotate(self, images: Sequence[SourceImage]) -> list[Artefact]:
        found = [self._crops(image) for image in images]
        crops = [ScorerInput("", encode_png(pixels), Captions()) for one in found for _, pixels in one]
        vectors = iter(row["features_embedding"] for row in (self._encoder.score(crops) if crops else ()))
        return [
            _artefact(image, [about for about, _ in one], [next(vectors) for _ in one])
            for image, one in zip(images, found, strict=True)
        ]

    def _crops(self, image: SourceImage) -> list[tuple[dict[str, Any], np.ndarray]]:
        """Each entity that is large enough: what is known of it, and its picture."""
        crops = []
        for number, entity in enumerate(image.record.entities):
            x0, y0, x1, y1 = entity.box
            if min(x1 - x0, y1 - y0) >= self.params.min_side:
                masked = self.params.crop == "mask" and bool(entity.mask)
                pixels = square_crop(image.pixels, entity, masked)
                crops.append((_description(number, entity, masked, pixels), pixels))
        return crops

    @cached_property
    def _encoder(self) -> Features:
        return Features(self.params)


def square_crop(pixels: np.ndarray, entity: Entity, masked: bool) -> np.ndarray:
    """A square picture of an entity with some room around it, at most 448 px.

    Args:
        pixels: uint8 RGB [H, W, 3] photograph.
        entity: of it.
        masked: everything but the entity is neutral; else only what lies outside of the photograph.

    Returns:
        uint8 RGB [side, side, 3].
    """
    x0, y0, x1, y1 = (round(side) for side in entity.box)
    side = math.ceil(_CONTEXT * max(x1 - x0, y1 - y0))
    left, top = (x0 + x1 - side) // 2, (y0 + y1 - side) // 2
    height, width = pixels.shape[:2]
    inside = slice(max(0, top), min(height, top + side)), slice(max(0, left), min(width, left + side))
    mask = decode_mask(entity.mask, height, width)[inside] if masked else np.True_
    canvas = np.full((side, side, 3), _NEUTRAL, np.uint8)
    window = canvas[inside[0].start - top : inside[0].stop - top, inside[1].start - left : inside[1].stop - left]
    np.copyto(window, pixels[inside], where=np.asarray(mask)[..., None])
    if side <= _MAX_SIDE:
        return canvas
    return cv2.resize(canvas, (_MAX_SIDE, _MAX_SIDE), interpolation=cv2.INTER_AREA)


def read_features(artefact: Artefact) -> np.ndarray:
    """float16 [entities, d], a row of length 1 for each entry of `data["entities"]`; [0, 0] if there are none."""
    data = artefact.members.get(MEMBER)
    return np.load(io.BytesIO(data), allow_pickle=False) if data else np.zeros((0, 0), np.float16)


def _artefact(image: SourceImage, entities: list[dict[str, Any]], vectors: Sequence[np.ndarray]) -> Artefact:
    file = io.BytesIO()
    if entities:
        np.save(file, np.stack(vectors), allow_pickle=False)
    return Artefact({"entities": entities, **_hashes(image.pixels)}, {MEMBER: file.getvalue()} if entities else {})


def _description(number: int, entity: Entity, masked: bool, crop: np.ndarray) -> dict[str, Any]:
    about = {"entity": number, "noun": head_noun((entity.label or entity.phrase).lower())}
    known = {"subject_id": entity.subject_id, "box": [round(side, 2) for side in entity.box], "masked": masked}
    return about | known | _hashes(crop)


def _hashes(pixels: np.ndarray) -> dict[str, str]:
    thumbnail = gray_thumbnail(pixels)
    return {"phash": f"{phash(thumbnail):016x}", "phash_mirror": f"{phash(thumbnail[:, ::-1]):016x}"}
