"""Jobs on a real Ray head with its job server; what is killed goes on when it is submitted again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from fine_tune.checkpoint import find_checkpoints
from fine_tune.metrics import read_metrics
from fine_tune.presets import preset
from fine_tune.train import train
from pipelines import submit
from pipelines.cli import app
from schemas.recipe import RecipeError
from tests.corpora import make_corpus
from tests.fine_tune.conftest import SMALL_MODEL

ENDS_WITHIN_S = 300


def x2i(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "300"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def head() -> Iterator[tuple[str, psutil.Process]]:
    """Address of the job server, and the process that all of the cluster descends from."""
    dashboard, folder = free_port(), tempfile.mkdtemp(prefix="x2i-ray-")
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "300", "RAY_AUTH_MODE": "disabled"}
    ports = [f"--port={free_port()}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}"]
    process = subprocess.Popen(
        [binaries / "ray", "start", "--head", "--block", "--num-cpus=4", f"--temp-dir={folder}", *ports],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    cluster = psutil.Process(process.pid)
    try:
        yield f"http://127.0.0.1:{dashboard}", cluster
    finally:
        for member in [*cluster.children(recursive=True), cluster]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait_until(is_so: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + ENDS_WITHIN_S
    while not is_so():
        assert time.monotonic() < deadline, f"{what} did not happen in {ENDS_WITHIN_S} s"
        time.sleep(0.05)


def kill(cluster: psutil.Process, words: str, all_of_them: bool = False) -> None:
    """SIGKILL to one process of the cluster with these words in its command, or to all: a shell may stand before it."""
    found = []
    for process in cluster.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if words in " ".join(process.cmdline()):
                found.append(process)
    assert found, f"no process {words!r}"
    for process in found if all_of_them else found[:1]:
        process.send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_a_training_job_survives_the_loss_of_a_worker_and_of_its_driver(
    head: tuple[str, psutil.Process], tmp_path: Path
) -> None:
    address, cluster = head
    corpus, run = tmp_path / "corpus", tmp_path / "run"
    make_corpus(corpus, per_shard=3)
    settings = [
        f"model.architecture={SMALL_MODEL}",
        *("max_side=64", "budget=320", "device=cpu", "tensorboard=false", "packs_per_step=6", "log_every=1"),
        *("eval_every=0", "sample_every=0", "held_out_samples=0", "save_every=2"),
    ]

    def done() -> int:
        return max((line["step"] for line in read_metrics(run / "metrics.jsonl")), default=0)

    def submitted(steps: int, workers: int, *options: str) -> tuple[int, str]:
        where = ["--train", "tiny", "-c", corpus, "--run", run, "--address", address, "--id", "small"]
        return x2i("submit", *settings, f"steps={steps}", *where, "--workers", workers, *options)

    def has_ended(job: str) -> bool:
        return client.get_job_status(job).is_terminal()

    def connected() -> bool:
        with contextlib.suppress(submit.SubmitError):
            return bool(submit.connect(address))
        return False

    wait_until(connected, "an answer of the job server")
    client = submit.connect(address)
    code, out = submitted(1000, 2, "--no-follow")
    assert code == 0 and "job small-1;" in out
    wait_until(lambda: done() >= 3 or has_ended("small-1"), "step 3")
    assert not has_ended("small-1"), client.get_job_logs("small-1")
    assert "job small-1;" in submitted(1000, 2, "--no-follow")[1], "what is at work is not started twice"
    kill(cluster, "RayTrainWorker")
    before = done()
    wait_until(lambda: done() > before + 2 or has_ended("small-1"), "another start of the workers")
    assert not has_ended("small-1"), client.get_job_logs("small-1")
    kill(cluster, "pipelines.cli train", all_of_them=True)
    wait_until(lambda: has_ended("small-1"), "the end of the job")

    saved, steps = find_checkpoints(run)[-1].name, done() + 2
    code, out = submitted(1000, 1, "--no-follow")
    assert code == 0 and "job small-2;" in out
    wait_until(lambda: done() >= steps or has_ended("small-2"), "two more steps")
    assert f"resuming from {run}/checkpoints/{saved}" in client.get_job_logs("small-2")
    assert not has_ended("small-2"), client.get_job_logs("small-2")
    assert x2i("submit", "--address", address, "--stop", "small-2") == (0, "stopped small-2\n")
    assert client.get_job_status("small-2") == "STOPPED"

    whole = tmp_path / "whole"
    train(preset("tiny", [*settings, f"steps={steps}", f"data.corpus={corpus}", f"run.folder={whole}"]))
    losses = [[line["loss"] for line in read_metrics(folder / "metrics.jsonl")][:steps] for folder in (run, whole)]
    assert len(losses[0]) == steps and losses[0] == pytest.approx(losses[1], rel=1e-4)

    code, out = x2i("submit", "--address", address, "--stop", "nothing")
    assert code == 2 and "there is no job nothing; there are small-1, small-2" in out.replace("\n", " ")


def test_what_is_not_there_is_said_so(tmp_path: Path) -> None:
    job = ("submit", "lr=0.1", "--train", "tiny", "-c", tmp_path, "--run", tmp_path)
    code, out = x2i(*job, "--address", f"http://127.0.0.1:{free_port()}")
    assert code == 2 and "no Ray job server answers at" in out
    code, out = x2i(*job, "--address", "head:6379")
    assert code == 2 and "is not of the form http://head:8265" in out
    code, out = x2i("submit", "lrr=0.1", *job[2:], "--address", "http://127.0.0.1:1")
    assert code == 2 and "unknown setting 'lrr'" in out
    code, out = x2i(*job, "packs_per_step=8", "--workers", "2:3", "--address", "http://127.0.0.1:1")
    assert code == 2 and "data.packs_per_step=8 does not divide by 3 ranks" in out
    code, out = x2i("submit", "--address", "http://127.0.0.1:1", "-c", tmp_path)
    assert code == 2 and "name one recipe file, or --train PRESET" in out


def test_a_head_that_wants_a_token_is_recognised() -> None:
    class Guard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.end_headers()
            self.wfile.write(b"Unauthorized: Missing authentication token")

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Guard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(submit.SubmitError, match="wants the token of its head"):
            submit.connect(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


def test_files_beside_a_recipe_are_named_with_their_line(recipe_file: Path, photo_folder: Path, tmp_path: Path) -> None:
    beside = tmp_path / "beside.yaml"
    (tmp_path / "photos").symlink_to(photo_folder)
    beside.write_text(recipe_file.read_text().replace(str(photo_folder), "photos"))
    with pytest.raises(RecipeError, match=r"beside\.yaml:4: .*photos lies beside the recipe on this machine"):
        submit.build_job(beside, "s3://bucket/corpus", 4)


def test_the_id_of_a_job_is_that_of_its_work(recipe_file: Path) -> None:
    ids = [submit.build_job(recipe_file, corpus, 4).id for corpus in ("s3://a/b", "s3://a/b", "s3://a/c")]
    assert ids[0] == ids[1] != ids[2]
    assert ids[0].startswith("x2i-small-")


def test_a_job_takes_the_import_packages_and_nothing_else(recipe_file: Path) -> None:
    job = submit.build_job(recipe_file, "s3://bucket/corpus", 4)
    with submit.working_folder(job.files) as folder:
        assert sorted(path.name for path in folder.iterdir()) == sorted([*submit.PACKAGES, submit.RECIPE])
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 8_000_000
        command = [sys.executable, "-m", "pipelines.cli", "plan", submit.RECIPE, "-c", str(folder / "corpus")]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert "recipe small" in done.stdout


def test_a_runtime_env_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "env.yaml"
    file.write_text("env_vars: {A: b}")
    assert submit.read_runtime_env(file) == {"env_vars": {"A": "b"}}
    for text in ("[1]", "working_dir: /", "{"):
        file.write_text(text)
        with pytest.raises(submit.SubmitError, match=r"env\.yaml"):
            submit.read_runtime_env(file)
