"""Masks from boxes by SAM, SAM 2 or SAM-HQ of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from builders.annotators.hub import as_pictures, auto_processor
from filters.models import Checkpoint, inference, load_pretrained
from schemas.models import ModelParams

Box = tuple[float, float, float, float]


class Sam:
    """`BoxSegmenter` (see `builders.annotators.base`) that can also segment several boxes of one image at once."""

    def __init__(self, params: ModelParams) -> None:
        self.params = params

    @property
    def name(self) -> str:
        return self.params.model

    @property
    def version(self) -> str:
        return Checkpoint(self.params).revision

    def segment(self, image: np.ndarray, box: Box) -> tuple[np.ndarray, float]:
        """See `builders.annotators.base.BoxSegmenter`; the confidence is the overlap that the model predicts."""
        return self.segment_boxes(image, [box])[0]

    def segment_boxes(self, image: np.ndarray, boxes: Sequence[Box]) -> list[tuple[np.ndarray, float]]:
        """For each box, a boolean [H, W] mask of the uint8 RGB [H, W, 3] image and its confidence, 0..1."""
        if not boxes:
            return []
        asked = [[list(box) for box in boxes]]
        inputs = self._processor(images=as_pictures([image]), input_boxes=asked, return_tensors="pt")
        sizes = {name: inputs.pop(name) for name in ("original_sizes", "reshaped_input_sizes") if name in inputs}
        with inference(self.params) as device:
            outputs = self._model(**inputs.to(device), multimask_output=False)
        masks = self._processor.post_process_masks(outputs.pred_masks.float().cpu(), **sizes)[0][:, 0].numpy()
        scores = outputs.iou_scores.float().cpu().reshape(-1).clamp(0, 1).tolist()
        return list(zip(masks, scores, strict=True))

    @cached_property
    def _processor(self) -> Any:
        return auto_processor(self.params)

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModelForMaskGeneration

        return load_pretrained(AutoModelForMaskGeneration, self.params)
