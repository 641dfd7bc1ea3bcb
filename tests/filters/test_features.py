"""Feature vectors: by the packaged network, by transformers, by a TorchScript file."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModel

from filters.models import ModelMissing
from filters.scorers.base import ScorerInput
from filters.scorers.features import Features, FeaturesParams
from schemas.codec import encode_jpeg
from schemas.records import Captions
from tests.filters.scoring import Rows, score
from tests.filters.tiny_models import save_classifier, save_clip, save_dinov2, save_torchscript

THREE = ("astronaut", "cat", "coffee")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def three(photographs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: photographs[name] for name in THREE}


def features(model: Path, **options: object) -> Features:
    return Features(FeaturesParams.model_validate({"model": str(model), "device": "cpu", **options}))


def cosine(rows: Rows, a: str, b: str) -> float:
    one, other = (rows[name]["features_embedding"].astype(np.float32) for name in (a, b))
    return float(one @ other)


def test_the_packaged_network_knows_a_photograph_again(photographs: dict[str, np.ndarray]) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra `offline`")
    edited = {}
    for name in THREE:
        pixels = photographs[name]
        edited[name] = pixels
        edited[f"{name}, edited"] = cv2.convertScaleAbs(np.ascontiguousarray(pixels[8:-8, 8:-8, :]), alpha=1.1, beta=5)
    rows = score(Features(FeaturesParams(device="cpu")), edited)
    same = [cosine(rows, name, f"{name}, edited") for name in THREE]
    other = [cosine(rows, a, b) for a in THREE for b in THREE if a < b]
    assert min(same) > 0.8, same
    assert max(other) < 0.6, other


@pytest.mark.parametrize("pool", ["pooler", "cls", "mean"])
def test_transformers_encoders_are_pooled_as_asked(pool: str, three: dict[str, np.ndarray], models: Path) -> None:
    folder = save_dinov2(models / f"dinov2-{pool}")
    encoder = features(folder, pool=pool)
    found = score(encoder, three)["cat"]["features_embedding"]
    model, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    jpeg = ScorerInput("", encode_jpeg(three["cat"]), Captions()).pixels
    with torch.inference_mode():
        output = model(**processor(jpeg, return_tensors="pt"))
    tokens = output.last_hidden_state[0]
    expected = {"pooler": output.pooler_output[0], "cls": tokens[0], "mean": tokens.mean(0)}[pool]
    np.testing.assert_allclose(found, torch.nn.functional.normalize(expected, dim=0), atol=2e-3)


def test_a_pooler_that_was_never_trained_is_refused(three: dict[str, np.ndarray], models: Path) -> None:
    folder = save_classifier(models / "vit", ["a", "b"])
    with pytest.raises(ModelMissing, match="no weights for pooler"):
        score(features(folder), three)
    score(features(folder, pool="cls"), three)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # the format in which SSCD is published
def test_a_torchscript_file(three: dict[str, np.ndarray], models: Path) -> None:
    path = save_torchscript(models / "sscd.torchscript.pt", width=8)
    rows = score(features(path, side=64), three)
    assert cosine(rows, "cat", "coffee") < 0.9999
    broken = models / "broken.pt"
    broken.write_bytes(b"not a model")
    with pytest.raises(ModelMissing, match="is no TorchScript file"):
        score(features(broken), three)


def test_what_is_no_image_encoder_is_found_at_preflight(models: Path) -> None:
    with pytest.raises(ModelMissing, match=r"there is no .*absent\.pt"):
        features(models / "absent.pt").preflight()
    with pytest.raises(ModelMissing, match=r"no config\.json, no preprocessor_config\.json"):
        features(save_clip(models / "clip")).preflight()
    folder = save_dinov2(models / "changed")
    (folder / "config.json").write_text('{"model_type": "clip", "projection_dim": 512}')
    with pytest.raises(ModelMissing, match="no image encoder"):
        features(folder).preflight()
