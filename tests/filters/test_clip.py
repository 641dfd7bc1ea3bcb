"""CLIP through open_clip: cosine, embedding, aesthetic score; and what is refused because it would be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file

from filters.models import ModelMissing
from filters.openclip import GOLDEN_TOLERANCE, ClipSource
from filters.scorers.base import ScorerInput
from filters.scorers.clip import Clip, ClipParams, collapse_head
from schemas.codec import encode_jpeg
from schemas.records import Captions
from tests.conftest import CAPTIONS
from tests.filters.scoring import score
from tests.filters.tiny_models import CLIP_WIDTH, aesthetic_layers, cache_as_hub, save_aesthetic, save_clip

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
THREE = ("astronaut", "cat", "coffee")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_aesthetic(tmp_path_factory.mktemp("models") / "aesthetic")


@pytest.fixture(scope="module")
def three(photographs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: photographs[name] for name in THREE}


def params(model: Path | str, **options: object) -> ClipParams:
    return ClipParams.model_validate({"model": str(model), "device": "cpu", **options})


def test_scores_and_embeddings_are_open_clips(three: dict[str, np.ndarray], folder: Path) -> None:
    rows = score(Clip(params(folder)), three, {"astronaut": CAPTIONS["astronaut"], "cat": CAPTIONS["cat"]})
    model, prepare = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    jpeg = Image.fromarray(ScorerInput("", encode_jpeg(three["cat"]), Captions()).pixels)
    with torch.inference_mode():
        image = model.eval().encode_image(prepare(jpeg)[None], normalize=True)[0].numpy()
        text = model.encode_text(tokenizer([CAPTIONS["cat"]]), normalize=True)[0].numpy()
    np.testing.assert_allclose(rows["cat"]["clip_embedding"], image, atol=1e-3)
    assert rows["cat"]["clip_score"] == pytest.approx(float(image @ text), abs=2e-5)
    assert rows["astronaut"]["clip_score"] != rows["cat"]["clip_score"]
    assert rows["coffee"]["clip_score"] is None and rows["coffee"]["clip_tokens"] is None
    assert "aesthetic" not in rows["cat"]


def test_no_captions_at_all(three: dict[str, np.ndarray], folder: Path) -> None:
    assert all(row["clip_score"] is None for row in score(Clip(params(folder)), three).values())


def test_half_precision_changes_scores_a_little(three: dict[str, np.ndarray], folder: Path) -> None:
    exact, half = (score(Clip(params(folder, dtype=dtype)), three, CAPTIONS) for dtype in ("float32", "bfloat16"))
    difference = max(abs(exact[name]["clip_score"] - half[name]["clip_score"]) for name in three)
    assert 0 < difference < 0.01


def test_the_caption_is_one_that_the_model_can_read(three: dict[str, np.ndarray], folder: Path) -> None:
    clip, data = Clip(params(folder)), encode_jpeg(three["cat"])
    long, short = "a tabby cat on a red carpet " * 20, "a tabby cat"

    def scored(**captions: str) -> tuple[float, int]:
        row = clip.score([ScorerInput("cat", data, Captions(**captions))])[0]
        return row["clip_score"], row["clip_tokens"]

    assert scored(long=long, short=short) == scored(short=short)
    assert scored(long=short, short="cat")[1] == 5
    assert scored(long=long) == (scored(long=long + "and more")[0], 20 * 7 + 2)


def test_the_aesthetic_score_is_the_layered_heads(three: dict[str, np.ndarray], folder: Path, head: Path) -> None:
    clip = Clip(params(folder, aesthetic={"model": str(head)}))
    rows = score(clip, three)
    layers = aesthetic_layers(CLIP_WIDTH)
    with torch.inference_mode():
        for row in rows.values():
            expected = layers(torch.from_numpy(row["clip_embedding"].astype(np.float32)))
            assert row["aesthetic"] == pytest.approx(float(expected), abs=1e-3)
    assert clip.provenance.keys() == {"model", "revision", "aesthetic_model", "aesthetic_revision"}


def test_the_head_of_vit_l_collapses_exactly() -> None:
    layers = aesthetic_layers(768)
    weight, bias = collapse_head({f"layers.{name}": tensor for name, tensor in layers.state_dict().items()})
    points = torch.nn.functional.normalize(torch.randn(64, 768, generator=torch.Generator().manual_seed(0)))
    with torch.inference_mode():
        np.testing.assert_allclose(points.numpy() @ weight + bias, layers(points)[:, 0], rtol=0, atol=1e-5)


def test_a_head_for_another_clip_is_refused(folder: Path, tmp_path: Path, three: dict[str, np.ndarray]) -> None:
    clip = Clip(params(folder, aesthetic={"model": str(save_aesthetic(tmp_path / "l14", 768))}))
    with pytest.raises(ModelMissing, match=r"aesthetic\.model: .* reads 768 values .* has 24"):
        score(clip, three)
    save_file(
        {"layers.0.weight": torch.ones(3, CLIP_WIDTH), "layers.0.bias": torch.ones(3)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(ModelMissing, match="no stack of linear layers"):
        score(Clip(params(folder, aesthetic={"model": str(tmp_path / "x.safetensors")})), three)


@pytest.mark.parametrize(
    ("model", "pretrained", "remedy"),
    [("ViT-L-14", "openai", "ViT-L-14-quickgelu"), ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", "is neither a file")],
)
def test_open_clips_quick_gelu_trap_is_an_error(model: str, pretrained: str, remedy: str) -> None:
    with pytest.raises(ModelMissing, match=remedy):
        Clip(params(model, pretrained=pretrained)).preflight()


def test_a_copy_of_openai_weights_needs_quick_gelu_too(tmp_path: Path) -> None:
    with pytest.raises(ModelMissing, match="trained with QuickGELU, and the model would be built without"):
        Clip(params(save_clip(tmp_path / "vit_tiny.openai"))).preflight()
    Clip(params(save_clip(tmp_path / "right" / "vit_tiny.openai", quick_gelu=True))).preflight()


def test_a_golden_cosine_tells_the_activations_apart(tmp_path: Path) -> None:
    right, wrong = (save_clip(tmp_path / str(quick), quick_gelu=quick) for quick in (True, False))
    golden = ClipSource(params(right)).load().golden_cosine()
    ClipSource(params(right, golden_cosine=golden + GOLDEN_TOLERANCE / 2)).load()
    with pytest.raises(ModelMissing, match=r"golden_cosine: .*QuickGELU"):
        ClipSource(params(wrong, golden_cosine=golden)).load()


def test_weights_of_a_named_architecture_come_from_a_file(
    three: dict[str, np.ndarray], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    named = Clip(params("tiny-clip", pretrained=str(folder / "open_clip_model.safetensors")))
    captions = {"cat": CAPTIONS["cat"]}
    assert (
        score(named, three, captions)["cat"]["clip_score"]
        == score(Clip(params(folder)), three, captions)["cat"]["clip_score"]
    )
    assert named.provenance["revision"].startswith("sha256:")


def test_a_pinned_hub_model_loads_from_the_cache(
    three: dict[str, np.ndarray], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    clip = Clip(params("laion/clip-tiny", revision=COMMIT))
    with pytest.raises(ModelMissing, match="hf download laion/clip-tiny --revision"):
        clip.preflight()
    cache_as_hub(folder, tmp_path, "laion/clip-tiny", COMMIT)
    captions = {"cat": CAPTIONS["cat"]}
    assert (
        score(clip, three, captions)["cat"]["clip_score"]
        == score(Clip(params(folder)), three, captions)["cat"]["clip_score"]
    )
    assert clip.provenance == {"model": "laion/clip-tiny", "revision": COMMIT}


def test_what_is_missing_is_named_before_anything_loads(tmp_path: Path) -> None:
    with pytest.raises(ModelMissing, match=r"no open_clip_\*\.safetensors"):
        Clip(params(save_clip(tmp_path / "empty", weights=False))).preflight()
    with pytest.raises(ModelMissing, match="open_clip knows no such model"):
        Clip(params("ViT-Z-99", pretrained="openai")).preflight()
    with pytest.raises(ModelMissing, match=r"neither a file nor a tag of 'ViT-L-14' .*laion2b"):
        Clip(params("ViT-L-14", pretrained="no-such-tag")).preflight()


@pytest.mark.parametrize("given", [{"model": "ViT-L-14"}, {"model": "/models/clip", "pretrained": "openai"}])
def test_weights_are_named_exactly_once(given: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="pretrained: "):
        ClipParams.model_validate(given)
