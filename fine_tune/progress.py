"""What a run shows while it goes, and how it is asked to stop."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as ProgressTask
from rich.text import Text

log = logging.getLogger(__name__)


class _Speed(ProgressColumn):
    def render(self, task: ProgressTask) -> Text:
        return Text(f"{task.speed:.2f} steps/s" if task.speed else "")


@contextmanager
def show_progress(first: int, total: int, enabled: bool) -> Iterator[Callable[[int, float], None]]:
    """A progress bar on a terminal, plain lines elsewhere. Gives `update(step, loss)`."""
    console = Console(force_jupyter=False, force_terminal=sys.stdout.isatty())  # notebooks ask for colours
    if not (enabled and console.is_terminal):

        def print_line(step: int, loss: float) -> None:
            if enabled:
                console.print(f"step {step}/{total} loss {loss:.4f}", highlight=False)

        yield print_line
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("train", total=total, completed=first, loss="")
        yield lambda step, loss: bar.update(task, completed=step, loss=f"{loss:.4f}")


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """A list that is empty until the process is asked to stop (Ctrl-C, SIGTERM); a second request stops at once."""
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        if received:
            signal.default_int_handler(number, None)
        received.append(number)
        log.warning("stopping after this step; the checkpoint will be saved")

    try:
        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: whoever runs this one handles signals
        previous = {}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
