"""A head on this machine; `tests/notebooks` runs jobs on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.local_head import LocalHead
from pipelines.submit import SubmitError

# In a process of its own, whose user has no token yet: Ray reads it once in the life of a process.
LIFE = """
import os
from pipelines.local_head import LocalHead
from pipelines.submit import SubmitError, connect
head = LocalHead(num_cpus=1)
try:
    print(connect(head.address).list_jobs())
finally:
    head.stop()
assert "RAY_AUTH_MODE" not in os.environ
try:
    connect(head.address)
except SubmitError as error:
    print(error)
"""


def test_a_head_answers_those_with_its_token_until_it_is_stopped(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", LIFE],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment | {"HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    jobs, error = done.stdout.splitlines()
    assert jobs == "[]" and error.startswith("no Ray job server answers at")


def test_a_head_that_does_not_start_shows_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = tmp_path / "ray"
    ray.write_text('#!/bin/sh\n[ "$1" = get-auth-token ] && exit\necho no room for a head\nexit 1\n')
    ray.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(SubmitError, match="Ray does not start on this machine: no room for a head"):
        LocalHead(num_cpus=1)
