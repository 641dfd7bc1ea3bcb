"""Checkpoints against the libraries that read and write them: diffusers, transformers, safetensors, peft."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import OmniGenTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM, Phi3Model

from fine_tune import layouts
from fine_tune.layouts import CheckpointError
from fine_tune.model import OmniGen, OmniGenConfig
from fine_tune.packing import Sequence, pack

CONFIG = OmniGenConfig(
    hidden_size=96,
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=112,
    num_layers=2,
    vocab_size=70,
    pad_token_id=0,
    max_position_embeddings=2048,
    original_max_position_embeddings=64,
    rope_scaling={"short_factor": [1.0] * 12, "long_factor": [2.0] * 12, "type": "su"},
    pos_embed_max_size=12,
    time_step_dim=32,
)
SEQUENCE = Sequence(np.arange(1, 10), [(2, 6)], [(2, 2)], (3, 4))


def velocity(model: OmniGen) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    inputs, noisy = torch.randn(4, 4, 4, generator=generator), torch.randn(4, 6, 8, generator=generator)
    return model(pack([SEQUENCE], None, 64), [inputs], [noisy], torch.tensor([0.4]))[0]


@pytest.fixture
def model() -> OmniGen:
    torch.manual_seed(0)
    return OmniGen(CONFIG)


def assert_bitwise(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key


def test_official_keys_round_trip_bitwise(model: OmniGen) -> None:
    state = model.state_dict()
    official = layouts.to_official(state)
    assert set(official) == {
        "pos_embed",
        *(f"{name}.proj.{kind}" for name in ("x_embedder", "input_x_embedder") for kind in ("weight", "bias")),
        *(
            f"{name}.mlp.{layer}.{kind}"
            for name in ("time_token", "t_embedder")
            for layer in (0, 2)
            for kind in ("weight", "bias")
        ),
        *(f"final_layer.{name}.{kind}" for name in ("adaLN_modulation.1", "linear") for kind in ("weight", "bias")),
        "llm.embed_tokens.weight",
        "llm.norm.weight",
        *(
            f"llm.layers.{layer}.{name}.weight"
            for layer in range(2)
            for name in (
                "input_layernorm",
                "self_attn.qkv_proj",
                "self_attn.o_proj",
                "post_attention_layernorm",
                "mlp.gate_up_proj",
                "mlp.down_proj",
            )
        ),
    }
    fused = official["llm.layers.1.self_attn.qkv_proj.weight"]
    assert torch.equal(fused[96:192], state["layers.1.self_attn.to_k.weight"])
    assert_bitwise(layouts.from_official(official), state)
    assert_bitwise(layouts.to_official(layouts.from_official(official)), official)


def test_grouped_query_heads_split_unevenly() -> None:
    state = OmniGen(dataclasses.replace(CONFIG, num_key_value_heads=2)).state_dict()
    assert state["layers.0.self_attn.to_k.weight"].shape == (48, 96)
    assert_bitwise(layouts.from_official(layouts.to_official(state)), state)


def test_diffusers_loads_what_we_save(model: OmniGen, tmp_path: Path) -> None:
    layouts.save_transformer(tmp_path, CONFIG, model.state_dict())
    theirs, info = OmniGenTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_bitwise(theirs.state_dict(), model.state_dict())
    ours = {key: value for key, value in CONFIG.to_dict().items() if not key.startswith("_")}
    assert {key: theirs.config[key] for key in ours} == ours


@pytest.mark.parametrize("shard_size", ["10GB", "100KB"])
def test_we_load_what_diffusers_saves(shard_size: str, tmp_path: Path) -> None:
    values = {key: value for key, value in CONFIG.to_dict().items() if not key.startswith("_")}
    theirs = OmniGenTransformer2DModel(**values)
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size=shard_size)
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").exists() == (shard_size == "10GB")
    for folder in (tmp_path, tmp_path / "transformer"):
        loaded = layouts.load_transformer(folder)
        assert loaded.config == CONFIG
        assert_bitwise(loaded.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("file", ["model.safetensors", "model.pt"])
def test_official_layout_round_trip(model: OmniGen, file: str, tmp_path: Path) -> None:
    layouts.save_official(tmp_path, CONFIG, model.state_dict())
    if file == "model.pt":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / file)
        (tmp_path / "model.safetensors").unlink()
    loaded = layouts.load_transformer(tmp_path)
    assert loaded.config == CONFIG
    assert_bitwise(loaded.state_dict(), model.state_dict())


def test_loaded_dtype_and_independence_of_the_file(model: OmniGen, tmp_path: Path) -> None:
    layouts.save_transformer(tmp_path, CONFIG, model.state_dict())
    half = layouts.load_transformer(tmp_path, torch.bfloat16)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}
    trained = layouts.load_transformer(tmp_path)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    assert_bitwise(layouts.load_transformer(tmp_path).state_dict(), model.state_dict())


def phi3_config() -> Phi3Config:
    rope = CONFIG.rope_scaling | {"type": "longrope", "rope_type": "longrope", "rope_theta": 10000.0}
    return Phi3Config(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.hidden_size,
        intermediate_size=CONFIG.intermediate_size,
        num_hidden_layers=CONFIG.num_layers,
        num_attention_heads=CONFIG.num_attention_heads,
        max_position_embeddings=CONFIG.max_position_embeddings,
        original_max_position_embeddings=64,
        eos_token_id=1,
        pad_token_id=0,
        rope_parameters=rope | {"original_max_position_embeddings": 64},
    )


@pytest.mark.parametrize(("kind", "shard_size"), [(Phi3Model, "1GB"), (Phi3ForCausalLM, "100KB")])
def test_phi3_init_is_phi3(kind: type, shard_size: str, tmp_path: Path) -> None:
    """Our blocks compute the keys and values that transformers' Phi-3 does from the same folder."""
    torch.manual_seed(1)
    language_model = kind(phi3_config())
    for parameter in language_model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    language_model.save_pretrained(tmp_path, max_shard_size=shard_size)
    phi3 = Phi3Model.from_pretrained(tmp_path).eval()
    ours = layouts.from_phi3(tmp_path, torch.Generator().manual_seed(0), pos_embed_max_size=12, time_step_dim=32)
    assert ours.config == CONFIG

    ids = torch.arange(1, 30)
    cache = ours.encode_condition(pack([Sequence(ids, [], [], (1, 1))], None, 64), [])
    with torch.no_grad():
        expected = phi3(ids[None], use_cache=True).past_key_values.layers
    for (keys, values), layer in zip(cache.layers, expected, strict=True):
        torch.testing.assert_close(keys, layer.keys[0].transpose(0, 1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values, layer.values[0].transpose(0, 1), atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.norm.weight, phi3.norm.weight)
    assert torch.equal(ours.layers[-1].mlp.down_proj.weight, phi3.layers[-1].mlp.down_proj.weight)


def test_phi3_init_of_the_new_parts(tmp_path: Path) -> None:
    Phi3Model(phi3_config()).save_pretrained(tmp_path)

    def start(seed: int, **kwargs: int) -> OmniGen:
        return layouts.from_phi3(tmp_path, torch.Generator().manual_seed(seed), pos_embed_max_size=12, **kwargs)

    first = start(0)
    assert not velocity(first).any()  # the output layer starts at zero
    assert_bitwise(start(0).state_dict(), first.state_dict())
    other = start(1).state_dict()
    changed = {key for key, tensor in first.state_dict().items() if not torch.equal(tensor, other[key])}
    assert changed == {
        *(f"patch_embedding.{name}_image_proj.weight" for name in ("input", "output")),
        *(f"{name}.linear_{layer}.weight" for name in ("time_token", "t_embedder") for layer in (1, 2)),
    }
    grown = start(0, vocab_size=80)
    assert torch.equal(grown.embed_tokens.weight[:70], first.embed_tokens.weight)
    assert 0.01 < grown.embed_tokens.weight[70:].std() < 0.03
    with pytest.raises(ValueError, match="vocab_size 60 is smaller than the 70 rows"):
        start(0, vocab_size=60)


def test_wrong_checkpoints_are_explained(model: OmniGen, tmp_path: Path) -> None:
    state = dict(model.state_dict())
    for layer in range(2):
        for part in "qk":
            del state[f"layers.{layer}.self_attn.to_{part}.weight"]
    state |= {"layers.7.extra": torch.zeros(1), "norm.weight": torch.zeros(5)}
    layouts.save_transformer(tmp_path / "broken", CONFIG, model.state_dict())
    save_file(state, tmp_path / "broken" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError) as error:
        layouts.load_transformer(tmp_path / "broken")
    with pytest.raises(CheckpointError) as refused:
        layouts.save_transformer(tmp_path / "never written", CONFIG, state)
    assert not (tmp_path / "never written").exists()
    assert (
        str(refused.value)
        == str(error.value)
        == (
            "the checkpoint does not fit the model; 4 missing: layers.0.self_attn.to_k.weight, "
            "layers.0.self_attn.to_q.weight, layers.1.self_attn.to_k.weight, ...; 1 unexpected: layers.7.extra; "
            "1 mis-shaped: norm.weight is [5], not [96]"
        )
    )

    Phi3Model(phi3_config()).save_pretrained(tmp_path / "phi3")
    with pytest.raises(CheckpointError, match="holds no OmniGen model; if it is a Phi-3, start with from_phi3"):
        layouts.load_transformer(tmp_path / "phi3")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds neither transformer/config.json nor config.json"):
        layouts.load_transformer(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub id"):
        layouts.load_transformer(tmp_path / "absent")
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(ValueError, match="describes a FluxTransformer2DModel"):
        layouts.load_transformer(tmp_path / "flux")
    (tmp_path / "broken" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks diffusion_pytorch_model\.safetensors"):
        layouts.load_transformer(tmp_path / "broken")


def test_pickled_code_is_not_run(model: OmniGen, tmp_path: Path) -> None:
    layouts.save_official(tmp_path, CONFIG, model.state_dict())
    (tmp_path / "model.safetensors").unlink()
    torch.save({"pos_embed": Path("/")}, tmp_path / "model.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.?only"):
        layouts.load_transformer(tmp_path)


def test_hub_ids_are_taken_from_the_cache(model: OmniGen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub id resolves through huggingface_hub; here offline, from a cache as it lays one out."""
    repository = tmp_path / "models--someone--omnigen"
    layouts.save_transformer(repository / "snapshots" / "0123abc" / "transformer", CONFIG, model.state_dict())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_bitwise(layouts.load_transformer("someone/omnigen").state_dict(), model.state_dict())
