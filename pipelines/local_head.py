"""A Ray head with its job server on this machine, to try out jobs where there is no cluster."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipelines.submit import SubmitError, connect

_STARTS_WITHIN_S = 300.0
_STOPS_WITHIN_S = 60.0


class LocalHead:
    """A head that only this machine can reach; it ends with this process, or when it is stopped.

    It has ports and a folder of its own, so that it meets no other Ray of this machine. Clients need the token of this
    user (`~/.ray/auth_token`, unless `RAY_AUTH_TOKEN` or `RAY_AUTH_TOKEN_PATH` is set); Ray makes one if there is none.

    Attributes:
        address: of its job server.
    """

    def __init__(self, num_cpus: int) -> None:
        """Start it, and wait until its job server answers, some ten seconds.

        Raises:
            SubmitError: it does not start; the message has the end of its log.
        """
        ports = {name: _free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port")}
        self.address = f"http://127.0.0.1:{ports['dashboard-port']}"
        self._folder = Path(tempfile.mkdtemp(prefix="x2i-ray-", dir="/tmp"))  # paths of sockets have to be short
        self._process = self._start(num_cpus, [f"--{name}={port}" for name, port in ports.items()])
        atexit.register(self.stop)
        self._wait()

    def _start(self, num_cpus: int, ports: list[str]) -> subprocess.Popen[bytes]:
        binaries = Path(sys.executable).parent  # of the environment, which need not be activated
        environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"}
        environment["RAY_AUTH_MODE"] = "token"
        subprocess.run(
            [binaries / "ray", "get-auth-token", "--generate"], env=environment, check=True, capture_output=True
        )
        environment["RAY_raylet_start_wait_time_s"] = "300"  # Ray gives a busy machine only 60 s
        environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # or it waits 30 s when it is stopped
        options = ["--head", "--block", "--node-ip-address=127.0.0.1", f"--temp-dir={self._folder / 'ray'}", *ports]
        with (self._folder / "head.log").open("wb") as log:
            return subprocess.Popen(
                [binaries / "ray", "start", *options, f"--num-cpus={num_cpus}", "--disable-usage-stats"],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # or an interrupt of a notebook's cell would end it
            )

    def _wait(self) -> None:
        deadline = time.monotonic() + _STARTS_WITHIN_S
        while True:
            try:
                connect(self.address)
                return
            except SubmitError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log = (self._folder / "head.log").read_text(errors="replace")[-2000:]
                    self.stop()
                    raise SubmitError(f"Ray does not start on this machine: {log}") from error
                time.sleep(0.2)

    def stop(self) -> None:
        """End it with all that it runs, and remove its folder."""
        atexit.unregister(self.stop)
        self._process.terminate()
        try:
            self._process.wait(_STOPS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
