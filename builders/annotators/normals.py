"""Surface normals: from depth without a model, or by NormalBae or Marigold.

One convention for all of them: the components to the right, upwards and towards the viewer are red, green and blue,
-1..1 as 0..255 (that of Marigold and of OpenGL). A wall that faces the camera is (128, 128, 255); black is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
from pydantic import Field, model_validator

from builders.annotators.annotator import Artefact
from builders.annotators.controlnet import (
    MULTIPLE,
    NORMALBAE,
    SizedParams,
    call,
    check_precision,
    fit,
    unfit,
)
from builders.annotators.model import ModelAnnotator
from builders.base import SourceImage
from filters.models import Choice, device_of, dtype_of, inference
from schemas.codec import encode_png
from schemas.identity import generator
from schemas.models import ModelParams

FIELD_OF_VIEW = 55.0  # degrees along the longer side: a phone's main camera has about 65, a portrait lens 30

_MARIGOLD: tuple[Choice, ...] = (
    ("model_index.json",),
    ("unet/*.safetensors",),
    ("vae/*.safetensors",),
    ("text_encoder/*.safetensors",),
    ("tokenizer/vocab.json", "tokenizer/tokenizer.json"),
    ("scheduler/scheduler_config.json",),
)


def normals_from_depth(inverse: np.ndarray, field_of_view: float, sigma: float) -> np.ndarray:
    """Unit normals of the surfaces whose inverse depth is given.

    A pinhole camera with its axis through the middle and square pixels sees the point (x, y, 1) z at pixel
    (u, v) = (c_u + f x, c_v + f y), y downwards. On a plane n . P = c the inverse depth d = 1/z is therefore
    (n_x x + n_y y + n_z) / c: linear in the pixel. With its derivatives,

        n  ~  (f d_u,  f d_v,  d - (u - c_u) d_u - (v - c_v) d_v),

    whatever the unknown factor of d. Facing the camera, with y upwards, that is (-f d_u, f d_v, same).

    Args:
        inverse: [H, W] inverse depth in any unit, 0 where it is unknown.
        field_of_view: of the camera along the longer side, in degrees. A wrong one tilts normals that are oblique.
        sigma: of the Gaussian, in pixels, over which known depths are averaged before they are differentiated.

    Returns:
        float32 [H, W, 3] to the right, upwards and towards the viewer; 0 where the depth is unknown.
    """
    height, width = inverse.shape
    focal = max(height, width) / (2 * math.tan(math.radians(field_of_view) / 2))
    known = (inverse > 0).astype(np.float32)
    d = _blur(inverse.astype(np.float32) * known, sigma) / np.maximum(_blur(known, sigma), 1e-6)
    d_v, d_u = np.gradient(d)
    v, u = np.mgrid[:height, :width].astype(np.float32) - np.array([(height - 1) / 2, (width - 1) / 2])[:, None, None]
    normal = np.stack([-focal * d_u, focal * d_v, d - u * d_u - v * d_v], axis=-1)
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-12)
    return (normal * known[..., None]).astype(np.float32)


def encode_normals(normals: np.ndarray) -> np.ndarray:
    """uint8 RGB [H, W, 3] of normals [H, W, 3] in -1..1; black where they are 0."""
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    unit = normals / np.maximum(length, 1e-6)
    return np.where(length > 0, np.rint((unit + 1) * 127.5), 0).astype(np.uint8)


def _blur(array: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(array, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)


class NormalParams(SizedParams):
    """NormalBae (controlnet_aux), or Marigold (diffusers), which is far better and slower."""

    detector: Literal["normalbae", "marigold"] = "marigold"
    resolution: int = Field(
        768,
        ge=64,
        description="pixels of the side at which the network sees the photo: marigold's longer, normalbae's shorter",
    )
    steps: int = Field(4, ge=1, description="denoising steps of marigold")
    seed: int = Field(0, ge=0, description="of marigold's noise")

    @model_validator(mode="after")
    def _has_full_precision(self) -> NormalParams:
        if self.detector == "normalbae":
            check_precision(self)
        return self


class NormalEstimator(ModelAnnotator):
    """Surface normals of whole photos: `normal.png`, RGB of the photo's size."""

    name = "normal"
    version = "1"
    Params: ClassVar[type[ModelParams]] = NormalParams
    params: NormalParams

    @property
    def files(self) -> tuple[Choice, ...]:
        return NORMALBAE.files if self.params.detector == "normalbae" else _MARIGOLD

    def annotate(self, images: Sequence[SourceImage]) -> list[Artefact]:
        estimate = self._normalbae if self.params.detector == "normalbae" else self._marigold
        return [self.found({"normal.png": encode_png(encode_normals(estimate(image)))}) for image in images]

    @cached_property
    def _network(self) -> Any:
        return NORMALBAE.load(self.checkpoint, self.params)

    def _normalbae(self, image: SourceImage) -> np.ndarray:
        seen, size = fit(image.pixels, self.params.resolution, MULTIPLE)
        drawn = call(self._network, seen, self.params).astype(np.float32) / 127.5 - 1
        # ScanNet's convention, in which NormalBae was trained, has red to the left.
        return unfit(drawn, size, image.pixels.shape[:2]) * (-1, 1, 1)

    @cached_property
    def _pipeline(self) -> Any:
        from diffusers import MarigoldNormalsPipeline
        from diffusers.utils import logging

        logging.disable_progress_bar()
        folder = self.checkpoint.fetch(("*.json", "*.txt", "*/*.json", "*/*.txt", "*/*.safetensors"))
        try:
            pipeline = MarigoldNormalsPipeline.from_pretrained(
                str(folder), dtype=dtype_of(self.params), use_safetensors=True, local_files_only=True
            )
        except (OSError, ValueError, RuntimeError, AttributeError) as error:
            raise self.checkpoint.missing(f"MarigoldNormalsPipeline cannot load it: {error}") from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device_of(self.params))

    def _marigold(self, image: SourceImage) -> np.ndarray:
        import torch

        # The noise belongs to the image, not to its place in a batch.
        noise = int(generator(self.params.seed, image.record.uid, self.name).integers(2**31))
        exact = self.params.model_copy(update={"dtype": "float32"})  # the pipeline has its own dtype
        with inference(exact):
            found = self._pipeline(
                image.pixels,
                num_inference_steps=self.params.steps,
                processing_resolution=self.params.resolution,
                generator=torch.Generator().manual_seed(noise),
            )
        return np.asarray(found.prediction[0], np.float32)
