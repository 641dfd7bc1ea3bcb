"""What an image looks like, as a vector: for semantic deduplication and for matching subjects."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import cv2
import numpy as np
import pyarrow as pa
from pydantic import Field

from filters.models import (
    CONFIG,
    PREPROCESSOR,
    WEIGHTS,
    Checkpoint,
    decode_batch,
    inference,
    load_pretrained,
    load_processor,
    placed,
    unit_rows,
)
from filters.packaged import EFFICIENTNET_LITE0, IMAGENET_MEAN, IMAGENET_STD, EfficientNetLite0
from filters.scorers.base import Scorer, ScorerInput, ScorerParams
from schemas.models import ModelParams

if TYPE_CHECKING:
    import torch

Encoder = Callable[[Sequence[ScorerInput]], np.ndarray]
_TORCHSCRIPT = (".pt", ".pth", ".torchscript")


class FeaturesParams(ModelParams, ScorerParams):
    """Parameters of the `features` scorer.

    `model` is `efficientnet-lite0` (packaged), a transformers vision model (DINOv2, ViT, ConvNeXt, ...), or the path of
    a TorchScript file, which is how SSCD is published.
    """

    plain_names: ClassVar[frozenset[str] | None] = frozenset({EFFICIENTNET_LITE0.name})

    model: str = EFFICIENTNET_LITE0.name
    pool: Literal["pooler", "cls", "mean"] = Field(
        default="pooler", description="of a transformers model: its pooled output, its first token, or all tokens' mean"
    )
    side: int = Field(default=288, ge=16, description="a TorchScript file sees this square (SSCD: 288)")


class Features(Scorer):
    """`features_embedding`: float16 vector of length 1, so that a dot product is the cosine."""

    name = "features"
    version = "1"
    Params = FeaturesParams
    params: FeaturesParams

    @property
    def columns(self) -> dict[str, pa.DataType]:
        return {"features_embedding": pa.list_(pa.float16())}

    @property
    def batch_size(self) -> int:
        return self.params.batch_size

    @property
    def provenance(self) -> dict[str, str]:
        return EFFICIENTNET_LITE0.provenance if self._is_packaged else self._checkpoint.provenance

    def preflight(self) -> None:
        if self._is_packaged:
            _ = EFFICIENTNET_LITE0.path
        elif self._is_torchscript:
            self._checkpoint.check([f"*{suffix}" for suffix in _TORCHSCRIPT])
        else:
            self._checkpoint.check(CONFIG, PREPROCESSOR, WEIGHTS)
            if not {"hidden_size", "hidden_sizes"} & self._checkpoint.config().keys():
                raise self._checkpoint.missing(
                    "config.json has no hidden_size, so it is no image encoder; use a vision model, or the clip scorer"
                )

    def score(self, items: Sequence[ScorerInput]) -> list[dict[str, Any]]:
        vectors = unit_rows(self._encode(items))
        return [{"features_embedding": vector} for vector in vectors.astype(np.float16)]

    @property
    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(self.params)

    @property
    def _is_packaged(self) -> bool:
        return self.params.model == EFFICIENTNET_LITE0.name

    @property
    def _is_torchscript(self) -> bool:
        return self.params.is_path and self.params.model.endswith(_TORCHSCRIPT)

    @cached_property
    def _encode(self) -> Encoder:
        if self._is_packaged:
            network = EfficientNetLite0(self.params)
            return lambda items: network(items)[0].numpy()
        return self._torchscript() if self._is_torchscript else self._transformers()

    def _transformers(self) -> Encoder:
        import torch
        from transformers import AutoModel

        pool, prepare = self.params.pool, load_processor(self.params)
        # A classifier's checkpoint has no pooler; then the first token or the mean is what can be used.
        model = load_pretrained(AutoModel, self.params, may_lack="" if pool == "pooler" else "pooler.")

        def encode(items: Sequence[ScorerInput]) -> np.ndarray:
            pixels = torch.cat(decode_batch(items, prepare))
            with inference(self.params) as device:
                return _pooled(model(pixels.to(device)), pool).flatten(1).float().cpu().numpy()

        return encode

    def _torchscript(self) -> Encoder:
        import torch

        path, side = self._checkpoint.file("*"), self.params.side
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # the format in which SSCD is published
                model = placed(torch.jit.load(path, map_location="cpu"), self.params)
        except RuntimeError as error:
            raise self._checkpoint.missing(f"is no TorchScript file: {error}") from error

        def encode(items: Sequence[ScorerInput]) -> np.ndarray:
            pixels = torch.from_numpy(np.stack(decode_batch(items, lambda pixels: _square(pixels, side))))
            with inference(self.params) as device:
                return model(pixels.to(device)).float().cpu().numpy()

        return encode


def _pooled(output: Any, pool: str) -> torch.Tensor:
    if pool == "pooler":
        return output.pooler_output
    return output.last_hidden_state[:, 0] if pool == "cls" else output.last_hidden_state.mean(1)


def _square(pixels: np.ndarray, side: int) -> np.ndarray:
    """float32 [3, side, side], ImageNet-normalised; the aspect ratio is given up, as in SSCD's evaluation."""
    shrinks = max(pixels.shape[:2]) > side
    square = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.ascontiguousarray(((square.astype(np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1))
