"""Open-vocabulary detectors: where in an image the things are that a list of phrases names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from builders.annotators.hub import as_pictures, auto_processor
from filters.models import inference, load_pretrained
from schemas.models import ModelParams

if TYPE_CHECKING:
    import torch

Box = tuple[float, float, float, float]
_PHRASES_AT_ONCE = 24  # GroundingDINO reads 256 word pieces


@dataclass(frozen=True)
class Found:
    """A phrase, its box (x0, y0, x1, y1) in pixels of the image, and the detector's score, 0..1."""

    phrase: str
    box: Box
    score: float


class Grounder(ABC):
    """A transformers model for zero-shot object detection."""

    def __init__(self, params: ModelParams) -> None:
        self.params = params

    @cached_property
    def _processor(self) -> Any:
        return auto_processor(self.params)

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModelForZeroShotObjectDetection

        return load_pretrained(AutoModelForZeroShotObjectDetection, self.params)

    def ground(
        self, images: Sequence[np.ndarray], phrases: Sequence[Sequence[str]], min_score: float
    ) -> list[list[Found]]:
        """What is found of each image's own phrases, overlapping boxes and all.

        Args:
            images: uint8 RGB [H, W, 3].
            phrases: of each image.
            min_score: least score.
        """
        questions = [(i, part) for i, own in enumerate(phrases) for part in _parts(own)]
        found: list[list[Found]] = [[] for _ in images]
        for start in range(0, len(questions), self.params.batch_size):
            batch = questions[start : start + self.params.batch_size]
            answers = self._detect([images[i] for i, _ in batch], [part for _, part in batch], min_score)
            for (i, _), answer in zip(batch, answers, strict=True):
                found[i] += answer
        return found

    @abstractmethod
    def _detect(self, images: list[np.ndarray], phrases: list[list[str]], min_score: float) -> list[list[Found]]: ...

    def _run(self, images: list[np.ndarray], text: Any, **options: Any) -> Any:
        inputs = self._processor(images=as_pictures(images), text=text, return_tensors="pt", **options)
        with inference(self.params) as device:
            return self._model(**inputs.to(device))


class Owl(Grounder):
    """OWL-ViT and OWLv2: every box has a score for every phrase; the best phrase gets it."""

    def _detect(self, images: list[np.ndarray], phrases: list[list[str]], min_score: float) -> list[list[Found]]:
        longest = max(map(len, phrases))
        outputs = self._run(images, phrases, truncation=True)
        results = self._processor.post_process_grounded_object_detection(
            outputs, threshold=min_score, target_sizes=[image.shape[:2] for image in images]
        )
        padded = [[*own, *[""] * (longest - len(own))] for own in phrases]
        return [
            [
                Found(own[label], tuple(box), score)
                for box, label, score in zip(*(result[k].tolist() for k in ("boxes", "labels", "scores")), strict=True)
                if own[label]
            ]
            for result, own in zip(results, padded, strict=True)
        ]


class GroundingDino(Grounder):
    """GroundingDINO and MM-GroundingDINO: every box has a score for every token of "a cat. a dog.".

    A phrase scores what its best token does. (The processor's own decoding glues together all tokens above a threshold,
    which mixes phrases.)
    """

    def _detect(self, images: list[np.ndarray], phrases: list[list[str]], min_score: float) -> list[list[Found]]:
        texts = [" ".join(f"{phrase}." for phrase in own) for own in phrases]
        outputs = self._run(images, texts, padding=True)
        logits, boxes = outputs.logits.float().cpu(), outputs.pred_boxes.float().cpu()
        return [
            [
                Found(phrase, _corners(box, image), score)
                for box, score, phrase in self._best(boxes[i], logits[i].sigmoid(), texts[i], own)
                if score > min_score
            ]
            for i, (image, own) in enumerate(zip(images, phrases, strict=True))
        ]

    def _best(
        self, boxes: torch.Tensor, scores: torch.Tensor, text: str, phrases: list[str]
    ) -> Iterator[tuple[list[float], float, str]]:
        """Each box [4] of one image with its best phrase, from token scores [boxes, tokens]."""
        import torch

        by_phrase = torch.stack([scores[:, span].amax(1) for span in self._token_spans(text, phrases)], 1)
        for box, score, which in zip(boxes.tolist(), *(best.tolist() for best in by_phrase.max(1)), strict=True):
            yield box, score, phrases[which]

    def _token_spans(self, text: str, phrases: list[str]) -> list[list[int]]:
        """Positions of the tokens of each phrase in the merged text."""
        offsets = self._processor.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        spans, start = [], 0
        for phrase in phrases:
            end = start + len(phrase)
            spans.append([i for i, (a, b) in enumerate(offsets) if start <= a < b <= end])
            start = end + len(". ")
        return spans


GROUNDERS: dict[str, type[Grounder]] = {
    "owlvit": Owl,
    "owlv2": Owl,
    "grounding-dino": GroundingDino,
    "mm-grounding-dino": GroundingDino,
}


def _parts(phrases: Sequence[str]) -> list[list[str]]:
    return [list(phrases[i : i + _PHRASES_AT_ONCE]) for i in range(0, len(phrases), _PHRASES_AT_ONCE)]


def _corners(box: Sequence[float], image: np.ndarray) -> Box:
    """(x0, y0, x1, y1) in pixels of (centre x, centre y, width, height) in shares of the image."""
    (x, y, w, h), (height, width) = box, image.shape[:2]
    return (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height
