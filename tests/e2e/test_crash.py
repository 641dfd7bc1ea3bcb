"""Kill the driver and the workers at random moments: what is published never differs by a byte."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

ROOT = Path(__file__).parents[2]
KILLS = 10


def start(recipe: Path, corpus: Path, workers: int) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "build",
        str(recipe),
        "-c",
        str(corpus),
        "--workers",
        str(workers),
    ]
    log = corpus.with_suffix(".log").open("ab")
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def ray_workers(driver: subprocess.Popen) -> list[psutil.Process]:
    """Processes of the driver's own Ray that run a unit at this moment."""
    try:
        children = psutil.Process(driver.pid).children(recursive=True)
        return [p for p in children if p.cmdline() and "_run_batch" in p.cmdline()[0]]
    except psutil.NoSuchProcess:
        return []


def digests(corpus: Path) -> dict[str, str]:
    """sha256 of all shards, indexes, ledgers and markers: everything but the deletable work folder."""
    files = [f for f in corpus.rglob("*") if f.is_file() and "work" not in f.relative_to(corpus).parts]
    return {str(f.relative_to(corpus)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def build(recipe: Path, corpus: Path, workers: int) -> dict[str, str]:
    driver = start(recipe, corpus, workers)
    assert driver.wait(timeout=400) == 0, corpus.with_suffix(".log").read_text()
    return digests(corpus)


@pytest.fixture(scope="module")
def undisturbed(recipe_file, tmp_path_factory) -> dict[str, str]:
    """Built with one worker; what every other way must equal."""
    return build(recipe_file, tmp_path_factory.mktemp("whole") / "corpus", 1)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2, 4])
def test_any_number_of_workers_writes_the_same_bytes(recipe_file, tmp_path, undisturbed, workers):
    assert build(recipe_file, tmp_path / "corpus", workers) == undisturbed


@pytest.mark.slow
def test_random_kills_change_nothing(recipe_file, tmp_path, undisturbed):
    rng = np.random.default_rng(20261122)
    corpus, kills, driver_turn = tmp_path / "corpus", [], True
    driver = start(recipe_file, corpus, 2)
    deadline = time.monotonic() + 900
    while len(kills) < KILLS:
        assert time.monotonic() < deadline, f"only {kills}"
        time.sleep(rng.uniform(0.05, 0.6))
        if driver.poll() is not None:  # it got through: begin again from nothing, kills go on counting
            assert driver.returncode == 0, corpus.with_suffix(".log").read_text()
            assert digests(corpus) == undisturbed
            subprocess.run(["rm", "-rf", str(corpus)], check=True)
            driver = start(recipe_file, corpus, 2)
            continue
        workers = ray_workers(driver)
        if not workers:
            continue
        if driver_turn:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
            kills.append("driver")
            driver = start(recipe_file, corpus, 2)
        else:
            victim = workers[rng.integers(len(workers))]
            victim.kill()
            kills.append("worker")
        driver_turn = rng.random() < 0.3
    assert driver.wait(timeout=400) == 0, corpus.with_suffix(".log").read_text()
    assert {"driver", "worker"} <= set(kills)
    assert digests(corpus) == undisturbed
