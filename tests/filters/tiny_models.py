"""Tiny models with random weights, saved the way that the real ones are published. Seeded: the same every time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

CLIP_WIDTH = 24
VIT_WIDTH = 16
_VIT: dict[str, Any] = {
    "hidden_size": VIT_WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}


def save_clip(folder: Path, *, quick_gelu: bool = False, weights: bool = True, context: int = 77) -> Path:
    """A CLIP of a million parameters (its vocabulary) in open_clip's layout, with open_clip's own tokenizer."""
    config: dict[str, Any] = {
        "embed_dim": CLIP_WIDTH,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": context, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    if weights:
        model = open_clip.CLIP(**config)
        _spread(model)
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def save_classifier(folder: Path, labels: Sequence[str], **config: Any) -> Path:
    """A ViT image classifier of transformers with these labels, in the order of its outputs."""
    names = dict(enumerate(labels))
    torch.manual_seed(1)
    model = ViTForImageClassification(ViTConfig(**_VIT, id2label=names, label2id=_inverse(names), **config))
    return _save(_spread(model), ViTImageProcessor(size={"height": 32, "width": 32}), folder)


def save_dinov2(folder: Path) -> Path:
    """A DINOv2 encoder of transformers."""
    torch.manual_seed(2)
    processor = BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return _save(_spread(Dinov2Model(Dinov2Config(**_VIT))), processor, folder)


def aesthetic_layers(width: int) -> torch.nn.Sequential:
    """LAION's aesthetic predictor, layer for layer, for embeddings of this width."""
    torch.manual_seed(3)
    drop = torch.nn.Dropout
    widths = (width, 1024, 128, 64, 16, 1)
    linear = [torch.nn.Linear(a, b) for a, b in pairwise(widths)]
    return torch.nn.Sequential(linear[0], drop(0.2), linear[1], drop(0.2), linear[2], drop(0.1), *linear[3:]).eval()


def save_aesthetic(folder: Path, width: int = CLIP_WIDTH) -> Path:
    """The head alone, with the names that LAION's file has (`layers.0.weight`, ...)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"layers.{name}": tensor for name, tensor in aesthetic_layers(width).state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def save_torchscript(path: Path, width: int = 8) -> Path:
    """An encoder as one TorchScript file, like SSCD's."""
    torch.manual_seed(4)
    pool, flat = torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten()
    torch.jit.trace(torch.nn.Sequential(pool, flat, torch.nn.Linear(48, width)), torch.zeros(1, 3, 64, 64)).save(path)
    return path


def cache_as_hub(folder: Path, cache: Path, hub_id: str, commit: str) -> None:
    """Put a model where huggingface_hub's cache has a downloaded commit."""
    snapshot = cache / f"models--{hub_id.replace('/', '--')}" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(folder)


def _spread(model: torch.nn.Module) -> Any:
    """Random weights as initialised give nearly the same output for every image; larger ones tell images apart."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model


def _inverse(names: dict[int, str]) -> dict[str, int]:
    return {name: index for index, name in names.items()}


def _save(model: Any, processor: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
