"""A head on this machine; `tests/notebooks` runs jobs on one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipelines.local_head import LocalHead
from pipelines.submit import SubmitError, connect


@pytest.fixture(autouse=True)
def own_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)


def test_a_head_answers_those_with_its_token_until_it_is_stopped() -> None:
    head = LocalHead(num_cpus=1)
    try:
        assert connect(head.address).list_jobs() == []
    finally:
        head.stop()
    with pytest.raises(SubmitError, match="no Ray job server answers"):
        connect(head.address)


def test_a_head_that_does_not_start_shows_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = tmp_path / "ray"
    ray.write_text("#!/bin/sh\necho no room for a head\nexit 1\n")
    ray.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(SubmitError, match="Ray does not start on this machine: no room for a head"):
        LocalHead(num_cpus=1)
