"""Several ranks learn what one does, whatever becomes of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fine_tune.checkpoint import find_checkpoints, open_part
from fine_tune.cluster import train_on_ray
from fine_tune.export import export_run
from fine_tune.index import CorpusError
from fine_tune.layouts import load_transformer
from fine_tune.metrics import read_metrics
from fine_tune.parallel import is_sharded
from fine_tune.presets import Config, ConfigError, override
from fine_tune.train import train
from tests.files import SlowFileSystem

ROOT = Path(__file__).parents[2]
ENDS_WITHIN_S = 300

# Trains with each of the configs in turn; what it prints last is how that ended.
RANKS = """
import json, sys
from fine_tune.parallel import join_torchrun
from fine_tune.presets import Config
from fine_tune.train import train
import tests.files
configs = [Config.from_dict(values) for values in json.loads(sys.argv[1])]
with join_torchrun(configs[0]) as world:
    for config in configs:
        train(config, world=world)
    try:
        with world.together():
            if world.rank == 1:
                raise ValueError("a problem of one rank")
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""


def start(configs: list[Config], ranks: int, **environment: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    settings = json.dumps([config.to_dict() for config in configs])
    shared = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, settings],
            cwd=ROOT,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


@pytest.fixture
def ranks() -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """`start`; what is still at work afterwards is killed."""
    started: list[subprocess.Popen[str]] = []

    def launch(configs: list[Config], number: int, **environment: str) -> list[subprocess.Popen[str]]:
        started.extend(processes := start(configs, number, **environment))
        return processes

    yield launch
    for process in started:
        process.kill()


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What each has printed; all must have ended well."""
    texts = [process.communicate(timeout=ENDS_WITHIN_S)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(texts)
    return texts


def in_folder(config: Config, folder: Path | str) -> Config:
    return replace(config, run=replace(config.run, folder=str(folder)))


def measured(run: Path) -> dict[tuple[int, str], tuple[float, float]]:
    """Loss, and norm of the gradient, by step and kind."""
    lines = read_metrics(run / "metrics.jsonl")
    return {(line["step"], line["kind"]): (line["loss"], line.get("grad_norm", 0.0)) for line in lines}


def assert_same(run: Path, other: Path) -> None:
    assert measured(run).keys() == measured(other).keys()
    for when, values in measured(other).items():
        assert measured(run)[when] == pytest.approx(values, rel=1e-4), when


def wait_for_step(run: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + ENDS_WITHIN_S
    while not any(done >= step for done, _ in measured(run)):
        if any(process.poll() is not None for process in processes) or time.monotonic() > deadline:
            pytest.fail("\n".join(process.communicate(timeout=10)[0] for process in processes))
        time.sleep(0.01)


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(
    small_config: Callable[..., Config],
    ranks: Callable[..., list[subprocess.Popen[str]]],
    tmp_path: Path,
) -> None:
    """FSDP2 with everything that is a collective there, and DDP with random numbers that no generator gives."""
    base = train(small_config("steps=1", f"folder={tmp_path / 'base'}"))
    observed = ("held_out_samples=3", "eval_every=2", "sample_every=3", "sample_steps=1", "sample_images=1")
    full = small_config(*observed, "steps=3", "packs_per_step=2", "ema_decay=0.9", "gradient_checkpointing=full")
    lora = small_config(f"model.source={base}", "adapter=lora", "adapter_dropout=0.1", "steps=2", "packs_per_step=2")
    assert is_sharded(full) and not is_sharded(lora)
    slow = in_folder(lora, f"slow://{tmp_path}/two-slow")
    both = [in_folder(full, tmp_path / "two-full"), in_folder(lora, tmp_path / "two-lora"), slow]
    processes = ranks(both, 2, **{SlowFileSystem.RANK: "1", SlowFileSystem.SECONDS: "1"})
    train(in_folder(full, tmp_path / "one-full"))
    train(in_folder(lora, tmp_path / "one-lora"))
    endings = [text.splitlines()[-1] for text in finish(processes)]
    assert endings == ["RankError: rank 1: ValueError: a problem of one rank", "ValueError: a problem of one rank"]

    for kind in ("full", "lora"):
        assert_same(tmp_path / f"two-{kind}", tmp_path / f"one-{kind}")
    grids = [(tmp_path / f"{number}-full" / "samples" / "step-00000003.png").read_bytes() for number in ("one", "two")]
    assert grids[0] == grids[1]
    assert find_checkpoints(f"slow://{tmp_path}/two-slow")[-1].name == "step-00000002"

    saved = find_checkpoints(tmp_path / "two-full")[-1]
    assert len(open_part(saved, "transformer").files) == 2
    with pytest.raises(FileNotFoundError, match="x2i export"):
        load_transformer(str(saved / "transformer"))
    models = {
        number: load_transformer(
            export_run(tmp_path / f"{number}-full", tmp_path / f"{number}-model", file_bytes=limit)
        )
        for number, limit in (("one", 10**9), ("two", 300_000))
    }
    folder = tmp_path / "two-model" / "transformer"
    assert (
        len(list(folder.glob("*.safetensors"))) > 2
        and (folder / "diffusion_pytorch_model.safetensors.index.json").exists()
    )
    for name, tensor in models["one"].state_dict().items():
        # Adam divides by the root of squares that start near zero: rounding shows where gradients are tiny.
        assert (models["two"].state_dict()[name] - tensor).abs().mean() < 0.02 * full.optim.lr, name


@pytest.mark.slow
def test_a_lost_rank_ends_the_others_and_the_run_goes_on_with_any_number_of_them(
    small_config: Callable[..., Config],
    ranks: Callable[..., list[subprocess.Popen[str]]],
    tmp_path: Path,
) -> None:
    config = small_config("packs_per_step=6", "ema_decay=0.9", "save_every=2", "block=32", "save_in_background=true")
    run = Path(config.run.folder)
    processes = ranks([override(config, ["steps=100"])], 2)
    wait_for_step(run, 3, processes)
    processes[1].send_signal(signal.SIGKILL)
    assert processes[0].wait(ENDS_WITHIN_S) != 0
    done = int(find_checkpoints(run)[-1].name.removeprefix("step-"))

    finish(ranks([override(config, [f"steps={done + 2}"])], 3))
    assert len(open_part(find_checkpoints(run)[-1], "optimizer").files) == 3
    train(override(config, [f"steps={done + 3}"]))
    whole = in_folder(override(config, [f"steps={done + 3}"]), tmp_path / "whole")
    train(whole)
    assert_same(run, tmp_path / "whole")


@pytest.mark.slow
def test_a_disk_that_hangs_is_not_waited_for_any_longer_than_agreed(
    small_config: Callable[..., Config], ranks: Callable[..., list[subprocess.Popen[str]]], tmp_path: Path
) -> None:
    config = small_config(
        "packs_per_step=2", "steps=1", "storage_patience=1", "timeout=5", f"folder=slow://{tmp_path}/r"
    )
    processes = ranks([config], 2, **{SlowFileSystem.RANK: "1", SlowFileSystem.SECONDS: "3600"})
    text = processes[0].communicate(timeout=ENDS_WITHIN_S)[0]
    assert processes[0].returncode != 0 and processes[1].poll() is None
    assert "imed out" in text
    assert not find_checkpoints(f"slow://{tmp_path}/r")


def test_a_corpus_that_is_built_again_under_a_run_is_one_clear_error(
    small_config: Callable[..., Config], corpus_path: Path, tmp_path: Path
) -> None:
    corpus = shutil.copytree(corpus_path, tmp_path / "corpus")
    config = small_config(f"data.corpus={corpus}", "steps=500")
    finished = threading.Event()

    def build_again() -> None:
        while not measured(Path(config.run.folder)) and not finished.wait(0.01):
            pass
        for shard in corpus.rglob("*.tar"):
            shard.write_bytes(shard.read_bytes()[5120:])
        (corpus / "manifest.json").touch()

    building = threading.Thread(target=build_again)
    building.start()
    try:
        with pytest.raises(CorpusError, match="was built again while this run was reading it"):
            train(config)
    finally:
        finished.set()
        building.join()


def test_numbers_of_ranks_that_cannot_share_a_step_are_refused_before_ray_starts(
    small_config: Callable[..., Config],
) -> None:
    with pytest.raises(ConfigError, match=r"packs_per_step=6 does not divide by 4 ranks; 1, 2, 3, 6 would do"):
        train_on_ray(small_config("packs_per_step=6"), (2, 4))


def test_waiting_for_ranks_must_outlast_waiting_for_storage(small_config: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"must be longer than run\.storage_patience=600"):
        small_config("parallel.timeout=60")
