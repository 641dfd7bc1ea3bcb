"""Speed of one and of several ranks on this machine, and how long a checkpoint holds up training.

    python benchmarks/parallel.py --corpus build/demo/corpus --ranks 1 2

On a machine with GPUs `--preset full --device cuda data.packs_per_step=8 ...` measures them; each rank takes one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fine_tune.checkpoint import BackgroundSaver, load_checkpoint, save_checkpoint
from fine_tune.metrics import read_metrics
from fine_tune.presets import Config, preset
from fine_tune.state import build_state

WARM_UP = 3
RANK = """
import json, sys
from fine_tune.parallel import join_torchrun
from fine_tune.presets import Config
from fine_tune.train import train
config = Config.from_dict(json.loads(sys.argv[1]))
with join_torchrun(config) as world:
    train(config, world=world)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("settings", nargs="*", help="key=value")
    arguments = parser.parse_args()
    fixed = ["packs_per_step=4", "log_every=1", "eval_every=0", "sample_every=0", "save_every=0", "held_out_samples=0"]
    places = [f"data.corpus={arguments.corpus}", f"device={arguments.device}", f"steps={WARM_UP + arguments.steps}"]
    configs = {
        "full": preset(arguments.preset, [*fixed, *places, *arguments.settings]),
        "lora": preset(arguments.preset, [*fixed, *places, "adapter=lora", *arguments.settings]),
    }
    with tempfile.TemporaryDirectory() as folder:
        configs["lora"] = from_base(configs["full"], configs["lora"], Path(folder))
        for kind, config in configs.items():
            measured: dict[int, list[float]] = {ranks: [] for ranks in arguments.ranks}
            for _ in range(arguments.rounds):  # in turn: what else the machine does hits all of them
                for ranks in arguments.ranks:
                    measured[ranks].append(steps_per_second(config, ranks, Path(folder)))
            medians = {ranks: statistics.median(speeds) for ranks, speeds in measured.items()}
            for ranks, speed in medians.items():
                print(f"{kind} on {ranks}: {speed:.3f} steps/s, x {speed / medians[arguments.ranks[0]]:.2f}")
        checkpoint_times(configs["full"], Path(folder))


def from_base(full: Config, lora: Config, folder: Path) -> Config:
    """With a random output layer instead of one of zeros, which gives adapters no gradient."""
    from fine_tune.layouts import save_transformer

    state = build_state(full)
    with torch.no_grad():
        state.model.proj_out.weight.normal_(std=0.02, generator=torch.Generator(state.device).manual_seed(0))
    save_transformer(folder / "base" / "transformer", state.model.config, dict(state.model.state_dict()))
    values = lora.to_dict()
    values["model"]["source"] = str(folder / "base")
    return Config.from_dict(values)


def steps_per_second(config: Config, ranks: int, folder: Path) -> float:
    """Without the first steps; every rank has one thread."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    values = config.to_dict()
    values["run"]["folder"] = str(run)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, json.dumps(values)],
            env={**shared, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]
    if any(process.wait() for process in processes):
        raise SystemExit(f"{ranks} ranks failed")
    speeds = [line["steps_per_second"] for line in read_metrics(run / "metrics.jsonl")[WARM_UP:]]
    return 1 / statistics.mean(1 / speed for speed in speeds)


def checkpoint_times(config: Config, folder: Path) -> None:
    state = build_state(config)
    for parameter in state.trained.values():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    size = sum(p.nbytes for p in state.trained.values()) * 3 / 1e6
    saver = BackgroundSaver()
    times: dict[str, list[float]] = {"saved": [], "training held up by a save in the background": [], "loaded": []}
    for state.step in range(1, 6):
        began = time.perf_counter()
        target = save_checkpoint(folder / "saves", state, {"digest": ""}, keep=1)
        times["saved"].append(time.perf_counter() - began)
        began = time.perf_counter()
        load_checkpoint(target, state, "")
        times["loaded"].append(time.perf_counter() - began)
        began = time.perf_counter()
        saver.save(folder / "beside", state, {"digest": ""}, keep=1)
        times["training held up by a save in the background"].append(time.perf_counter() - began)
        saver.wait()
    for what, seconds in times.items():
        print(f"checkpoint of {size:.0f} MB {what}: {statistics.median(seconds):.2f} s")


if __name__ == "__main__":
    main()
