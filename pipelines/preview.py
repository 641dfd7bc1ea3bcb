"""Contact sheets: random samples of every subtask as a person reads them.

Inputs | output | edit mask | loss weight | instruction. The weight is the one that the mask implies for training.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageDraw, ImageFont

from pipelines.corpus import find_shards, iter_index, read_members
from pipelines.storage import Folder
from schemas.identity import generator

_CELL = 256
_GAP = 12
_TEXT, _COLUMNS_OF_TEXT = 440, 56
_LINE, _MAX_LINES = 20, 24
_INK, _PALE, _PAPER, _MASK, _HEAT = (20, 20, 20), (120, 120, 120), (255, 255, 255), (255, 0, 90), (255, 200, 0)
_COLUMNS = (
    *("key", "shard", "offset", "size", "members"),
    *("subtask", "instruction", "input_roles", "edit_source_index", "split"),
)
_LATENT = 8  # pixels per latent cell, of SDXL's VAE


def preview(corpus: Folder, out: Path, per_subtask: int = 8, seed: int = 0) -> list[Path]:
    """Write one PNG per stream and subtask, `<stream>-<subtask>.png`; returns their paths in order."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for (stream, subtask), sheet in contact_sheets(corpus, per_subtask, seed).items():
        paths.append(out / f"{stream}-{subtask}.png")
        sheet.save(paths[-1])
    return paths


def contact_sheets(corpus: Folder, per_subtask: int = 8, seed: int = 0) -> dict[tuple[str, str], Image.Image]:
    """The same sheets as images, by stream and subtask, for notebooks."""
    sheets = {}
    for stream in sorted({shard.stream for shard in find_shards(corpus)}):
        for subtask, rows in sorted(draw_rows(corpus, stream, per_subtask, seed, _COLUMNS).items()):
            strips = [sample_strip(row, read_members(corpus, row)) for row in rows]
            sheets[stream, subtask] = stack(strips, f"{stream} / {subtask}")
    return sheets


def sample_strip(row: Mapping[str, Any], members: Mapping[str, bytes]) -> Image.Image:
    """One sample as a strip: its images, each with its role and size, then the instruction and the key.

    Args:
        row: an index row with `key, instruction, input_roles, edit_source_index, split`.
        members: see `pipelines.corpus.read_members`.
    """
    images = {n: Image.open(io.BytesIO(data)).convert("RGB") for n, data in members.items() if n[-3:] in ("jpg", "png")}
    inputs = [image for name, image in images.items() if name.startswith("input_")]
    output = next(image for name, image in images.items() if name.startswith("output."))
    roles = (f"[{i}] {role}" for i, role in enumerate(row["input_roles"], start=1))
    images_by_label = [*zip(roles, inputs, strict=True), ("output", output)]
    if "edit_mask.png" in images:
        mask = images["edit_mask.png"].convert("L")
        images_by_label.append(("edit mask", _overlay(output, mask)))
        if row["edit_source_index"] >= 0:
            images_by_label.append(_loss_weight(output, mask))
    cells = [(label, image.size, _fit(image)) for label, image in images_by_label]
    text = _wrap(row["instruction"])
    height = max(*(image.height for _, _, image in cells), (len(text) + 2) * _LINE)
    left = len(cells) * (_CELL + _GAP)
    strip = Image.new("RGB", (left + _TEXT, _LINE + height), _PAPER)
    draw = ImageDraw.Draw(strip)
    for i, (label, (w, h), image) in enumerate(cells):
        draw.text((i * (_CELL + _GAP), 0), f"{label}  {w} x {h}", _PALE, _font(13))
        strip.paste(image, (i * (_CELL + _GAP), _LINE))
    for i, line in enumerate(text, start=1):
        draw.text((left, i * _LINE), line, _INK, _font(15))
    draw.text((left, (len(text) + 2) * _LINE), f"{row['key']}  ({row['split']})", _PALE, _font(13))
    return strip


