"""CLIP by open_clip: how well image and caption agree, the image's embedding, and LAION's aesthetic score of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from filters.models import Checkpoint, ModelMissing, load_tensors, rounded
from filters.openclip import ClipModel, ClipModelParams, ClipSource
from filters.scorers.base import Scorer, ScorerInput, ScorerParams
from schemas.models import ModelName
from schemas.records import Captions

if TYPE_CHECKING:
    import torch

_HEAD = ("*.safetensors", "*.pth")


class ClipParams(ClipModelParams, ScorerParams):
    """Parameters of the `clip` scorer."""

    aesthetic: ModelName | None = Field(
        default=None, description="LAION's aesthetic head (sac+logos+ava1-l14-linearMSE), made for OpenAI's ViT-L/14"
    )


class Clip(Scorer):
    """Columns:

    * `clip_score`: cosine, -1..1, of image and caption; null without caption. The caption is the most complete one
      that the model can read; if none fits, the most complete one is cut off, which open_clip does without a word.
    * `clip_tokens`: length of that caption in tokens before any cut; null without caption.
    * `clip_embedding`: float16, length 1.
    * `aesthetic`: about 1..10; only with an aesthetic head.
    """

    name = "clip"
    version = "1"
    Params = ClipParams
    params: ClipParams

    @property
    def columns(self) -> dict[str, pa.DataType]:
        columns = {"clip_score": pa.float32(), "clip_tokens": pa.int32(), "clip_embedding": pa.list_(pa.float16())}
        return columns | ({"aesthetic": pa.float32()} if self.params.aesthetic else {})

    @property
    def batch_size(self) -> int:
        return self.params.batch_size

    @property
    def provenance(self) -> dict[str, str]:
        head = self._head.provenance if self._head else {}
        return self._source.provenance | {f"aesthetic_{key}": value for key, value in head.items()}

    def preflight(self) -> None:
        self._source.check()
        if self._head:
            self._head.check(_HEAD)

    def score(self, items: Sequence[ScorerInput]) -> list[dict[str, Any]]:
        images = self._model.images(items)
        texts = [_readable_caption(item.captions, self._model) for item in items]
        given = [text for text in texts if text]
        embedded = iter(self._model.texts(given) if given else ())
        rows: list[dict[str, Any]] = []
        for image, text in zip(images, texts, strict=True):
            score, tokens = (rounded(image @ next(embedded)), self._model.tokens(text)) if text else (None, None)
            rows.append({"clip_score": score, "clip_tokens": tokens, "clip_embedding": image.astype(np.float16)})
        if self.params.aesthetic:
            weight, bias = self._aesthetic
            for row, value in zip(rows, images @ weight + bias, strict=True):
                row["aesthetic"] = rounded(value)
        return rows

    @property
    def _source(self) -> ClipSource:
        return ClipSource(self.params)

    @cached_property
    def _model(self) -> ClipModel:
        return self._source.load()

    @property
    def _head(self) -> Checkpoint | None:
        return Checkpoint(self.params.aesthetic, "aesthetic.model") if self.params.aesthetic else None

    @cached_property
    def _aesthetic(self) -> tuple[np.ndarray, float]:
        """Weight float32 [d] and bias of the head."""
        assert self._head is not None
        weight, bias = collapse_head(load_tensors(self._head.file(*_HEAD), "aesthetic.model"))
        width = int(self._source.config["embed_dim"])
        if len(weight) != width:
            raise self._head.missing(
                f"the head reads {len(weight)} values and the embedding of {self.params.model!r} has {width}; "
                f"it belongs to the CLIP that it was trained on (OpenAI's ViT-L/14 for LAION's)"
            )
        return weight, bias


def collapse_head(tensors: Mapping[str, torch.Tensor]) -> tuple[np.ndarray, float]:
    """The one affine map that a stack of linear layers without activations amounts to.

    LAION's improved-aesthetic-predictor is 768 -> 1024 -> 128 -> 64 -> 16 -> 1 with nothing but dropout in between, on
    the embedding of length 1.

    Args:
        tensors: `<layer>.weight` [out, in] and `<layer>.bias` [out]; layers count up in their names.

    Returns:
        weight float32 [in] and bias.

    Raises:
        ModelMissing: the tensors are no such stack.
    """
    layers = sorted((name.removesuffix(".weight") for name in tensors if name.endswith(".weight")), key=_layer_number)
    try:
        weight = np.eye(tensors[f"{layers[0]}.weight"].shape[1])
        bias = np.zeros(len(weight))
        for layer in layers:
            matrix = tensors[f"{layer}.weight"].double().numpy()
            weight, bias = matrix @ weight, matrix @ bias + tensors[f"{layer}.bias"].double().numpy()
        if len(weight) != 1:
            raise ValueError(f"the last layer gives {len(weight)} values")
    except (KeyError, IndexError, ValueError) as error:
        raise ModelMissing("aesthetic.model", f"no stack of linear layers that ends in one value: {error}") from error
    return weight[0].astype(np.float32), float(bias[0])


def _layer_number(name: str) -> int:
    last = name.rpartition(".")[2]
    return int(last) if last.isdigit() else -1


def _readable_caption(captions: Captions, model: ClipModel) -> str:
    """The most complete caption that fits into the context, else the most complete one."""
    given = [text for text in (captions.long, captions.short, captions.alt) if text]
    return next((text for text in given if model.tokens(text) <= model.context), captions.best())
