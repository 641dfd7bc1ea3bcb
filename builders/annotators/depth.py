"""Depth by a model: `depth.png`, uint16 inverse depth of the photo's size (larger is nearer, 0 is unknown).

The convention is that of `SourceImage.depth`, so a source's own depth and a model's are used alike. What networks give
differs: Depth Anything and MiDaS predict inverse depth up to a factor (and, strictly, an offset); ZoeDepth, Depth Pro
and GLPN predict metres; LeReS depth up to an affine map. `data["scale"]` turns stored numbers back: inverse depth =
scale x value, in 1/m where `data["unit"]` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from builders.annotators.annotator import Artefact
from builders.annotators.controlnet import (
    LERES,
    MIDAS,
    MULTIPLE,
    ZOE,
    SizedParams,
    check_precision,
    fit,
    quiet,
    unfit,
)
from builders.annotators.model import ModelAnnotator
from builders.base import SourceImage
from filters.models import CONFIG, PREPROCESSOR, WEIGHTS, Choice, inference, load_pretrained, load_processor
from schemas.codec import encode_png
from schemas.models import ModelParams

if TYPE_CHECKING:
    import torch

Output = Literal["inverse", "metres"]
FULL = 65535

# What the depth heads of transformers give, by `model_type`; Depth Anything says it in `depth_estimation_type`.
_OUTPUTS: dict[str, Output] = {
    "dpt": "inverse",
    "zoedepth": "metres",
    "depth_pro": "metres",
    "glpn": "metres",
    "prompt_depth_anything": "metres",
}
_DETECTORS = {"midas": MIDAS, "zoe": ZOE, "leres": LERES}


class DepthParams(SizedParams):
    """A depth model of transformers (which scales photos as its processor says), or one of controlnet_aux."""

    detector: Literal["transformers", "midas", "zoe", "leres"] = "transformers"
    output: Literal["auto", "inverse", "metres"] = Field(
        "auto", description="what a transformers model predicts; a DPT that was trained on metres needs `metres`"
    )

    @model_validator(mode="after")
    def _fits_the_detector(self) -> DepthParams:
        if self.detector != "transformers":
            check_precision(self)
            if self.output != "auto":
                raise ValueError(f"output: what {self.detector} predicts is known; leave it out")
        return self


class DepthEstimator(ModelAnnotator):
    """Inverse depth of whole photos."""

    name = "depth"
    version = "1"
    Params: ClassVar[type[ModelParams]] = DepthParams
    params: DepthParams

    @property
    def files(self) -> tuple[Choice, ...]:
        if self.params.detector == "transformers":
            return CONFIG, WEIGHTS, PREPROCESSOR
        return _DETECTORS[self.params.detector].files

    def preflight(self) -> None:
        super().preflight()
        if self.params.detector == "transformers":
            self._output()

    def annotate(self, images: Sequence[SourceImage]) -> list[Artefact]:
        pixels = [image.pixels for image in images]
        if self.params.detector != "transformers":
            return [self._artefact(*self._with_controlnet(photo)) for photo in pixels]
        return [self._artefact(depth, self._output()) for depth in self._with_transformers(pixels)]

    def _artefact(self, predicted: np.ndarray, output: Output) -> Artefact:
        stored, scale = quantise(inverse_depth(predicted, output))
        unit = "1/m" if output == "metres" else ""
        return self.found({"depth.png": encode_png(stored)}, scale=scale, unit=unit)

    def _output(self) -> Output:
        """What the network of transformers predicts.

        Raises:
            ModelMissing: this kind of network is not known.
        """
        if self.params.output != "auto":
            return self.params.output
        config = self.checkpoint.config()
        kind = config.get("model_type", "")
        if kind == "depth_anything":
            return "metres" if config.get("depth_estimation_type") == "metric" else "inverse"
        if kind not in _OUTPUTS:
            raise self.checkpoint.missing(
                f"model_type {kind!r} is not known here; say `output: inverse` (larger is nearer) or `output: metres`"
            )
        return _OUTPUTS[kind]

    @cached_property
    def _transformer(self) -> tuple[Any, Callable[[np.ndarray], torch.Tensor]]:
        from transformers import AutoModelForDepthEstimation

        return load_pretrained(AutoModelForDepthEstimation, self.params), load_processor(self.params)

    def _with_transformers(self, photos: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Predictions float32 [H, W]. Photos that the processor brings to the same size go through together."""
        import torch
        from torch.nn import functional

        model, prepare = self._transformer
        inputs = [prepare(photo.copy()) for photo in photos]  # torch warns of arrays that cannot be written to
        found: list[np.ndarray] = [np.empty(0)] * len(photos)
        for shape in dict.fromkeys(x.shape for x in inputs):
            alike = [i for i, x in enumerate(inputs) if x.shape == shape]
            with inference(self.params) as device:
                batch = model(torch.cat([inputs[i] for i in alike]).to(device)).predicted_depth.float()
            for i, depth in zip(alike, batch, strict=True):
                whole = functional.interpolate(
                    depth[None, None], photos[i].shape[:2], mode="bilinear", align_corners=False
                )
                found[i] = whole[0, 0].cpu().numpy()
        return found

    @cached_property
    def _network(self) -> Any:
        return _DETECTORS[self.params.detector].load(self.checkpoint, self.params).model

    def _with_controlnet(self, pixels: np.ndarray) -> tuple[np.ndarray, Output]:
        """The network's own numbers, of which controlnet_aux's detectors keep eight bits."""
        import torch

        seen, size = fit(pixels, self.params.resolution, MULTIPLE)
        with inference(self.params) as device, quiet():
            if self.params.detector == "leres":
                from controlnet_aux.leres.leres.depthmap import estimateleres

                depth = estimateleres(seen, self._network, seen.shape[1], seen.shape[0])
                return unfit(depth.max() - depth, size, pixels.shape[:2]), "inverse"
            x = torch.from_numpy(seen).permute(2, 0, 1)[None].float().to(device)
            if self.params.detector == "midas":
                return unfit(self._network(x / 127.5 - 1)[0].cpu().numpy(), size, pixels.shape[:2]), "inverse"
            return unfit(self._network.infer(x / 255)[0, 0].cpu().numpy(), size, pixels.shape[:2]), "metres"


def inverse_depth(predicted: np.ndarray, output: Output) -> np.ndarray:
    """float32 [H, W], at least 0, larger is nearer, of what a network predicts; metres are at least 1 mm."""
    if output == "metres":
        return 1 / np.maximum(predicted, 1e-3)
    return np.maximum(predicted, 0)


def quantise(inverse: np.ndarray) -> tuple[np.ndarray, float]:
    """uint16 [H, W] from 1 (infinitely far) to 65535 (the nearest point), and what one step stands for.

    Raises:
        ValueError: a number is not finite, which only a broken network gives.
    """
    if not np.isfinite(inverse).all():
        raise ValueError("the depth model gave numbers that are not finite")
    scale = max(float(inverse.max()), 1e-12) / FULL
    return np.clip(np.rint(inverse / scale), 1, FULL).astype(np.uint16), scale
