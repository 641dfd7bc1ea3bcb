"""A run that was killed and resumed is bit for bit the run that was not."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fine_tune.checkpoint import ResumeError, find_checkpoints, open_part
from fine_tune.index import Corpus, CountRule, open_index
from fine_tune.metrics import read_metrics
from fine_tune.order import Plan, stream_shares
from fine_tune.presets import Config, override
from fine_tune.storage import Location
from fine_tune.tokens import Tokenizer
from fine_tune.train import train

SCRIPT = """
import json, sys
from fine_tune.presets import Config
from fine_tune.train import train
train(Config.from_dict(json.loads(sys.argv[1])))
"""


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(run / "metrics.jsonl")]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return saved(run, "transformer")


def saved(run: Path, part: str) -> dict[str, torch.Tensor]:
    reader = open_part(find_checkpoints(run)[-1], part)
    return {name: reader.tensor(name) for name in reader.pieces}


def epochs_of(config: Config, packs: range) -> set[int]:
    tokenizer = Tokenizer.from_pretrained(config.model.tokenizer)
    rule = CountRule(tokenizer, config.data.max_side, config.data.budget)
    index = open_index(Corpus(config.data.corpus), "train", rule)
    plan = Plan(
        index, stream_shares(index, config.data.mixture), config.data.seed, config.data.budget, config.data.block
    )
    return {draw.epoch for number in packs for draw in plan.pack(number)}


def start(config: Config) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, json.dumps(config.to_dict())], cwd=Path(__file__).parents[2])


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not any(done >= step for done, *_ in losses(run)):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be stopped"
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_and_resumed_is_the_same_run(small_config: Callable[..., Config], tmp_path: Path) -> None:
    """Losses, gradients, weights and averages, with two packs per step, dropout of conditions and a cosine schedule."""
    config = small_config(
        "steps=10", "save_every=3", "packs_per_step=2", "schedule=cosine", "ema_decay=0.9", "block=32"
    )
    whole = replace(config, run=replace(config.run, folder=str(tmp_path / "whole")))
    train(whole)
    assert len(epochs_of(config, range(6))) > 1 < len(epochs_of(config, range(6, 20))), "both parts cross an epoch"

    process = start(config)
    run = Path(config.run.folder)
    wait_for_step(run, 5, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert find_checkpoints(run)[0].name == "step-00000003"
    train(config)

    assert losses(run) == losses(tmp_path / "whole")
    assert [step for step, *_ in losses(run)] == list(range(1, 11))
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(run)[name], tensor), name
    averages = [saved(path, "average") for path in (run, tmp_path / "whole")]
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[1])


def test_asked_to_stop_it_saves_the_step_it_is_at(small_config: Callable[..., Config]) -> None:
    run = Path(small_config().run.folder)
    finished = threading.Event()

    def ask() -> None:
        while not losses(run) and not finished.wait(0.01):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        checkpoint = train(small_config("steps=500"))
    finally:
        finished.set()
        asking.join()
    last = losses(run)[-1][0]
    assert last < 500
    assert find_checkpoints(run) == [checkpoint] == [Location.of(run / "checkpoints" / f"step-{last:08d}")]


def test_a_finished_run_stays_as_it_is_and_can_be_prolonged(small_config: Callable[..., Config]) -> None:
    config = small_config("steps=2")
    run = Path(config.run.folder)
    first = train(config)
    before = weights(run)
    assert train(config) == first
    assert all(torch.equal(weights(run)[name], tensor) for name, tensor in before.items())
    assert train(override(config, ["steps=3"])).name == "step-00000003"
    assert [step for step, *_ in losses(run)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("lr=0.5", "optim.lr was 0.001, now is 0.5"),
        ("mixture.edit=0.9", "data.mixture.edit"),
        ("data.seed=9", "data.seed"),
        ("weight_mode=none", "flow.weight_mode"),
        ("max_side=48", "the corpus has other samples"),
    ],
)
def test_other_settings_are_refused_unless_forced(
    small_config: Callable[..., Config], change: str, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config("steps=1")
    train(config)
    changed = override(config, [change, "steps=2"])
    with pytest.raises(ResumeError, match=named):
        train(changed)
    with caplog.at_level(logging.WARNING):
        assert train(changed, force=True).name == "step-00000002"
    assert named in caplog.text


@pytest.mark.parametrize(
    "change", ["workers=1", "gradient_checkpointing=full", "save_every=7", "attention_backend=sdpa"]
)
def test_settings_that_change_nothing_learned_are_not_refused(small_config: Callable[..., Config], change: str) -> None:
    config = small_config("steps=1")
    train(config)
    assert train(override(config, [change, "steps=2"])).name == "step-00000002"
