"""`x2i report`: one self-contained page that shows a corpus. It loads nothing, and no text of the corpus can run in it.

The page is a pure function of the corpus and the arguments. Escaping is Jinja's, for everything; the policy in its
head admits this page's own style and script by their hashes, and pictures that it holds itself.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from pipelines.corpus import summary
from pipelines.funnel import Step, funnel
from pipelines.funnel_views import refused_bins
from pipelines.report import charts, facts
from pipelines.report.gallery import Card, Gallery
from pipelines.storage import Folder

_HERE = Path(__file__).parent
_PLACEHOLDER = re.compile(re.escape(str(escape("<img><|image_"))) + r"(\d+)" + re.escape(str(escape("|></img>"))))


def render_report(corpus: Folder, per_subtask: int = 4, seed: int = 0) -> str:
    """The page as HTML.

    Args:
        corpus: a published corpus.
        per_subtask: up to so many random samples of each subtask in the gallery.
        seed: which ones.
    """
    style, script = ((_HERE / name).read_text() for name in ("page.css", "page.js"))
    gallery = Gallery(corpus, per_subtask, seed)
    counts = summary(corpus)
    found = facts.contents(corpus)
    steps = funnel(corpus)
    samples = {name: stream["samples"] for name, stream in counts["streams"].items()}
    page = _environment().get_template("page.html")
    return page.render(
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
        manifest=corpus.read_json("manifest.json"),
        counts=counts,
        totals=_totals(counts),
        steps=steps,
        kept=[step.left for step in steps if not step.is_of_pairs][-1],
        accounts=facts.accounts(corpus),
        neighbours=facts.neighbours(corpus),
        yields=facts.yields(corpus),
        mixture=facts.mixture(samples),
        measured=[d for d in found.distributions if not d.is_score],
        scores=[d for d in found.distributions if d.is_score],
        models=found.models,
        gallery=gallery,
        numbers=_filterable(gallery.cards),
        per_subtask=per_subtask,
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "n": lambda value: f"{value:,}",
        "g": lambda value: f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}",
        "percent": _percent,
        "size": _size,
        "said": _said,
    }
    environment.globals |= {"bar": charts.bar, "ridge": _ridge, "filter_chart": _filter_chart}
    return environment


def _policy(style: str, script: str) -> str:
    """Content-Security-Policy: only this style and script, pictures as data, nothing from anywhere."""

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; style-src {digest(style)}; script-src {digest(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _totals(counts: dict[str, Any]) -> dict[str, Any]:
    """Sums over all subtasks: real outputs, aligned samples, and samples by licence and split, the largest first."""
    subtasks = [s for stream in counts["streams"].values() for s in stream["subtasks"].values()]
    by_value: dict[str, Counter[str]] = {"licenses": Counter(), "splits": Counter()}
    for name, counter in by_value.items():
        for subtask in subtasks:
            counter.update(subtask[name])
    flags = {name: sum(s[name] for s in subtasks) for name in ("real_output", "aligned")}
    return {**flags, **{n: sorted(c.items(), key=lambda item: (-item[1], item[0])) for n, c in by_value.items()}}


def _filterable(cards: list[Card]) -> list[str]:
    """Names of numbers that at least two cards have, in the order in which cards name them."""
    found = Counter(name for card in cards for name in card.numbers)
    return [name for name, n in found.items() if n > 1]


def _filter_chart(step: Step) -> Markup:
    shown = step.histogram
    if shown is None:
        return Markup("")
    label = f"Values of {step.column}, from {shown.edges[0]:.4g} to {shown.edges[-1]:.4g}, with the bound {step.rule}"
    refused = refused_bins(step, shown)
    return charts.histogram(
        shown.edges, shown.counts, label, logarithmic=shown.logarithmic, refused=refused, cut=step.threshold
    )


def _ridge(distribution: facts.Distribution, stream: str) -> Markup:
    label = f"{distribution.name} in {stream}, median {distribution.medians[stream]:.3g} {distribution.unit}".strip()
    counts = distribution.counts[stream]
    return charts.histogram(distribution.edges, counts, label, logarithmic=distribution.logarithmic, height=22)


def _said(instruction: str) -> Markup:
    """The instruction with placeholders as small numbers of the input they stand for."""
    return Markup(_PLACEHOLDER.sub(r'<span class="ref" title="input image \1">\1</span>', str(escape(instruction))))


def _percent(share: float) -> str:
    return f"{share:.0%}" if share in (0, 1) else f"{share:.1%}"


def _size(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
