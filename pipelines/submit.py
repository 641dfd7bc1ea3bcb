"""Builds and training runs as jobs on a Ray cluster, through its job server (Ray Jobs)."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml

from schemas.identity import digest_of

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PACKAGES = ("schemas", "filters", "builders", "pipelines", "fine_tune")
RECIPE = "recipe.yaml"
_REACHABLE_WITHIN_S = 10.0
_STOPPED_WITHIN_S = 60.0


class SubmitError(RuntimeError):
    """A job that cannot be handed in, or failed; the message says what to do."""


@dataclass(frozen=True)
class Job:
    """What is to run.

    Attributes:
        name: for people; part of the job's id.
        arguments: of `x2i`, there.
        files: further files by the name they get in the job's folder.
    """

    name: str
    arguments: list[str]
    files: dict[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The same for the same work: a job that is handed in again goes on where the last one stopped."""
        return f"x2i-{self.name}-{digest_of([self.arguments, self.files])[:8]}"


def build_job(recipe: Path, corpus: str, workers: int) -> Job:
    """A build of a corpus, so many units at a time.

    Raises:
        schemas.recipe.RecipeError: mistakes in the recipe, or it names a file beside it: the cluster has no such file.
    """
    from pipelines.recipes import load

    loaded = load(recipe)
    for place, text in _texts(loaded.model_dump(mode="json")):
        # A bare word is the name of something, unless it stands where paths do.
        if (place[-1] == "path" or Path(text).suffix or "/" in text) and _is_beside(recipe, text):
            raise loaded.error(
                place,
                f"{text} lies beside the recipe on this machine; give an absolute path on a disk that all machines of "
                "the cluster have, or a URL",
            )
    arguments = ["build", RECIPE, "--corpus", corpus, "--address", "auto", "--workers", str(workers)]
    return Job(loaded.name, arguments, {RECIPE: recipe.read_text()})


def train_job(preset: str, overrides: list[str], corpus: str, run: str, workers: str) -> Job:
    """A training run on workers of Ray Train.

    Raises:
        ConfigError: settings that do not exist, or values that they cannot have, also with this number of workers.
    """
    from fine_tune.cli import parse_workers
    from fine_tune.parallel import check_sharing
    from fine_tune.presets import preset as make_config

    fewest, most = parse_workers(workers)
    check_sharing(make_config(preset, overrides), range(fewest, most + 1))
    places = ["--corpus", corpus, "--run", run]
    return Job(
        f"train-{preset}",
        ["train", *overrides, "--preset", preset, *places, "--ray", "--address", "auto", "--workers", workers],
    )


def _texts(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    if isinstance(value, str):
        yield place, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from _texts(part, (*place, key))


def _is_beside(recipe: Path, text: str) -> bool:
    """Whether it is a path or a glob of something in the recipe's folder."""
    if not text or len(text) > 1000 or "\n" in text or "://" in text or Path(text).is_absolute() or text == ".":
        return False
    return any(recipe.parent.glob(text)) if "*" in text else (recipe.parent / text).exists()


def connect(address: str) -> JobSubmissionClient:
    """The job server of a cluster, by default on port 8265 of its head.

    Raises:
        SubmitError: nobody answers there, or not without a token.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SubmitError(f"--address {address!r} is not of the form http://head:8265")
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), _REACHABLE_WITHIN_S).close()
        return JobSubmissionClient(address, headers=_headers())
    except AuthenticationError as error:
        raise SubmitError(
            f"{address} wants the token of its head (~/.ray/auth_token there): set RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH"
        ) from error
    except (OSError, RuntimeError) as error:
        raise SubmitError(
            f"no Ray job server answers at {address}: {error}. Is it the dashboard's address (port 8265), and was the "
            "head started with it (ray[default])?"
        ) from error


def _headers() -> dict[str, str]:
    """With the token where Ray would look for it.

    Ray itself sends it only in token mode. Set here, that would change what a `ray.init` in this process does.
    """
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    if not token:
        file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray/auth_token")
        token = file.read_text().strip() if file.is_file() else ""
    return {"Authorization": f"Bearer {token}"} if token else {}


def submit(client: JobSubmissionClient, job: Job, runtime_env: dict[str, Any], base_id: str = "") -> str:
    """Hand in a job, unless the same one is at work.

    Args:
        runtime_env: of Ray, e.g. `env_vars` or `pip`; the working directory is added.
        base_id: instead of `Job.id`.

    Returns:
        The id of the job, which counts how often it was handed in: x2i-small-0123abcd-2.
    """
    base = base_id or job.id
    earlier = {j.submission_id: j for j in client.list_jobs() if (j.submission_id or "").rpartition("-")[0] == base}
    for name, details in earlier.items():
        if not details.status.is_terminal():
            return str(name)
    command = shlex.join(["python", "-m", "pipelines.cli", *job.arguments])
    with working_folder(job.files) as folder:
        return client.submit_job(
            entrypoint=command,
            submission_id=f"{base}-{len(earlier) + 1}",
            runtime_env={**runtime_env, "working_dir": str(folder)},
            metadata={"x2i": json.dumps(job.arguments)},
        )


@contextmanager
def working_folder(files: dict[str, str]) -> Iterator[Path]:
    """What is uploaded: the import packages as they are here, and some files."""
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory(prefix="x2i-job-") as name:
        folder = Path(name)
        for package in PACKAGES:
            shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        for file, text in files.items():
            (folder / file).write_text(text)
        yield folder


def read_runtime_env(file: Path) -> dict[str, Any]:
    """Raises SubmitError if it is no YAML mapping, or has a working directory of its own."""
    try:
        found = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise SubmitError(f"{file}: {error}") from error
    if not isinstance(found, dict) or "working_dir" in found:
        raise SubmitError(f"{file} must be a mapping as for Ray's runtime_env, without working_dir")
    return found


def follow(client: JobSubmissionClient, job: str) -> None:
    """Print what a job prints until it ends.

    Raises:
        SubmitError: it did not succeed.
    """

    async def tail() -> None:
        async for text in client.tail_job_logs(job):
            sys.stdout.write(text)
            sys.stdout.flush()

    try:
        _run_beside(tail())
        details = client.get_job_info(job)
    except (RuntimeError, OSError) as error:
        raise SubmitError(
            f"lost the job server while following {job}: {error}. The job goes on unless its cluster is gone; submit "
            "it again to follow it"
        ) from error
    if details.status != "SUCCEEDED":
        raise SubmitError(f"{job} {details.status.lower()}: {details.message}. Submit it again to go on.")


def _run_beside(work: Coroutine[Any, Any, None]) -> None:
    """Like `asyncio.run`, on a loop in another thread: in a notebook this thread already runs one."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)
    task.add_done_callback(lambda _: loop.stop())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        loop.call_soon_threadsafe(task.cancel)
        raise
    loop.close()
    task.result()


def stop(client: JobSubmissionClient, job: str) -> None:
    """Stop a job and wait until it is.

    Raises:
        SubmitError: there is no such job, or it does not stop.
    """
    known = sorted(filter(None, (details.submission_id for details in client.list_jobs())))
    if job not in known:
        raise SubmitError(f"there is no job {job}; there are {', '.join(known) or 'none'}")
    client.stop_job(job)
    deadline = time.monotonic() + _STOPPED_WITHIN_S
    while not client.get_job_status(job).is_terminal():
        if time.monotonic() > deadline:
            raise SubmitError(f"{job} still runs {_STOPPED_WITHIN_S:.0f} s after it was asked to stop")
        time.sleep(0.2)
