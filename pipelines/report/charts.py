"""Small inline SVG charts. They take their colours from the page's classes, so that they follow its theme."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 240, 40
_SHORTEST = 1.5  # px; a bin with one image must be seen beside one with thousands


def histogram(
    edges: Sequence[float],
    counts: Sequence[int],
    label: str,
    *,
    logarithmic: bool = False,
    refused: Sequence[bool] = (),
    cut: float | None = None,
    height: int = HEIGHT,
) -> Markup:
    """Bars over an axis that spans the edges; a word instead if there is only one bin, whose values are all equal.

    Args:
        edges: n + 1 ascending.
        counts: n.
        label: what a screen reader says.
        logarithmic: whether the axis is.
        refused: n, bins to draw in the accent colour; none if empty.
        cut: where a threshold is drawn, if it lies within the edges.
        height: in px; the width is `WIDTH`.
    """
    if len(counts) == 1:
        return Markup('<span class="constant">all {:.4g}</span>').format(sum(edges) / 2)
    at = _axis(edges, logarithmic)
    tallest = max(counts)
    bars = Markup("").join(
        Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
            "drop" if refused and refused[i] else "keep",
            at[i],
            height - tall,
            max(at[i + 1] - at[i] - 0.5, 0.5),
            tall,
        )
        for i, n in enumerate(counts)
        if n and (tall := max(_SHORTEST, n / tallest * height))
    )
    line = Markup("")
    if cut is not None and edges[0] <= cut <= edges[-1]:
        x = float(_axis([edges[0], max(cut, edges[0]), edges[-1]], logarithmic)[1])
        line = Markup('<line class="cut" x1="{0:.1f}" x2="{0:.1f}" y1="0" y2="{1}"/>').format(x, height)
    return _svg(WIDTH, height, label, bars + line)


def bar(share: float, label: str, mark: float | None = None, whole: float = 1.0) -> Markup:
    """A horizontal bar of `share` of `whole`, with a tick at `mark`."""
    filled = Markup('<rect class="keep" x="0" y="3" width="{:.1f}" height="8"/>').format(share / whole * WIDTH)
    tick = Markup("")
    if mark is not None:
        tick = Markup('<line class="cut" x1="{0:.1f}" x2="{0:.1f}" y1="0" y2="14"/>').format(mark / whole * WIDTH)
    rail = Markup('<rect class="rail" x="0" y="3" width="{}" height="8"/>').format(WIDTH)
    return _svg(WIDTH, 14, label, rail + filled + tick)


def _axis(edges: Sequence[float], logarithmic: bool) -> np.ndarray:
    """Horizontal places of values, in px; the first one is at 0 and the last at `WIDTH`."""
    values = np.log(edges) if logarithmic else np.asarray(edges, float)
    span = values[-1] - values[0]
    return (values - values[0]) / span * WIDTH if span else np.zeros(len(values))


def _svg(width: int, height: int, label: str, content: Markup) -> Markup:
    return Markup(
        '<svg role="img" aria-label="{}" viewBox="0 0 {} {}" preserveAspectRatio="none"><title>{}</title>{}</svg>'
    ).format(label, width, height, label, content)
