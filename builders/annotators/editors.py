"""Diffusion models that change pictures: they fill a region, or follow an instruction.

Both kinds are pipelines of diffusers, told apart by `_class_name` in `model_index.json`. A model sees the picture, or
the surroundings of the hole, scaled to about as many pixels as it was trained on, with sides that are multiples of 16;
what it gives is scaled back, so the caller gets the size that went in.
"""

from __future__ import annotations

import inspect
import math
import re
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, Literal

import cv2
import numpy as np
from pydantic import Field

from filters.models import Checkpoint, Choice, ModelMissing, device_of, dtype_of, inference
from schemas.models import ModelParams

INDEX = "model_index.json"
EDITORS = (
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
    "FluxKontextPipeline",
    "QwenImageEditPipeline",
    "QwenImageEditPlusPipeline",
)
_FILL = "FluxFillPipeline"  # the one inpainter that diffusers' table of them leaves out
_MULTIPLE = 16
_CONTEXT, _LEAST_CONTEXT = 0.5, 64  # margin around a hole: share of its longer side, and pixels
_WITHOUT_WEIGHTS = re.compile(r"Scheduler$|Tokenizer(Fast)?$|Processor(Fast)?$|Extractor$")


class EditRefused(Exception):
    """The model's safety checker took offence at what the model made, and blackened it."""


class DiffusionParams(ModelParams):
    """A diffusers pipeline. What is null is as the pipeline has it."""

    # Pictures are edited one at a time, and only with code that diffusers brings.
    batch_size: Literal[1] = 1
    trust_remote_code: Literal[False] = False

    steps: int | None = Field(default=None, ge=1, description="of denoising")
    guidance: float | None = Field(default=None, ge=0, description="by the text (`true_cfg_scale` of Qwen-Image)")
    resolution: int | None = Field(
        default=None,
        ge=64,
        description="side of a square with as many pixels as the model sees; null: 512 for Stable Diffusion 1 and 2, "
        "1024 for all others",
    )


class InpainterParams(DiffusionParams):
    """A model that fills holes."""

    strength: float | None = Field(default=None, gt=0, le=1, description="1: nothing of what was in the hole is used")
    background_prompt: str = Field(
        default="empty background, nothing there", description="when nothing is to be in the hole"
    )
    negative_prompt: str = ""


class EditorParams(DiffusionParams):
    """A model that follows instructions."""

    image_guidance: float | None = Field(default=None, ge=1, description="by the picture (InstructPix2Pix only)")


class _Diffusion(ABC):
    """A pipeline on its device, and the options with which it is called."""

    def __init__(self, params: DiffusionParams) -> None:
        self.params = params
        self.checkpoint = Checkpoint(params)

    @property
    def name(self) -> str:
        return self.params.model

    @property
    def version(self) -> str:
        return self.checkpoint.revision

    def preflight(self) -> None:
        """Check class, files and options of the pipeline without reading weights.

        Raises:
            ModelMissing: the model is absent, incomplete, of another kind, or lacks an option that the recipe sets.
        """
        self.checkpoint.check([INDEX])
        _ = self._options
        self.checkpoint.check(*_needed_files(self.checkpoint.config(INDEX)))

    @abstractmethod
    def _class(self, name: str) -> Any:
        """The pipeline class for a checkpoint of the named one, or None if it is of another kind."""

    @property
    @abstractmethod
    def _known(self) -> tuple[str, ...]:
        """Names of the classes that can be used."""

    @property
    def _settings(self) -> dict[str, Any]:
        """Options of the call by the recipe's name for them; those that are None are left to the pipeline."""
        return {"steps": self.params.steps, "guidance": self.params.guidance}

    @cached_property
    def _pipeline_class(self) -> Any:
        name = str(self.checkpoint.config(INDEX).get("_class_name", ""))
        if (found := self._class(name)) is None:
            kind = f"a {name}" if name else "a model without `_class_name`"
            raise self.checkpoint.missing(f"{kind} cannot be used here; known are {', '.join(self._known)}")
        return found

    @cached_property
    def _options(self) -> dict[str, Any]:
        """The settings in the pipeline's own terms."""
        accepted = inspect.signature(self._pipeline_class.__call__).parameters
        name = self._pipeline_class.__name__
        # Flux and Qwen have two guidances: the one that Flux was distilled with, and real guidance for Qwen.
        spelled = {
            "steps": "num_inference_steps",
            "guidance": "true_cfg_scale" if name.startswith("Qwen") else "guidance_scale",
            "image_guidance": "image_guidance_scale",
        }
        options = {}
        for setting, value in self._settings.items():
            option = spelled.get(setting, setting)
            if value is not None and option not in accepted:
                raise ModelMissing(setting, f"{self.params.model!r} is a {name}, which has no {setting}; leave it out")
            if value is not None:
                options[option] = value
        # Qwen-Image ignores its guidance unless there is something to be guided away from.
        return ({"negative_prompt": " "} if name.startswith("Qwen") else {}) | options

    @cached_property
    def _pipeline(self) -> Any:
        from diffusers.utils import logging
        from transformers.utils import logging as transformers_logging

        for library in (logging, transformers_logging):
            library.disable_progress_bar()  # one bar per worker would bury the job's own progress
        params, checkpoint = self.params, self.checkpoint
        try:
            pipeline = self._pipeline_class.from_pretrained(
                str(checkpoint.root or params.model),
                dtype=dtype_of(params),
                use_safetensors=True,
                **({"revision": params.revision} if params.is_hub else {}),
            )
        except (OSError, ValueError, RuntimeError, AttributeError, TypeError) as error:
            raise checkpoint.missing(f"{self._pipeline_class.__name__} cannot load it: {error}") from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device_of(params))

    def _fitting(self, height: int, width: int) -> tuple[int, int]:
        """(width, height) at which the model sees a picture: multiples of 16, about the same shape."""
        is_small = re.match("StableDiffusion(?!XL|3)", self._pipeline_class.__name__)
        side = self.params.resolution or (512 if is_small else 1024)
        scale = side / math.sqrt(height * width)
        fitted = (max(_MULTIPLE, round(scale * x / _MULTIPLE) * _MULTIPLE) for x in (width, height))
        return next(fitted), next(fitted)

    def _call(self, seen: np.ndarray, prompt: str, rng: np.random.Generator, **inputs: Any) -> np.ndarray:
        """What the pipeline makes of a uint8 RGB image [h, w, 3] of a fitting size, as one of the same size."""
        import torch
        from PIL import Image

        height, width = seen.shape[:2]
        accepted = inspect.signature(self._pipeline_class.__call__).parameters
        sizes = {"height": height, "width": width, "max_area": height * width, "_auto_resize": False}
        # Noise is drawn on the CPU, where it is the same for every device; the pipeline has its own dtype.
        noise = torch.Generator().manual_seed(int(rng.integers(2**63)))
        with inference(self.params.model_copy(update={"dtype": "float32"})):
            made = self._pipeline(
                prompt=prompt,
                image=Image.fromarray(seen),
                generator=noise,
                **{name: value for name, value in sizes.items() if name in accepted},
                **self._options,
                **inputs,
            )
        if any(getattr(made, "nsfw_content_detected", None) or ()):
            raise EditRefused(f"the safety checker of {self.params.model} refuses what it made")
        return _resized(np.asarray(made.images[0].convert("RGB")), (width, height))


