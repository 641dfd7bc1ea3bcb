"""Runs on an object store, and storage that fails for a while or for good."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fine_tune.checkpoint import BackgroundSaver, find_checkpoints, load_checkpoint, open_part
from fine_tune.export import export_run
from fine_tune.layouts import load_transformer
from fine_tune.metrics import read_metrics
from fine_tune.presets import Config, override
from fine_tune.shards import split_by_size
from fine_tune.state import build_state
from fine_tune.storage import Location, RunFolder, StorageError
from fine_tune.train import train
from tests.files import FlakyFileSystem

RUN = "flaky://bucket/run"


@pytest.fixture(autouse=True)
def _empty_store() -> Iterator[None]:
    """A working store without anything in it, before and after."""
    for _ in range(2):
        FlakyFileSystem.store.clear()
        FlakyFileSystem.pseudo_dirs[:] = [""]
        FlakyFileSystem.fail(every=0)
        shutil.rmtree(RunFolder(RUN, 1).live)
        if _ == 0:
            yield


def test_a_write_that_fails_for_a_while_is_made_in_the_end() -> None:
    place = Location("flaky://bucket/some.json", patience_s=30)
    FlakyFileSystem.fail(every=2)
    for number in range(3):
        place.write_json({"a": number})
        assert place.read_json() == {"a": number}
    assert FlakyFileSystem.failures == 5


def test_storage_that_fails_for_good_is_one_error_in_time() -> None:
    FlakyFileSystem.fail(every=1)
    with pytest.raises(StorageError, match=r"flaky://bucket/some\.json: storage kept failing .*503"):
        Location("flaky://bucket/some.json", patience_s=0.6).write_json({})
    with pytest.raises(FileNotFoundError):
        Location("memory://nothing/here.json", patience_s=60).read()


def test_a_file_that_holds_something_else_than_was_written_is_not_accepted(tmp_path: Path) -> None:
    place = Location(str(tmp_path / "file"), patience_s=0.1)

    def check() -> None:
        raise OSError("other bytes")

    with pytest.raises(StorageError, match="other bytes"):
        place.write(lambda stream: stream.write(b"bytes"), check)


def test_a_run_lives_on_an_object_store_though_it_fails_now_and_then(
    small_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = small_config("steps=2", "ema_decay=0.9", f"folder={RUN}", "storage_patience=60")
    whole = small_config("steps=3", "ema_decay=0.9", f"folder={tmp_path / 'whole'}")
    train(whole)

    FlakyFileSystem.fail(every=10)
    saved = train(config)
    assert FlakyFileSystem.failures > 1
    assert str(saved) == f"{RUN}/checkpoints/step-00000002"
    shutil.rmtree(RunFolder(RUN, 1).live)  # on another machine
    train(override(config, ["steps=3"]))

    live = RunFolder(RUN, 1)
    live.fetch("metrics.jsonl")
    losses = [
        [line["loss"] for line in read_metrics(folder / "metrics.jsonl")] for folder in (live.live, tmp_path / "whole")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    kept = [place.name for place in Location(RUN).list()]
    assert kept == ["checkpoints", "config.json", "data.json", "index", "loss.png", "metrics.jsonl"]
    for average in (False, True):
        models = [
            load_transformer(export_run(run, tmp_path / f"{average}{number}", average=average)).state_dict()
            for number, run in enumerate((RUN, str(tmp_path / "whole")))
        ]
        assert all(torch.equal(models[0][name], tensor) for name, tensor in models[1].items())


def test_storage_that_breaks_down_leaves_the_last_good_checkpoint(small_config: Callable[..., Config]) -> None:
    config = small_config("steps=1", f"folder={RUN}", "storage_patience=0.6")
    first = train(config)
    FlakyFileSystem.fail(every=1)
    with pytest.raises(StorageError, match="storage kept failing"):
        train(override(config, ["steps=2"]))
    FlakyFileSystem.fail(every=0)
    assert find_checkpoints(RUN) == [first]
    assert train(override(config, ["steps=2"])).name == "step-00000002"


def test_a_checkpoint_written_beside_training_is_of_the_moment_it_was_asked_for(
    small_config: Callable[..., Config], tmp_path: Path
) -> None:
    state = build_state(small_config("ema_decay=0.9"))
    for parameter in state.trained.values():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    state.step = 1
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    saver = BackgroundSaver()
    target = saver.save(tmp_path, state, {"digest": ""}, keep=2)
    with torch.no_grad():
        for parameter in state.trained.values():
            parameter.zero_()
    saver.wait()
    assert find_checkpoints(tmp_path) == [target]
    load_checkpoint(target, state, "")
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.model.state_dict().items())
    assert open_part(target, "average").pieces.keys() == state.trained.keys()


def test_a_failure_beside_training_is_raised_when_the_next_checkpoint_is_due(
    small_config: Callable[..., Config],
) -> None:
    state = build_state(small_config())
    state.step = 1
    saver = BackgroundSaver()
    FlakyFileSystem.fail(every=1)
    target = saver.save(Location(RUN, patience_s=0.1), state, {"digest": ""}, keep=1)
    with pytest.raises(StorageError):
        saver.wait()
    saver.wait()
    FlakyFileSystem.fail(every=0)
    assert not find_checkpoints(RUN)
    saver.save(Location(RUN, patience_s=0.1), state, {"digest": ""}, keep=1)
    saver.wait()
    assert find_checkpoints(RUN) == [target]


def test_files_of_an_export_hold_whole_blocks() -> None:
    sizes = {"embed": 3, "layers.0.a": 2, "layers.0.b": 2, "layers.1.a": 2, "layers.1.b": 2, "out": 1}
    assert list(split_by_size(sizes, 7)) == [["embed", "layers.0.a", "layers.0.b"], ["layers.1.a", "layers.1.b", "out"]]
    assert list(split_by_size(sizes, 3)) == [
        ["embed"],
        ["layers.0.a", "layers.0.b"],
        ["layers.1.a", "layers.1.b"],
        ["out"],
    ]