def draw_rows(
    corpus: Folder, stream: str, per_subtask: int, seed: int, columns: Sequence[str] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Up to `per_subtask` index rows of each subtask of a stream, uniformly: those with the smallest random numbers.

    Args:
        corpus: a published corpus.
        stream: which one.
        per_subtask: at most so many.
        seed: equal seeds draw equal samples.
        columns: of the index, with `subtask`; None for all.
    """
    rng = generator(seed, stream, "preview")
    drawn: dict[str, pa.Table] = {}
    for table in iter_index(corpus, [stream], columns):
        numbered = table.append_column("draw", pa.array(rng.random(len(table))))
        for subtask in pc.unique(table["subtask"]).to_pylist():
            rows = numbered.filter(pc.equal(numbered["subtask"], subtask))
            pool = pa.concat_tables([drawn[subtask], rows]) if subtask in drawn else rows
            drawn[subtask] = pool.sort_by("draw").slice(0, per_subtask)
    return {subtask: rows.to_pylist() for subtask, rows in drawn.items()}


def stack(strips: Sequence[Image.Image], title: str) -> Image.Image:
    """Strips below each other, below their title."""
    width = max(strip.width for strip in strips) + 2 * _GAP
    top = 3 * _GAP + _LINE
    sheet = Image.new("RGB", (width, top + sum(strip.height + _GAP for strip in strips)), _PAPER)
    ImageDraw.Draw(sheet).text((_GAP, _GAP), title, _INK, _font(_LINE))
    y = top
    for strip in strips:
        sheet.paste(strip, (_GAP, y))
        y += strip.height + _GAP
    return sheet


def _fit(image: Image.Image) -> Image.Image:
    scale = _CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)


def _overlay(output: Image.Image, mask: Image.Image) -> Image.Image:
    """The output in grey, with the area that may change tinted."""
    grey = output.convert("L").convert("RGB")
    return Image.composite(Image.blend(grey, Image.new("RGB", grey.size, _MASK), 0.5), grey, mask)


def loss_weights(mask: Image.Image) -> np.ndarray:
    """The loss weight that an edit mask implies for each latent cell, float32 [height // 8, width // 8]."""
    import torch

    from fine_tune.flow import EditWeighting

    width, height = (side // _LATENT for side in mask.size)
    edited = torch.from_numpy(np.asarray(mask) > 0)[: height * _LATENT, : width * _LATENT]
    latents = torch.zeros(1, height, width)
    weights = EditWeighting(mode="mask").weights(latents, [latents], 0, edited)
    assert weights is not None
    return weights[0].numpy()


def heat(weights: np.ndarray) -> np.ndarray:
    """Loss weights on a logarithmic scale from 1 to the largest that there is, uint8 in 0..255."""
    from fine_tune.flow import EditWeighting

    return (np.log(np.maximum(weights, 1)) / math.log(EditWeighting().high) * 255).round().astype(np.uint8)


def _loss_weight(output: Image.Image, mask: Image.Image) -> tuple[str, Image.Image]:
    """The loss weights over the grey output, and a label with the largest of them."""
    weights = loss_weights(mask)
    size = (weights.shape[1] * _LATENT, weights.shape[0] * _LATENT)
    grey = output.convert("L").convert("RGB").crop((0, 0, *size))
    strength = Image.fromarray(heat(weights)).resize(size, Image.Resampling.NEAREST)
    shown = Image.composite(Image.new("RGB", size, _HEAT), grey, strength)
    return f"loss weight to {weights.max():.0f}", shown


def _wrap(instruction: str) -> list[str]:
    """Lines of the instruction with short placeholders; a very long one is cut."""
    shown = re.sub(r"<img><\|image_(\d+)\|></img>", r"[\1]", instruction)
    lines = [line for part in shown.splitlines() for line in textwrap.wrap(part, _COLUMNS_OF_TEXT) or [""]]
    return lines if len(lines) <= _MAX_LINES else [*lines[: _MAX_LINES - 1], f"{lines[_MAX_LINES - 1]} …"]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
