"""A small real corpus on disk, written sample by sample through `schemas.shards`, without the engine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from skimage import data as photographs
from sklearn.datasets import load_sample_images

from builders.base import Sample, draft
from pipelines.corpus import Shard, iter_index, read_members
from pipelines.publish import publish
from pipelines.storage import Folder
from schemas.arrow import SAMPLES
from schemas.codec import decode_raw, encode_jpeg, encode_mask, encode_png
from schemas.identity import uid_of
from schemas.instructions import placeholder
from schemas.records import Alignment, Captions, ImageRecord, Op, Split
from schemas.shards import BLOCK, END_OF_ARCHIVE, encode_sample, padded
from schemas.vocabulary import STREAMS

NAME = "six-photographs"
RECIPE = "name: six-photographs\nseed: 7\n"
VERSIONS = {"x2i": "0.1.0", "opencv": cv2.__version__}
STREAM_NAMES = ("control", "edit", "few_shot_1", "perceive", "subject_2", "text_to_image")
_SPLITS: tuple[Split, ...] = ("train", "train", "train", "train", "val", "test")


@cache
def photos() -> dict[str, np.ndarray]:
    """Six photographs by caption, uint8 RGB [H, W, 3], the longer side 192 px."""
    china, flower = load_sample_images().images
    named = {
        "an astronaut in an orange suit": photographs.astronaut(),
        "a tabby cat": photographs.chelsea(),
        "a cup of coffee on a wooden table": photographs.coffee(),
        "a rocket on its launch pad at night": photographs.rocket(),
        "a Chinese temple": china,
        "a dahlia in bloom": flower,
    }
    return {caption: _fit(pixels, 192) for caption, pixels in named.items()}


def make_corpus(root: Path, streams: Sequence[str] = STREAM_NAMES, per_shard: int = 4) -> Folder:
    """A published corpus of the six photographs, six samples per stream, in shards of at most `per_shard`."""
    corpus = Folder(str(root))
    for stream in streams:
        write_stream(corpus, stream, list(make_samples(stream)), per_shard)
    publish(corpus, NAME, RECIPE, VERSIONS)
    return corpus


def write_stream(corpus: Folder, stream: str, samples: Sequence[Sample], per_shard: int) -> None:
    """What the pack stage leaves for one stream: tars and their sample index."""
    for number, start in enumerate(range(0, len(samples), per_shard)):
        write_shard(corpus, Shard(stream, number), samples[start : start + per_shard])


def write_shard(corpus: Folder, shard: Shard, samples: Iterable[Sample]) -> None:
    tar, rows = bytearray(), []
    for index, sample in enumerate(samples):
        data = encode_sample(sample.record.key, sample.members, STREAMS[shard.stream])
        rows.append(_index_row(sample, shard, index, len(tar), len(data)))
        tar += data
    corpus.write_bytes(shard.tar, bytes(tar) + END_OF_ARCHIVE)
    corpus.write_table(shard.sample_index, pa.Table.from_pylist(rows, SAMPLES))


def _index_row(sample: Sample, shard: Shard, index: int, offset: int, size: int) -> dict[str, Any]:
    members, position = [], offset
    for name in STREAMS[shard.stream].members:
        data = sample.members[name]
        height, width = decode_raw(data).shape[:2] if name in sample.images else (-1, -1)
        place = {"name": name, "offset": position + BLOCK, "size": len(data), "width": width, "height": height}
        members.append(place)
        position += BLOCK + padded(len(data))
    place = {"shard": shard.tar, "index": index, "offset": offset, "size": size, "members": members}
    return {**sample.record.model_dump(mode="json"), **place}


def make_samples(stream: str) -> Iterator[Sample]:
    """One sample per photograph, in the order of `photos`; the last two are of the splits `val` and `test`."""
    maker = {
        "text_to_image": _text_to_image,
        "edit": _edit,
        "control": _control,
        "perceive": _perceive,
        "subject_2": _subject,
        "few_shot_1": _few_shot,
    }[stream]
    for i, caption in enumerate(photos()):
        yield maker(_record(i, caption), photos()[caption])


def _record(i: int, caption: str) -> ImageRecord:
    pixels = photos()[caption]
    return ImageRecord(
        uid=uid_of(pixels.tobytes()),
        width=pixels.shape[1],
        height=pixels.shape[0],
        captions=Captions(short=caption),
        scene_id=f"scene-{i}",
        license="CC0-1.0" if i % 2 else "CC-BY-4.0",
        split=_SPLITS[i],
    )


def _text_to_image(image: ImageRecord, pixels: np.ndarray) -> Sample:
    op = Op.of("text_to_image", "1")
    record = draft(image, "text_to_image", "caption", op, instruction=f"A photograph of {image.captions.short}.")
    return Sample(record, {"output.jpg": encode_jpeg(pixels)})


def _edit(image: ImageRecord, pixels: np.ndarray) -> Sample:
    """A blue-tinted ellipse in the middle; instructions in few enough words to have no variants for the first ones."""
    height, width = pixels.shape[:2]
    mask = cv2.ellipse(np.zeros((height, width), np.uint8), ((width / 2, height / 2), (80, 60), 0), 1, -1).astype(bool)
    edited = pixels.copy()
    edited[mask] = edited[mask] // 2 + np.array([0, 0, 127], np.uint8)
    said = f"{placeholder(1)} Tint the middle of the picture blue."
    record = draft(
        image,
        "edit",
        "recolor",
        Op.of("tint", "1", color=[0, 0, 255]),
        instruction=said,
        instruction_variants=(f"Make the centre of {placeholder(1)} blue.",) if image.split != "train" else (),
        input_roles=("source",),
        real_output=False,
        edit_source_index=0,
        edit_area_ratio=float(mask.mean()),
        aligned=True,
        align=Alignment(psnr_outside=60.0, shift_px=0.0),
        severity=0.25 if image.split == "train" else 0.75,
        scores=json.dumps({"clip": 0.5}),
    )
    images = {"input_1.jpg": encode_jpeg(pixels), "output.jpg": encode_jpeg(edited), "edit_mask.png": encode_mask(mask)}
    return Sample(record, images)


def _control(image: ImageRecord, pixels: np.ndarray) -> Sample:
    edges = cv2.Canny(pixels, 100, 200)
    said = f"Following the edges in {placeholder(1)}, draw {image.captions.short}."
    op = Op.of("canny", "1", low=100, high=200)
    record = draft(image, "control", "canny", op, instruction=said, input_roles=("canny",), real_input=False)
    return Sample(record, {"input_1.png": encode_png(edges), "output.jpg": encode_jpeg(pixels)})


def _perceive(image: ImageRecord, pixels: np.ndarray) -> Sample:
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    record = draft(
        image,
        "perceive",
        "luminance",
        Op.of("luminance", "1"),
        instruction=f"Show how bright each part of {placeholder(1)} is.",
        input_roles=("photo",),
        output_kind="map",
        real_output=False,
        direction="inverse",
    )
    return Sample(record, {"input_1.jpg": encode_jpeg(pixels), "output.png": encode_png(grey)})


def _subject(image: ImageRecord, pixels: np.ndarray) -> Sample:
    height, width = pixels.shape[:2]
    left, right = pixels[: height // 2, : width // 2], pixels[height // 2 :, width // 2 :]
    said = f"The upper left looks like {placeholder(1)}, the lower right like {placeholder(2)}."
    record = draft(image, "subject_2", "reference", Op.of("crop", "1"), instruction=said, input_roles=("crop", "crop"))
    crops = {"input_1.jpg": encode_jpeg(left), "input_2.jpg": encode_jpeg(right)}
    return Sample(record, {**crops, "output.jpg": encode_jpeg(pixels)})


def _few_shot(image: ImageRecord, pixels: np.ndarray) -> Sample:
    """The example pair is the mirrored photograph, so that no other image decides the split."""
    mirrored = np.ascontiguousarray(pixels[:, ::-1])
    said = f"{placeholder(1)} becomes {placeholder(2)}. Do the same with {placeholder(3)}."
    record = draft(
        image,
        "few_shot_1",
        "invert",
        Op.of("invert", "1"),
        instruction=said,
        input_roles=("example_input", "example_output", "query"),
        real_output=False,
    )
    pngs = [encode_png(p) for p in (mirrored, 255 - mirrored, pixels, 255 - pixels)]
    return Sample(record, dict(zip(("input_1.png", "input_2.png", "input_3.png", "output.png"), pngs, strict=True)))


def _fit(pixels: np.ndarray, side: int) -> np.ndarray:
    scale = side / max(pixels.shape[:2])
    size = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def samples(corpus: Folder) -> dict[str, tuple[list[str], dict[str, bytes]]]:
    """Parents and members by key."""
    rows = [row for table in iter_index(corpus) for row in table.to_pylist()]
    return {row["key"]: (row["parents"], read_members(corpus, row)) for row in rows}


def where(corpus: Folder, needles: list[bytes]) -> list[set[str]]:
    """For each needle the files that hold it, as bytes or in a table."""
    found: list[set[str]] = [set() for _ in needles]
    for name in corpus.list():
        data = corpus.read_bytes(name)
        if name.endswith(".parquet"):
            data += repr(corpus.read_table(name).to_pylist()).encode()
        for files, needle in zip(found, needles, strict=True):
            if needle in data:
                files.add(name)
    return found
