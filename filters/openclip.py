"""CLIP models through open_clip, with the checks that open_clip leaves out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from filters.models import (
    Checkpoint,
    Encoded,
    ModelMissing,
    content_revision,
    decode_batch,
    inference,
    placed,
    unit_rows,
)
from schemas.models import ModelParams

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_*.safetensors", "open_clip_*.bin")
_TOKENIZER = ("*.json", "*.txt", "*.model")
GOLDEN_TOLERANCE = 1e-3  # well above what devices and libraries differ by in float32
_GOLDEN_TEXT = "a red circle on a white background"


class ClipModelParams(ModelParams):
    """A CLIP model: a hub id or directory in open_clip's layout, or one of open_clip's own names with `pretrained`."""

    plain_names: ClassVar[frozenset[str] | None] = None

    pretrained: str = Field(default="", description="with one of open_clip's names: a tag, or the path of a file")
    golden_cosine: float | None = Field(
        default=None, ge=-1, le=1, description="`ClipModel.golden_cosine()` where the model is known to be right"
    )

    @model_validator(mode="after")
    def _says_which_weights(self) -> ClipModelParams:
        if bool(self.pretrained) == (self.is_hub or self.is_path):
            raise ValueError(
                f"pretrained: {self.model!r} brings its own weights; leave it out"
                if self.pretrained
                else f"pretrained: say which weights to load into {self.model!r}, e.g. `pretrained: openai`"
            )
        return self


@dataclass(frozen=True)
class ClipSource:
    """What can be known about a CLIP model without loading it."""

    params: ClipModelParams

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.params)

    @property
    def config(self) -> Mapping[str, Any]:
        """The architecture in open_clip's terms (`embed_dim`, `quick_gelu`, ...)."""
        import open_clip

        own = not self.params.pretrained
        config = (
            self.checkpoint.config(CONFIG).get("model_cfg") if own else open_clip.get_model_config(self.params.model)
        )
        if not config:
            raise self.checkpoint.missing(f"{CONFIG} has no `model_cfg`" if own else "open_clip knows no such model")
        return config

    @property
    def tag(self) -> Mapping[str, Any]:
        """What open_clip knows about the pretrained tag; empty for a file.

        Raises:
            ModelMissing: neither a tag nor a file.
        """
        import open_clip

        name, pretrained = self.params.model, self.params.pretrained
        if tag := open_clip.get_pretrained_cfg(name, pretrained):
            return tag
        if not Path(pretrained).is_file():
            known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            raise ModelMissing("pretrained", f"{pretrained!r} is neither a file nor a tag of {name!r} (tags: {known})")
        return {}

    @property
    def provenance(self) -> dict[str, str]:
        import open_clip

        pretrained = self.params.pretrained
        if not pretrained:
            return self.checkpoint.provenance
        tag = f"{pretrained} of open_clip {open_clip.__version__}"
        return {"model": self.params.model, "revision": tag if self.tag else content_revision(Path(pretrained))}

    def check(self) -> None:
        """Raise `ModelMissing` for an absent model, and for one that open_clip would build with a wrong activation.

        open_clip only warns when weights that were trained with QuickGELU are loaded into a model without it, or the
        reverse, and then every score is wrong (open_clip/factory.py, `create_model`).
        """
        if not self.params.pretrained:
            self.checkpoint.check([CONFIG], WEIGHTS)
        built, trained = bool(self.config.get("quick_gelu", False)), self._trained_with_quick_gelu()
        if trained in (None, built):
            return
        name = self.params.model
        fit = f"{name}-quickgelu" if trained else name.removesuffix("-quickgelu")
        raise self.checkpoint.missing(
            f"its weights were trained {'with' if trained else 'without'} QuickGELU, and the model would be built "
            f"{'with' if built else 'without'}; "
            + (f"use model: {fit}" if self.params.pretrained else f"correct `quick_gelu` in its {CONFIG}")
        )

    def load(self) -> ClipModel:
        """The model on its device.

        Raises:
            ModelMissing: it cannot be loaded, or does not give the golden cosine.
        """
        import open_clip

        self.check()
        name = self.params.model
        if not self.params.pretrained:
            name = f"local-dir:{self.checkpoint.fetch([*WEIGHTS, *_TOKENIZER])}"
        try:
            model, prepare = open_clip.create_model_from_pretrained(name, self.params.pretrained or None)
            loaded = ClipModel(self.params, placed(model, self.params), prepare, open_clip.get_tokenizer(name))
        except Exception as error:  # open_clip raises what its parts raise: keys, shapes, pickles, the hub
            raise self.checkpoint.missing(f"open_clip cannot load it: {error}") from error
        golden = self.params.golden_cosine
        if golden is not None and abs((found := loaded.golden_cosine()) - golden) > GOLDEN_TOLERANCE:
            raise ModelMissing(
                "golden_cosine",
                f"{self.params.model!r} gives {found:.4f}, not {golden:.4f}: other weights, another activation "
                f"(QuickGELU) or other preprocessing than where that was measured",
            )
        return loaded

    def _trained_with_quick_gelu(self) -> bool | None:
        """None if nothing tells."""
        if self.params.pretrained:
            return bool(self.tag.get("quick_gelu", False)) if self.tag else None
        return True if "openai" in Path(self.params.model).name.lower() else None


@dataclass(frozen=True)
class ClipModel:
    """A loaded CLIP model. Embeddings are float32 [n, d] of length 1."""

    params: ClipModelParams
    model: Any
    prepare: Callable[[Any], Any]
    tokenizer: Any

    @property
    def context(self) -> int:
        """Tokens that the text encoder reads."""
        return int(self.tokenizer.context_length)

    def tokens(self, text: str) -> int:
        """Length of a text in tokens, with start and end, not cut off."""
        if hasattr(self.tokenizer, "tokenizer"):  # a Hugging Face tokenizer inside
            return len(self.tokenizer.tokenizer(text)["input_ids"])
        return len(self.tokenizer.encode(text)) + 2

    def images(self, items: Sequence[Encoded]) -> np.ndarray:
        return self._pixels(decode_batch(items, self._prepare))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Longer texts than `context` are cut off."""
        with inference(self.params) as device:
            return unit_rows(self.model.encode_text(self.tokenizer(list(texts)).to(device)).float().cpu().numpy())

    def golden_cosine(self) -> float:
        """Cosine of a drawn red circle and its description, always in float32.

        A fingerprint of weights, activation, tokenizer and preprocessing.
        """
        exact = replace(self, params=self.params.model_copy(update={"dtype": "float32"}))
        image, text = exact._pixels([self._prepare(_red_circle())]), exact.texts([_GOLDEN_TEXT])
        return float((image * text).sum())

    def _prepare(self, pixels: np.ndarray) -> Any:
        from PIL import Image

        return self.prepare(Image.fromarray(pixels))

    def _pixels(self, prepared: list[Any]) -> np.ndarray:
        import torch

        with inference(self.params) as device:
            return unit_rows(self.model.encode_image(torch.stack(prepared).to(device)).float().cpu().numpy())


def _red_circle() -> np.ndarray:
    """uint8 [224, 224, 3]."""
    y, x = np.mgrid[:224, :224] - 111.5
    inside = np.hypot(x, y) < 70
    return np.where(inside[..., None], np.array([220, 20, 20], np.uint8), np.uint8(255))