class DiffusersInpainter(_Diffusion):
    """`Inpainter` (see `builders.annotators.base`) of diffusers' table of inpainting pipelines, or FLUX.1 Fill."""

    params: InpainterParams

    def inpaint(self, image: np.ndarray, mask: np.ndarray, prompt: str, rng: np.random.Generator) -> np.ndarray:
        """See `Inpainter`. Only the surroundings of the hole are seen; what is further away is returned as it is.

        Raises:
            EditRefused: by the model's safety checker.
        """
        from PIL import Image

        if not mask.any():
            return image.copy()
        window = _surroundings(mask)
        size = self._fitting(*mask[window].shape)
        seen = _resized(image[window], size)
        hole = _resized(mask[window].astype(np.uint8) * 255, size) > 0
        made = self._call(
            seen, prompt or self.params.background_prompt, rng, mask_image=Image.fromarray(hole.astype(np.uint8) * 255)
        )
        filled = image.copy()
        filled[window] = _resized(made, mask[window].shape[::-1])
        return filled

    @property
    def _settings(self) -> dict[str, Any]:
        negative = self.params.negative_prompt or None
        return super()._settings | {"strength": self.params.strength, "negative_prompt": negative}

    def _class(self, name: str) -> Any:
        import diffusers
        from diffusers.pipelines import auto_pipeline

        if name == _FILL:
            return getattr(diffusers, _FILL)
        tables = (
            auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
            auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
            auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        )
        families = (family for table in tables for family, known in table.items() if known.__name__ == name)
        return tables[0].get(next(families, ""))

    @property
    def _known(self) -> tuple[str, ...]:
        from diffusers.pipelines.auto_pipeline import AUTO_INPAINT_PIPELINES_MAPPING

        return (_FILL, *(known.__name__ for known in AUTO_INPAINT_PIPELINES_MAPPING.values()))


class InstructionEditor(_Diffusion):
    """`Editor` (see `builders.annotators.base`): InstructPix2Pix, FLUX.1 Kontext or Qwen-Image-Edit."""

    params: EditorParams

    def edit(self, image: np.ndarray, instruction: str, rng: np.random.Generator) -> np.ndarray:
        """See `Editor`.

        Raises:
            EditRefused: by the model's safety checker.
        """
        height, width = image.shape[:2]
        made = self._call(_resized(image, self._fitting(height, width)), instruction, rng)
        return _resized(made, (width, height))

    @property
    def _settings(self) -> dict[str, Any]:
        return super()._settings | {"image_guidance": self.params.image_guidance}

    def _class(self, name: str) -> Any:
        import diffusers

        return getattr(diffusers, name) if name in EDITORS else None

    @property
    def _known(self) -> tuple[str, ...]:
        return EDITORS


def _needed_files(index: dict[str, Any]) -> list[Choice]:
    """For every part of a pipeline, its weights, or whatever stands in its folder if it has none."""
    parts = {
        name: part[1] for name, part in index.items() if not name.startswith("_") and isinstance(part, list) and part[1]
    }
    return [
        [f"{name}/*"] if _WITHOUT_WEIGHTS.search(kind) else [f"{name}/*.safetensors"] for name, kind in parts.items()
    ]


def _surroundings(mask: np.ndarray) -> tuple[slice, slice]:
    """The window that a model has to see to fill a hole."""
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    margin = max(_LEAST_CONTEXT, math.ceil(_CONTEXT * max(w, h)))
    return slice(max(0, y - margin), y + h + margin), slice(max(0, x - margin), x + w + margin)


def _resized(image: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """The uint8 image in another (width, height)."""
    if image.shape[1::-1] == tuple(size):
        return image
    smaller = size[0] * size[1] < image.shape[0] * image.shape[1]
    return cv2.resize(image, (size[0], size[1]), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)
