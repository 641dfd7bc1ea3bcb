"""The funnel as a person sees it: a table in the terminal, and a plot per filter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table
from rich.text import Text

from pipelines.funnel import Histogram, Step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BARS = " ▁▂▃▄▅▆▇█"
_DROPPED, _KEPT = "red", "green"


def funnel_table(steps: Iterable[Step]) -> Table:
    """One row per step; a filter's histogram has a line at its threshold and is red where that drops."""
    table = Table("rule", "", "in", "dropped", "left", "values: from, distribution, to")
    for step in steps:
        dropped = ", ".join(f"{n:,}" if kind == step.name else f"{n:,} {kind}" for kind, n in step.dropped.items())
        table.add_row(step.name, step.rule, f"{step.entered:,}", dropped, f"{step.left:,}", _sparkline(step))
    return table


def _sparkline(step: Step) -> Text:
    shown = step.histogram
    if shown is None:
        return Text("")
    if len(shown.counts) == 1:
        return Text(f"all {sum(shown.edges) / 2:.4g}", style=_colours(step, shown)[0])
    tallest = max(shown.counts)
    line = Text(f"{shown.edges[0]:.4g} ")
    colours = _colours(step, shown)
    for count, colour, previous in zip(shown.counts, colours, [colours[0], *colours], strict=False):
        line.append("" if colour == previous else "│")
        line.append(_BARS[-(-count * (len(_BARS) - 1) // tallest)], style=colour)
    line.append(f" {shown.edges[-1]:.4g}")
    return line


def refused_bins(step: Step, shown: Histogram) -> list[bool]:
    """Of each bin of a filter's histogram, by its middle, whether the filter refuses it."""
    edges = np.array(shown.edges)
    middles = np.sqrt(edges[:-1] * edges[1:]) if shown.logarithmic else (edges[:-1] + edges[1:]) / 2
    assert step.threshold is not None
    refused = middles < step.threshold if step.rule.startswith("min") else middles > step.threshold
    return refused.tolist()


def _colours(step: Step, shown: Histogram) -> list[str]:
    return [_DROPPED if refused else _KEPT for refused in refused_bins(step, shown)]


def plot_funnel(steps: Iterable[Step], folder: Path) -> Iterator[Path]:
    """Write a PNG for every filter that saw a value; gives their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    filters = [step for step in steps if step.histogram]
    for number, step in enumerate(filters, 1):
        path = folder / f"{number:02d}-{step.column}.png"
        filter_figure(step).savefig(path, metadata={"Software": None})
        yield path


def filter_figure(step: Step) -> Figure:
    """The values that a filter saw, with its threshold. The step must have a histogram."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown, bound = step.histogram, step.threshold
    assert shown is not None and bound is not None
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    edges = np.array(shown.edges)
    axes.bar(edges[:-1], shown.counts, np.diff(edges), align="edge", color=_colours(step, shown), alpha=0.6)
    axes.axvline(bound, color="black", label=f"{step.rule}" + ("" if f"{bound:g}" in step.rule else f": {bound:.4g}"))
    if shown.logarithmic:
        axes.set_xscale("log")
    lost = step.entered - step.left
    share = f" ({lost / step.entered:.1%})" if step.entered else ""
    axes.set_title(f"{step.column}: {step.entered:,} images in, {lost:,} dropped{share}, {shown.unknown:,} unknown")
    axes.set_xlabel(step.column)
    axes.set_ylabel("images")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure
