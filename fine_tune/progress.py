"""A progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as ProgressTask
from rich.text import Text


class _Speed(ProgressColumn):
    def render(self, task: ProgressTask) -> Text:
        return Text(f"{task.speed:.2f} steps/s" if task.speed else "")


@contextmanager
def show_progress(first: int, total: int, enabled: bool) -> Iterator[Callable[[int, float], None]]:
    """Gives `update(step, loss)`."""
    console = Console()
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
