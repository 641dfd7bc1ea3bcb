"""Settings, the check before a run, and the commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from fine_tune.check import check
from fine_tune.presets import PRESETS, Config, ConfigError, override, preset
from fine_tune.state import build_state
from pipelines.cli import app

# Settings.


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_being_written_down(name: str) -> None:
    config = preset(name)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_settings_are_changed_by_name() -> None:
    config = preset(
        "tiny", ["lr=1e-4", "data.mixture.edit=0.3", "run.folder=/x", "adapter_targets=[to_q]", "ema_decay=.9"]
    )
    assert (config.optim.lr, config.data.mixture["edit"], config.run.folder) == (1e-4, 0.3, "/x")
    assert (config.model.adapter_targets, config.optim.ema_decay) == (("to_q",), 0.9)
    assert config.data.mixture["subject"] == 0.2


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("learning_rate=1", "unknown setting 'learning_rate'"),
        ("lrr=1", "did you mean optim.lr"),
        ("data.max_sid=64", r"did you mean data\.max_side"),
        ("lr", "not of the form key=value"),
        ("steps=many", "run.steps: Input should be a valid integer"),
        ("adapter=lorra", "model.adapter: Input should be 'none', 'lora' or 'dora'"),
        ("max_side=100", "not a multiple of 16"),
        ("dtype=bfloat16", "loses most of its updates"),
        ("name=adamw_sr", "for model.dtype=bfloat16"),
        ("lr.x=1", "has no entries"),
        ("packs_per_step=0", "at least 1"),
    ],
)
def test_wrong_settings_are_refused_with_a_hint(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preset("tiny", [assignment])
    with pytest.raises(ConfigError, match="did you mean tiny"):
        preset("tinny")


# The check.


def test_a_good_corpus(small_config: Callable[..., Config]) -> None:
    report = check(small_config())
    assert report.is_good and report.left_out.total == report.bad.total == 0
    assert report.seen == sum(stream.samples for stream in report.streams) == 24
    for stream in report.streams:
        assert sum(stream.target_sizes.values()) == stream.samples == 4
        assert all(max(size) <= 64 for size in stream.target_sizes)
        assert stream.tokens[0] <= stream.tokens[1] <= 320
        assert stream.realised == pytest.approx(stream.requested, abs=0.01)
    assert 0.8 < report.fill <= 1


def test_every_bad_sample_is_found_and_named(
    small_config: Callable[..., Config], photo_corpus: Path, tmp_path: Path
) -> None:
    path = tmp_path / "corpus"
    shutil.copytree(photo_corpus, path)
    row = pq.read_table(path / "meta/samples/edit-000000.parquet").slice(1, 1).to_pylist()[0]
    shard = path / row["shard"]
    data = bytearray(shard.read_bytes())
    start = row["members"][0]["offset"]
    data[start : start + row["members"][0]["size"]] = bytes(row["members"][0]["size"])
    shard.write_bytes(data)
    config = small_config(f"corpus={path}", "budget=80")
    report = check(config)
    assert [(skip.key, skip.shard) for skip in report.bad.examples] == [(row["key"], row["shard"])]
    assert report.left_out.counts["too long"] > 0
    assert not report.is_good
    assert check(replace(config, data=replace(config.data, max_skip_rate=0.5))).is_good

    result = CliRunner().invoke(app, ["check", str(path), "max_side=64", "budget=80"])
    assert result.exit_code == 1
    assert f"{row['shard']}:{row['key']}" in result.stdout
    assert "a run would stop" in result.stdout


def test_commands_train_export_and_sample(small_config: Callable[..., Config], tmp_path: Path) -> None:
    runner, run, model = CliRunner(), tmp_path / "run", tmp_path / "model"
    config = small_config()
    settings = [f"architecture={config.model.architecture}", "max_side=64", "budget=320", "steps=1", "save_every=0"]
    quiet = ["held_out_samples=0", "tensorboard=false", "log_every=1", "device=cpu"]
    options = ["--corpus", config.data.corpus, "--run", str(run)]
    result = runner.invoke(app, ["train", *options, *settings, *quiet])
    assert result.exit_code == 0, result.output
    assert "saved" in result.stdout and "step 1/1" in result.stdout
    assert runner.invoke(app, ["export", str(run), "--format", "diffusers", "--out", str(model)]).exit_code == 0
    Image.new("RGB", (64, 64), "red").save(tmp_path / "in.png")
    size = ["--height", "32", "--width", "32", "--steps", "2", "--out", str(tmp_path / "out.png")]
    prompt = ["--prompt", "<img><|image_1|></img> Make it blue.", "--image", str(tmp_path / "in.png")]
    result = runner.invoke(app, ["sample", "--model", str(model), *prompt, *size])
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (32, 32)

    for arguments, message in (
        (["train", *options, *settings, *quiet, "lr=1"], "--force"),
        (["train", *options, "stepps=1"], "did you mean run.steps"),
        (["train"], "no corpus"),
        (["check", str(tmp_path)], "not a corpus"),
        (["sample", "--model", str(model), "--prompt", "<img><|image_1|></img>", *size], "placeholder"),
    ):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 2, result.output
        assert message in result.output
    assert override(config, []) == config


@pytest.mark.parametrize("part", ["vae", "tokenizer"])
def test_a_part_of_the_model_that_is_not_there_is_named(
    small_config: Callable[..., Config], tmp_path: Path, part: str
) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{part}: {tmp_path} cannot be loaded: "):
        build_state(small_config(f"model.{part}={tmp_path}"))
