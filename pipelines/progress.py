"""What a person watches: one line per stage with units, rows, rows/s and time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipelines import engine
from pipelines.ledger import Marker, totals

console = Console(stderr=True)


@contextmanager
def stage_progress(stage: str, units: int) -> Iterator[engine.Progress]:
    """A progress bar (none without units); units that were already done do not count into the rate."""
    counts: list[dict[str, int]] = []
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rows]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, disable=not units) as bar:
        task = bar.add_task(stage, total=units, rows="")
        fresh = 0

        def advance(marker: Marker, already_done: bool) -> None:
            nonlocal fresh
            counts.append(marker.counts)
            fresh += 0 if already_done else marker.counts["inputs"]
            elapsed, done = bar.tasks[task].elapsed or 0.0, totals(counts)
            rate = f"{fresh / elapsed:,.1f} rows/s" if fresh and elapsed else "up to date"
            some = f"{fresh:,} new, " if 0 < fresh < done["inputs"] else ""
            bar.update(task, advance=1, rows=f"{describe(done)}  {some}{rate}")

        yield advance


def describe(counts: dict[str, int]) -> str:
    """`1,204 rows: 1,200 kept, 3 dropped, 1 quarantined`, without the zeros."""
    fates = [f"{counts[name]:,} {name}" for name in ("kept", "dropped", "quarantined") if counts[name]]
    return f"{counts['inputs']:,} rows: {', '.join(fates) or 'none'}"
