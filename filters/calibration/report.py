"""The results of a calibration as a table, Markdown and plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from filters.calibration.measure import Check, roc, roc_auc

HEAD = ("fault", "strength", "kept if", "recall", "false rejects", "suggested", "remark")


def rows(checks: Sequence[Check]) -> list[tuple[str, ...]]:
    """One row of text per check, as in `HEAD`."""
    return [
        (
            check.fault,
            check.severity,
            check.rule,
            _share(check.faulty),
            _share(check.clean),
            "" if math.isnan(check.suggested) else f"{check.suggested:.3g}",
            _remark(check),
        )
        for check in checks
    ]


def table(checks: Sequence[Check]) -> Table:
    """For a terminal."""
    out = Table(*HEAD)
    for check, row in zip(checks, rows(checks), strict=True):
        style = "dim" if check.not_measured else "" if check.reaches_aim else "yellow"
        out.add_row(*row, style=style)
    return out


def markdown(checks: Sequence[Check]) -> str:
    """For documentation."""
    lines = [HEAD, ("---",) * len(HEAD), *rows(checks)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def plot(checks: Sequence[Check], path: Path) -> None:
    """One row per column that was judged: its distributions with the threshold, and the ROC curve; a PNG."""
    from matplotlib.figure import Figure

    judged = [check for check in checks if check.values is not None]
    if not judged:
        return
    figure = Figure(figsize=(10, 2.4 * len(judged)), layout="constrained")
    for axes, check in zip(figure.subplots(len(judged), 2, squeeze=False), judged, strict=True):
        _distributions(axes[0], check)
        _curve(axes[1], check)
    figure.savefig(path, dpi=80)


def _distributions(axes: Any, check: Check) -> None:
    assert check.values is not None
    sides = check.values.half(tuning=False)
    known = [side[~np.isnan(side)] for side in sides]
    edges = np.histogram_bin_edges(np.concatenate(known), bins=40)
    axes.hist(known, edges, label=["clean", check.fault], color=["tab:blue", "tab:red"])
    axes.axvline(check.bound, color="black", label=check.rule)
    axes.set(xlabel=check.column, ylabel="images", yscale="symlog")
    axes.legend(fontsize="small")


def _curve(axes: Any, check: Check) -> None:
    assert check.values is not None
    axes.plot(*roc(check.values, "≥" in check.rule), color="tab:blue")
    axes.plot(check.false_reject, check.recall, "ko")
    axes.set(xlabel="false rejects", ylabel="recall", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_title(f"{check.fault}: area {roc_auc(check.values, check.rule):.3f}", fontsize="medium")


def _share(refused: np.ndarray) -> str:
    return f"{refused.mean():.3f} ({refused.sum()}/{len(refused)})" if len(refused) else ""


def _remark(check: Check) -> str:
    if check.not_measured:
        return f"not measured: {check.not_measured}"
    if check.reaches_aim:
        return check.note
    area = f" (area under ROC {roc_auc(check.values, check.rule):.2f})" if check.values else ""
    return "; ".join(part for part in (f"misses the aim{area}", check.note) if part)
