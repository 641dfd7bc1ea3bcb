"""Random samples as cards: small pictures, overlays, and the record."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipelines.corpus import find_shards, read_members
from pipelines.preview import draw_rows, heat, loss_weights
from pipelines.storage import Folder
from schemas.records import UNKNOWN

SIDE = 384  # px, of the longest side of a picture in the page
_QUALITY = 70
_MASK, _HEAT = (255, 45, 85), (255, 196, 0)
_OPACITY = 0.55
_PLACE = ("shard", "index", "offset", "size", "members", "draw")  # what an index row has beside the record
_JSON = ("entities", "references", "group", "scores")  # fields that hold JSON text


@dataclass(frozen=True)
class Picture:
    """A picture in the page. `id` is its key among `Gallery.pictures`; width and height are those of the member."""

    id: str
    label: str
    alt: str
    width: int
    height: int


@dataclass(frozen=True)
class Card:
    """One sample.

    Attributes:
        record: the sample's record, as in its JSON member.
        inputs: in order.
        output: the target.
        mask: id of the edit mask as an overlay of the output; "" if the stream has none.
        weights: the same of the loss weight that the mask implies; "" if the loss is not weighted.
        top_weight: the largest of them.
        numbers: what is known of severity, edited area, alignment and scores; what cards can be filtered by.
    """

    record: dict[str, Any]
    inputs: tuple[Picture, ...]
    output: Picture
    mask: str
    weights: str
    top_weight: float
    numbers: dict[str, float]

    @property
    def json(self) -> str:
        """The record for reading; what its members hold as JSON text is unfolded."""
        unfolded = {name: json.loads(value) if name in _JSON else value for name, value in self.record.items()}
        unfolded["ops"] = [{**op, "params": json.loads(op["params"])} for op in self.record["ops"]]
        return json.dumps(unfolded, indent=1, ensure_ascii=False)


class Gallery:
    """Cards of up to `per_subtask` random samples of every subtask, and the pictures they show, each held once."""

    def __init__(self, corpus: Folder, per_subtask: int, seed: int) -> None:
        self.corpus = corpus
        self.pictures: dict[str, str] = {}  # id -> data URI
        self.cards: list[Card] = []
        for stream in sorted({shard.stream for shard in find_shards(corpus)}):
            for _, rows in sorted(draw_rows(corpus, stream, per_subtask, seed).items()):
                self.cards += [self._card(row) for row in rows]

    def _card(self, row: Mapping[str, Any]) -> Card:
        members = read_members(self.corpus, row)
        record = {name: value for name, value in row.items() if name not in _PLACE}
        labels = [f"{i} · {role}" for i, role in enumerate(row["input_roles"], 1)]
        names = sorted(name for name in members if name.startswith("input_"))
        inputs = [self._picture(label, members[name]) for label, name in zip(labels, names, strict=True)]
        output = next(data for name, data in members.items() if name.startswith("output."))
        mask = members.get("edit_mask.png")
        weights, top = self._weights(mask) if mask and row["edit_source_index"] >= 0 else ("", 0.0)
        return Card(
            record,
            tuple(inputs),
            self._picture("output", output),
            self._mask(mask) if mask else "",
            weights,
            top,
            _numbers(row),
        )

    def _picture(self, label: str, data: bytes) -> Picture:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            key = _key(data)
            if key not in self.pictures:
                small = image.convert("RGB")
                small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
                self.pictures[key] = _uri(small, quality=_QUALITY, method=4)
        return Picture(key, label, f"{label.replace(' · ', ', ')}, {width} × {height} pixels", width, height)

    def _mask(self, data: bytes) -> str:
        mask = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
        return self._overlay("mask", data, mask, _MASK)

    def _weights(self, data: bytes) -> tuple[str, float]:
        mask = Image.open(io.BytesIO(data)).convert("L")
        weights = loss_weights(mask)
        cells = np.kron(heat(weights), np.ones((8, 8), np.uint8))
        right, below = (a - b for a, b in zip(mask.size, cells.shape[::-1], strict=True))  # cells that are not whole
        shown = np.pad(cells, ((0, below), (0, right)))
        return self._overlay("weights", data, shown, _HEAT), float(weights.max())

    def _overlay(self, kind: str, data: bytes, strength: np.ndarray, colour: tuple[int, int, int]) -> str:
        """A picture of one colour whose opacity is `strength`, uint8 [H, W]."""
        key = _key(kind.encode() + data)
        if key not in self.pictures:
            alpha = Image.fromarray((strength * _OPACITY).astype(np.uint8))
            alpha.thumbnail((SIDE, SIDE), Image.Resampling.NEAREST)
            overlay = Image.new("RGB", alpha.size, colour)
            overlay.putalpha(alpha)
            self.pictures[key] = _uri(overlay, lossless=True, method=4, exact=True)
        return key


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    known = {
        "severity": row["severity"],
        "edit area": row["edit_area_ratio"],
        "PSNR outside the mask": row["align"]["psnr_outside"],
        "change inside the mask": row["change"]["l1_inside"],
    }
    scores = {n: v for n, v in json.loads(row["scores"]).items() if isinstance(v, int | float)}
    return {name: value for name, value in {**known, **scores}.items() if value != UNKNOWN}


def _key(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _uri(image: Image.Image, **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, "WEBP", **options)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
