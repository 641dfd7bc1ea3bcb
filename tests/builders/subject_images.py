"""Images with entities, as builders see them: the demo's photographs, small, and discs on a photograph of gravel."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache

import cv2
import numpy as np
import skimage.data
from PIL import Image

from builders.base import SourceImage
from builders.subject_crops.acceptance import box_of
from recipes.demo.collect_photos import read_photos, read_verified
from schemas.codec import encode_jpeg
from schemas.identity import uid_of
from schemas.masks import decode_mask, encode_rle
from schemas.records import Captions, Entity, ImageRecord, Pair

SIDE = 384


@cache
def demo_image(name: str) -> SourceImage:
    """One photograph, its longer side at most `SIDE` pixels; a photograph is called by its file name."""
    photo = next(photo for photo in read_photos() if photo["image"] == name)
    image = Image.open(io.BytesIO(read_verified(photo["package"], photo["file"], photo["sha256"])))
    full = image.size
    image.draft("RGB", (SIDE, SIDE))
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    scale = np.array([image.width / full[0], image.height / full[1]] * 2)
    entities = []
    for entity in photo.get("entities", []):
        box = (np.array(entity["box"]) * scale).tolist()
        mask = encode_rle(decode_mask(entity["mask"], image.height, image.width)) if "mask" in entity else {}
        entities.append(Entity(**{**entity, "box": box, "mask": mask}))
    jpeg = encode_jpeg(np.asarray(image))
    record = ImageRecord(
        uid=uid_of(jpeg),
        width=image.width,
        height=image.height,
        captions=Captions(short=photo["caption_short"], long=photo["caption"]),
        entities=tuple(entities),
        scene_id=photo["scene_id"],
        license=photo["license"],
        author=photo.get("author", ""),
    )
    return SourceImage(record, jpeg)


def demo_images(names: Sequence[str] = ()) -> list[SourceImage]:
    """Photographs by name, or all that have entities."""
    return [demo_image(p["image"]) for p in read_photos() if (p["image"] in names or not names) and p.get("entities")]


def number_of(image: SourceImage, label: str) -> int:
    """The first entity of that label."""
    return [entity.label for entity in image.record.entities].index(label)


def paired(target: SourceImage, other: SourceImage, label: str) -> SourceImage:
    """`target`, said to show the same thing as `other`."""
    pair = Pair(
        entity=number_of(target, label),
        other=other.record.uid,
        other_entity=number_of(other, label),
        similarity=0.8,
        evidence="features",
    )
    record = target.record.model_copy(update={"pairs": (pair,)})
    return SourceImage(record, target.jpeg, others={other.record.uid: other})


def picture(*entities: Entity, size: tuple[int, int] = (200, 200), license: str = "CC0-1.0") -> SourceImage:
    """A photograph of gravel with a disc of another photograph where each entity's mask is."""
    pixels = np.repeat(skimage.data.gravel()[: size[0], : size[1], None], 3, axis=2)
    for entity in entities:
        if entity.mask:
            mask = decode_mask(entity.mask, *size)
            pixels[mask] = skimage.data.coffee()[: size[0], : size[1]][mask] // 2 + np.array([120, 0, 0], np.uint8)
    jpeg = encode_jpeg(pixels)
    return SourceImage(
        ImageRecord(uid=uid_of(jpeg), width=size[1], height=size[0], entities=entities, license=license), jpeg
    )


def disc(x: int, y: int, radius: int, size: tuple[int, int] = (200, 200)) -> np.ndarray:
    return cv2.circle(np.zeros(size, np.uint8), (x, y), radius, 1, -1).astype(bool)


def entity(mask: np.ndarray, phrase: str = "the red ball", label: str = "ball", **fields: object) -> Entity:
    box = tuple(map(float, box_of(mask)))
    return Entity(**{"phrase": phrase, "label": label, "box": box, "mask": encode_rle(mask), **fields})
