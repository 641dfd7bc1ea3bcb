"""Checkpoints: whole or not there, checked, and readable by others; exports of a run."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from fine_tune.checkpoint import NonFiniteError, find_checkpoints, load_checkpoint, save_checkpoint
from fine_tune.export import export_run
from fine_tune.layouts import CheckpointError, load_transformer
from fine_tune.presets import Config, ConfigError
from fine_tune.sample import Pipeline
from fine_tune.state import TrainState, build_state
from fine_tune.train import train

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
DATA = {"digest": "of the data", "next_pack": 0}


def updated(config: Config) -> TrainState:
    """A state after one update with arbitrary gradients."""
    state = build_state(config)
    for number, parameter in enumerate(state.trained.values()):
        parameter.grad = torch.linspace(-1, number, parameter.numel()).view_as(parameter).to(parameter)
    state.optimizer.step()
    state.step = 1
    return state


def test_what_is_saved_is_a_diffusers_checkpoint(small_config: Callable[..., Config], tmp_path: Path) -> None:
    from diffusers import OmniGenTransformer2DModel

    state = updated(small_config())
    folder = save_checkpoint(tmp_path, state, DATA, keep=1)
    theirs = OmniGenTransformer2DModel.from_pretrained(folder / "transformer").state_dict()
    ours = state.model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


@pytest.mark.parametrize(
    "settings",
    [
        ["ema_decay=0.9"],
        ["adapter=lora"],
        ["dtype=bfloat16", "name=adamw_sr"],
        ["dtype=bfloat16", "offload=true"],
        pytest.param(["dtype=bfloat16", "name=adamw8bit"], marks=needs_torchao),
    ],
)
def test_loading_restores_everything(small_config: Callable[..., Config], tmp_path: Path, settings: list[str]) -> None:
    state = updated(small_config(*settings))
    if state.average is not None:
        state.average.update(0)
    folder = save_checkpoint(tmp_path, state, DATA, keep=1)
    fresh = build_state(small_config(*settings))
    assert load_checkpoint(folder, fresh, "of the data") == DATA
    assert fresh.step == 1
    for name, parameter in state.trained.items():
        assert torch.equal(fresh.trained[name], parameter)
        for key, value in state.optimizer.state[parameter].items():
            restored = fresh.optimizer.state[fresh.trained[name]][key]
            assert torch.equal(torch.as_tensor(restored), torch.as_tensor(value))
            assert torch.as_tensor(restored).dtype == torch.as_tensor(value).dtype
    if state.average is not None and fresh.average is not None:
        assert all(torch.equal(fresh.average.shadow[name], value) for name, value in state.average.shadow.items())


def test_only_the_newest_are_kept_and_remains_of_a_crash_are_no_checkpoint(
    small_config: Callable[..., Config], tmp_path: Path
) -> None:
    state = updated(small_config())
    remains = tmp_path / "checkpoints" / "step-00000003"
    (remains / "transformer").mkdir(parents=True)
    (remains / "transformer" / "shard-00002-of-00002.safetensors").write_bytes(b"half")
    abandoned = tmp_path / "checkpoints" / "step-00000000"
    abandoned.mkdir()
    for state.step in (1, 2, 3):
        save_checkpoint(tmp_path, state, DATA, keep=2)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert not abandoned.exists()
    assert load_checkpoint(find_checkpoints(tmp_path)[-1], build_state(state.config), "of the data") == DATA


@pytest.mark.parametrize("where", ["weight", "moment", "average"])
def test_nothing_that_is_not_finite_is_saved(small_config: Callable[..., Config], tmp_path: Path, where: str) -> None:
    state = updated(small_config("ema_decay=0.9"))
    assert state.average is not None
    name = "layers.1.mlp.down_proj.weight"
    tensors = {
        "weight": state.trained[name].data,
        "moment": state.optimizer.state[state.trained[name]]["exp_avg_sq"],
        "average": state.average.shadow[name],
    }
    tensors[where][0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=name):
        save_checkpoint(tmp_path, state, DATA, keep=1)
    assert not list(tmp_path.iterdir())


def test_tensors_of_another_shape_are_refused(small_config: Callable[..., Config], tmp_path: Path) -> None:
    state = updated(small_config())
    folder = save_checkpoint(tmp_path, state, DATA, keep=1)
    file = Path(folder) / "transformer" / "shard-00001-of-00001.safetensors"
    tensors = load_file(file)
    tensors["proj_out.weight"] = tensors["proj_out.weight"][:-1].clone()
    del tensors["norm.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"1 missing: norm\.weight; 1 mis-shaped: proj_out\.weight"):
        load_checkpoint(folder, build_state(small_config()), "of the data")


def test_nothing_in_a_checkpoint_is_a_pickle(small_config: Callable[..., Config], tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, updated(small_config("ema_decay=0.9")), DATA, keep=1)
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)


def test_torch_reads_it_too(small_config: Callable[..., Config], tmp_path: Path) -> None:
    state = updated(small_config())
    folder = save_checkpoint(tmp_path, state, DATA, keep=1)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.model.state_dict().items()}
    dcp.load(loaded, storage_reader=dcp.HuggingFaceStorageReader(str(folder / "transformer")), no_dist=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.model.state_dict().items())


# Exports.


def test_a_full_run_exports_as_pipeline_and_as_official_model(
    small_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = small_config("steps=2", "ema_decay=0.5")
    checkpoint = train(config)
    run = Path(config.run.folder)
    trained = load_transformer(checkpoint / "transformer").state_dict()
    pipeline = Pipeline.from_pretrained(export_run(run, tmp_path / "pipeline"))
    official = load_transformer(export_run(run, tmp_path / "official", "official"))
    for exported in (pipeline.transformer, official):
        assert all(torch.equal(exported.state_dict()[name], tensor) for name, tensor in trained.items())
    image = pipeline("a cat", height=32, width=48, num_inference_steps=2, seed=0)
    assert image.size == (48, 32)
    averaged = load_transformer(export_run(run, tmp_path / "average", average=True)).state_dict()
    assert not torch.equal(averaged["proj_out.weight"], trained["proj_out.weight"])
    with pytest.raises(ConfigError, match="format peft is for"):
        export_run(run, tmp_path / "peft", "peft")


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_an_adapter_exports_to_peft_and_merged(
    small_config: Callable[..., Config], tmp_path: Path, adapter: str
) -> None:
    from diffusers import OmniGenTransformer2DModel
    from peft import PeftModel

    base = train(small_config("steps=1", f"folder={tmp_path / 'base'}"))
    config = small_config(f"model.source={base}", f"adapter={adapter}", "lr=0.05", "steps=3", "warmup_steps=0")
    train(config)
    run = Path(config.run.folder)
    with pytest.raises(ConfigError, match="--merge"):
        export_run(run, tmp_path / "none")
    merged = load_transformer(export_run(run, tmp_path / "merged", merge=True)).state_dict()
    exported = export_run(run, tmp_path / "peft", "peft")
    model = OmniGenTransformer2DModel.from_pretrained(base / "transformer")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    theirs = PeftModel.from_pretrained(model, exported).merge_and_unload().state_dict()
    changed = [name for name in before if not torch.equal(before[name], merged[name])]
    assert len(changed) == 2 * 6
    for name, tensor in merged.items():
        assert torch.allclose(theirs[name], tensor, atol=1e-6), name


def test_a_run_that_saved_nothing_yet_cannot_be_exported(small_config: Callable[..., Config], tmp_path: Path) -> None:
    config = small_config("steps=1")
    train(config)
    shutil.rmtree(Path(config.run.folder) / "checkpoints")
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        export_run(Path(config.run.folder), tmp_path / "out")


def test_about_says_what_the_checkpoint_is(small_config: Callable[..., Config]) -> None:
    folder = train(small_config("steps=3", "packs_per_step=2"))
    about = (folder / "about.json").read_json()
    assert (about["step"], about["data"]["next_pack"]) == (3, 6)
    assert about["settings"]["optim"]["lr"] == 0.001
