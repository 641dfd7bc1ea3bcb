"""What annotators with a transformers model share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image

from filters.models import Checkpoint, Choice
from schemas.models import ModelParams

TOKENIZER: Choice = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


def auto_processor(params: ModelParams) -> Any:
    """The processor of a transformers model that reads images together with text or boxes.

    Raises:
        ModelMissing: the model has none, or its files are not those of a processor.
    """
    from transformers import AutoProcessor

    checkpoint = Checkpoint(params)
    try:
        return AutoProcessor.from_pretrained(
            str(checkpoint.root or params.model),
            trust_remote_code=params.trust_remote_code,
            **({"revision": params.revision} if params.is_hub else {}),
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise checkpoint.missing(f"its processor cannot be loaded: {error}") from error


def check_architecture(checkpoint: Checkpoint, role: str, *mappings: str) -> str:
    """The model type in a checkpoint's configuration, if transformers has such a model for this role.

    Args:
        checkpoint: of the model.
        role: in words, for the message.
        mappings: names in `transformers.models.auto.modeling_auto` of tables from model type to class.

    Raises:
        ModelMissing: it is made for something else.
    """
    from transformers.models.auto import modeling_auto

    kind = str(checkpoint.config().get("model_type", ""))
    known = {name for mapping in mappings for name in getattr(modeling_auto, mapping)}
    if kind not in known:
        raise checkpoint.missing(
            f"a {kind or 'model without model_type'} cannot be the {role}; known are {', '.join(sorted(known))}"
        )
    return kind


def as_pictures(images: Sequence[np.ndarray]) -> list[Image.Image]:
    """Pillow images of uint8 RGB [H, W, 3] arrays: processors guess where the channels of an array are."""
    return [Image.fromarray(pixels) for pixels in images]


def at_most(pixels: np.ndarray, max_pixels: int) -> np.ndarray:
    """The uint8 RGB image, scaled down if it has more than `max_pixels`."""
    height, width = pixels.shape[:2]
    scale = (max_pixels / (height * width)) ** 0.5
    if scale >= 1:
        return pixels
    size = (max(1, int(width * scale)), max(1, int(height * scale)))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
