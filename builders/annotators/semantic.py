"""What every pixel belongs to, by a segmentation model of transformers.

`semantic.png` holds one number per pixel (uint8, or uint16 where 256 are not enough), 0 for nothing; `data["segments"]`
says what each number is: `{"id", "label", "class_id"}`. Semantic maps have one segment per class, panoptic ones one per
thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from builders.annotators.annotator import Artefact
from builders.annotators.model import ModelAnnotator, load_part
from builders.base import SourceImage
from filters.models import CONFIG, PREPROCESSOR, WEIGHTS, Choice, inference, load_pretrained
from schemas.codec import encode_png
from schemas.models import ModelParams

if TYPE_CHECKING:
    import torch

# Networks that predict masks with a class each; they alone can tell two things of one class apart.
MASK_NETWORKS = ("mask2former", "maskformer", "oneformer", "eomt", "eomt_dinov3", "detr")
Ids = tuple[np.ndarray, list[tuple[int, int]]]  # segment ids [H, W], and (segment id, class id) of each


class SemanticParams(ModelParams):
    """`kind: panoptic` needs a network that predicts masks: Mask2Former, OneFormer, EoMT, ..."""

    kind: Literal["semantic", "panoptic"] = "semantic"
    min_score: float = Field(0.5, ge=0, le=1, description="of a panoptic segment; less certain pixels are nothing")


class SemanticSegmenter(ModelAnnotator):
    """Class or segment of every pixel."""

    name = "semantic"
    version = "1"
    Params: ClassVar[type[ModelParams]] = SemanticParams
    params: SemanticParams

    @property
    def files(self) -> tuple[Choice, ...]:
        return CONFIG, WEIGHTS, PREPROCESSOR

    def preflight(self) -> None:
        super().preflight()
        if self.params.kind == "panoptic" and self._network not in MASK_NETWORKS:
            raise self.checkpoint.missing(f"a {self._network!r} network gives no panoptic map; use `kind: semantic`")

    def annotate(self, images: Sequence[SourceImage]) -> list[Artefact]:
        return [self._artefact(*ids) for ids in self._segment([image.pixels for image in images])]

    def _artefact(self, ids: np.ndarray, segments: Sequence[tuple[int, int]]) -> Artefact:
        labels = {int(key): str(label) for key, label in self._model.config.id2label.items()}
        listed = [{"id": i, "label": labels.get(c, f"class {c}"), "class_id": c} for i, c in segments]
        small = ids.max(initial=0) < 256
        return self.found({"semantic.png": encode_png(ids.astype(np.uint8 if small else np.uint16))}, segments=listed)

    @cached_property
    def _network(self) -> str:
        return str(self.checkpoint.config().get("model_type", ""))

    @cached_property
    def _model(self) -> Any:
        import transformers

        kind = "Universal" if self._network in MASK_NETWORKS else "Semantic"
        return load_pretrained(getattr(transformers, f"AutoModelFor{kind}Segmentation"), self.params)

    @cached_property
    def _processor(self) -> Any:
        import transformers

        if self._network != "oneformer":
            return load_part(transformers.AutoImageProcessor, self.checkpoint, self.params)
        # OneFormer's processor would download a list of class names from a data set without a revision; only training
        # reads it.
        images = load_part(transformers.OneFormerImageProcessor, self.checkpoint, self.params, class_info_file=None)
        tokenizer = load_part(transformers.AutoTokenizer, self.checkpoint, self.params)
        return transformers.OneFormerProcessor(images, tokenizer)

    def _segment(self, photos: Sequence[np.ndarray]) -> list[Ids]:
        """Photos that the processor brings to the same size go through together: padding would change them."""
        prepared = [self._prepare(photo) for photo in photos]
        found: dict[int, Ids] = {}
        for shape in dict.fromkeys(x["pixel_values"].shape for x in prepared):
            alike = [i for i, x in enumerate(prepared) if x["pixel_values"].shape == shape]
            found |= zip(
                alike, self._run([prepared[i] for i in alike], [photos[i].shape[:2] for i in alike]), strict=True
            )
        return [found[i] for i in range(len(photos))]

    def _prepare(self, photo: np.ndarray) -> dict[str, torch.Tensor]:
        # Told, not guessed: an image 3 pixels high looks like one with its channels first.
        options: dict[str, Any] = {"return_tensors": "pt", "input_data_format": "channels_last"}
        if self._network == "oneformer":
            options["task_inputs"] = [self.params.kind]
        return {k: v for k, v in self._processor(images=photo.copy(), **options).items() if k != "pixel_mask"}

    def _run(self, inputs: Sequence[dict[str, torch.Tensor]], sizes: Sequence[tuple[int, ...]]) -> list[Ids]:
        import torch

        with inference(self.params) as device:
            outputs = self._model(**{k: torch.cat([x[k] for x in inputs]).to(device) for k in inputs[0]})
        processor = getattr(self._processor, "image_processor", self._processor)
        if self.params.kind == "semantic":
            classes = processor.post_process_semantic_segmentation(outputs, target_sizes=list(sizes))
            return [_by_class(ids.cpu().numpy()) for ids in classes]
        panoptic = processor.post_process_panoptic_segmentation(
            outputs, threshold=self.params.min_score, target_sizes=list(sizes)
        )
        return [_by_segment(each["segmentation"].cpu().numpy(), each["segments_info"]) for each in panoptic]


def _by_class(classes: np.ndarray) -> Ids:
    return classes + 1, [(int(c) + 1, int(c)) for c in np.unique(classes)]


def _by_segment(ids: np.ndarray, segments: Sequence[dict[str, Any]]) -> Ids:
    """Numbers from 1 in the order of the network's own, which start anywhere and use -1 or 0 for nothing."""
    renumbered = np.zeros(ids.shape, np.int32)
    for number, segment in enumerate(segments, start=1):
        renumbered[ids == segment["id"]] = number
    return renumbered, [(number, int(s["label_id"])) for number, s in enumerate(segments, start=1)]
