"""People's poses: eighteen keypoints each, by OpenPose (controlnet_aux) or ViTPose (transformers).

`data["people"]` is a list of `{"keypoints": [[x, y, score], ...]}` in pixels of the photo, in the order of `KEYPOINTS`;
a keypoint that was not found is [0, 0, 0].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import model_validator

from builders.annotators.annotator import Artefact
from builders.annotators.controlnet import OPENPOSE, SizedParams, check_precision, fit, quiet
from builders.annotators.layouts import bare_name
from builders.annotators.model import ModelAnnotator, load_part
from builders.base import SourceImage
from filters.models import CONFIG, PREPROCESSOR, WEIGHTS, Choice, inference, load_pretrained
from schemas.models import ModelParams

KEYPOINTS = (
    *("nose", "neck", "right shoulder", "right elbow", "right wrist", "left shoulder", "left elbow", "left wrist"),
    *("right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle"),
    *("right eye", "left eye", "right ear", "left ear"),
)
# Where COCO's seventeen keypoints (ViTPose) stand among these eighteen; the neck is between the shoulders.
_COCO = (0, 15, 14, 17, 16, 5, 2, 6, 3, 7, 4, 11, 8, 12, 9, 13, 10)
PEOPLE = frozenset({"person", "people", "man", "woman", "boy", "girl", "child", "player", "rider", "pedestrian"})


class PoseParams(SizedParams):
    """`openpose` finds people by itself; its licence is non-commercial. `vitpose` looks into the boxes of people."""

    detector: Literal["openpose", "vitpose"] = "openpose"

    @model_validator(mode="after")
    def _has_full_precision(self) -> PoseParams:
        if self.detector == "openpose":
            check_precision(self)
        return self


class PoseEstimator(ModelAnnotator):
    """Keypoints of all people."""

    name = "pose"
    version = "1"
    Params: ClassVar[type[ModelParams]] = PoseParams
    params: PoseParams
    needs = ("entities",)

    @property
    def files(self) -> tuple[Choice, ...]:
        if self.params.detector == "vitpose":
            return CONFIG, WEIGHTS, PREPROCESSOR
        return OPENPOSE.files

    def annotate(self, images: Sequence[SourceImage]) -> list[Artefact]:
        find = self._vitpose if self.params.detector == "vitpose" else self._openpose
        return [self.found({}, people=[{"keypoints": _plain(each)} for each in find(image)]) for image in images]

    @cached_property
    def _body(self) -> Any:
        return OPENPOSE.load(self.checkpoint, self.params).body_estimation

    def _openpose(self, image: SourceImage) -> list[np.ndarray]:
        """float [18, 3] of each person. The library's own call leaves out the scores."""
        seen, size = fit(image.pixels, self.params.resolution, 1)
        with inference(self.params), quiet():
            candidates, subsets = self._body(np.ascontiguousarray(seen[..., ::-1]))
            bodies = self._body.format_body_result(candidates, subsets)
        absent = (0.0, 0.0, 0.0)
        people = [np.array([(p.x, p.y, p.score) if p else absent for p in body.keypoints]) for body in bodies]
        return [_scaled(person, size, image.pixels.shape) for person in people]

    @cached_property
    def _vit(self) -> tuple[Any, Any]:
        import transformers

        processor = load_part(transformers.AutoImageProcessor, self.checkpoint, self.params)
        return load_pretrained(transformers.VitPoseForPoseEstimation, self.params), processor

    def _vitpose(self, image: SourceImage) -> list[np.ndarray]:
        boxes = [entity.box for entity in image.record.entities if is_person(entity.label or entity.phrase)]
        if not boxes:
            return []
        model, processor = self._vit
        sized = np.array([(x0, y0, x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes], np.float32)
        inputs = processor(image.pixels.copy(), boxes=[sized], return_tensors="pt", input_data_format="channels_last")
        several = {"dataset_index": inputs["pixel_values"].new_zeros(len(boxes)).long()}  # 0 of ViTPose+ is COCO
        experts = several if model.config.backbone_config.num_experts > 1 else {}
        with inference(self.params) as device:
            options = {name: value.to(device) for name, value in experts.items()}
            outputs = model(inputs["pixel_values"].to(device), **options)
        outputs.heatmaps = outputs.heatmaps.float()
        found = processor.post_process_pose_estimation(outputs, boxes=[sized])[0]
        return [_from_coco(each["keypoints"].numpy(), each["scores"].numpy()) for each in found]


def is_person(name: str) -> bool:
    """Whether a label or phrase ("a smiling woman") names a person by its last word."""
    words = bare_name(name).lower().split()
    return bool(words) and words[-1] in PEOPLE


def _from_coco(xy: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """float [18, 3] from COCO's [17, 2] and [17]."""
    person = np.zeros((len(KEYPOINTS), 3))
    person[list(_COCO)] = np.column_stack([xy, scores])
    right, left = person[2], person[5]
    person[1] = (*(right[:2] + left[:2]) / 2, min(right[2], left[2]))
    return person


def _scaled(person: np.ndarray, seen: tuple[int, int], shape: Sequence[int]) -> np.ndarray:
    """Keypoints in pixels of the photo: pixel centres are at whole numbers on both sides."""
    factor = np.array([shape[1] / seen[1], shape[0] / seen[0]])
    moved = person.copy()
    moved[:, :2] = np.where(person[:, 2:] > 0, (person[:, :2] + 0.5) * factor - 0.5, 0)
    return moved


def _plain(person: np.ndarray) -> list[list[float]]:
    return [[round(float(x), 2), round(float(y), 2), round(float(s), 4)] for x, y, s in person]
