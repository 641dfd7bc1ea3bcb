"""The funnel: how many images each rule of `decide` saw and refused, and how the values it judged were distributed.
The rules of `pair` follow, which judge candidates for pairs instead of images.

Everything is read from what is published: `recipe.yaml`, `meta/ledger` and `meta/scores`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from builders.annotators.crop_features import CropFeatures
from filters.decide import DERIVED, quantile_bound, with_derived
from filters.pairs import RULES, band_of
from pipelines import ledger
from pipelines.recipes import RECIPE
from pipelines.stages.decide import DecideStage
from pipelines.stages.ingest import IngestStage
from pipelines.stages.pair import PairStage
from pipelines.storage import Folder
from schemas.decide import Decide, Filter
from schemas.recipe import Recipe

BINS = 40
_LOG_SPREAD = 20  # a column whose 99 % quantile is so many times its median is drawn on a logarithmic axis


@dataclass(frozen=True)
class Histogram:
    """Values of one column over the images that reached its filter.

    Attributes:
        edges: n + 1 ascending bin edges; a bin holds values from its edge up to the next, the last one both. A
            threshold is an edge, so no bin holds both what stays and what goes.
        counts: n.
        unknown: images without a value.
        logarithmic: edges are equally spaced on a logarithmic axis.
    """

    edges: list[float]
    counts: list[int]
    unknown: int
    logarithmic: bool


_PAIR = "pair:"  # before the names of rules that judge candidates for pairs


@dataclass
class Step:
    """One rule. `entered = left + sum(dropped.values())`; `dropped` is by what was found.

    Attributes:
        name: `ingest`, or a reason as in the ledger of `decide`.
        rule: as the recipe says it, e.g. `min 100`.
        column, threshold, histogram: of a filter: what it judges, the bound (also where the recipe gives a
            quantile), and the values that it saw.
    """

    name: str
    rule: str = ""
    entered: int = 0
    left: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    column: str = ""
    threshold: float | None = None
    histogram: Histogram | None = None

    @property
    def is_of_pairs(self) -> bool:
        """Whether it judges candidates for pairs, not photographs."""
        return self.name.startswith(_PAIR)

    def to_json(self) -> dict[str, Any]:
        plain = asdict(self)
        return {"in": plain.pop("entered"), "out": plain.pop("left"), **plain}


def funnel(corpus: Folder) -> list[Step]:
    """All steps of a published corpus, in the order in which they judged: images, then candidates for pairs."""
    recipe = RECIPE.model_validate(yaml.safe_load(corpus.read_bytes("recipe.yaml")))
    return [_ingest(corpus), *_Reader(corpus, recipe.decide).steps(), *_pair_steps(corpus, recipe)]


def histogram(values: np.ndarray, cut: float | None = None, unknown: int = 0) -> Histogram | None:
    """Histogram of finite float64 values with an edge at `cut`; None if there are no values."""
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    median, tail = np.quantile(values, (0.5, 0.99))
    logarithmic = low > 0 and bool(tail > _LOG_SPREAD * median)
    if logarithmic:
        edges = np.geomspace(low, high, BINS + 1)
        edges[0], edges[-1] = low, high  # rounding must not push the extremes out
    else:
        edges = np.linspace(low, high, BINS + 1) if low < high else np.array([low - 0.5, low + 0.5])
    if cut is not None and low < cut < high:
        edges = np.union1d(edges, cut)
    counts, _ = np.histogram(values, edges)
    return Histogram(edges.tolist(), counts.tolist(), unknown, logarithmic)


def _ingest(corpus: Folder) -> Step:
    rows = _ledger(corpus, IngestStage.name, ["status", "reason"])
    broken = Counter(rows.filter(pc.equal(rows["status"], "quarantined"))["reason"].to_pylist())
    return Step("ingest", "readable image", len(rows), len(rows) - broken.total(), _by_number(broken))


def _ledger(corpus: Folder, stage: str, columns: list[str]) -> pa.Table:
    return pa.concat_tables(
        corpus.read_table(name, columns) for name in corpus.list(f"{ledger.FOLDER}/{stage}", ".parquet")
    )


def _by_number(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _pair_steps(corpus: Folder, recipe: Recipe) -> Iterator[Step]:
    """A step per rule that judged or refused candidates for pairs; none if the recipe has no `pair`."""
    if recipe.pair is None:
        return
    rows = _ledger(corpus, PairStage.name, ["reason", "value", "detail"])
    reason, evidence = (rows[name].to_numpy(zero_copy_only=False) for name in ("reason", "detail"))
    vouched, similarity = evidence == "subject_id", rows["value"].to_numpy()
    low, high = band_of(recipe.pair, recipe.annotators()[CropFeatures.name].model)
    bounds = {
        "too_similar": ("max", high, np.ones(len(rows), bool)),
        "too_different": ("min", low, ~vouched),
        "stranger": ("min", recipe.pair.min_similarity, vouched),
    }
    left = np.ones(len(rows), bool)
    for rule in RULES:
        refused = int((reason == rule).sum())
        entered, left = left, left & (reason != rule)
        name = f"{_PAIR}{rule}"
        step = Step(name, "", int(entered.sum()), int(left.sum()), {name: refused} if refused else {})
        if rule in bounds:
            kind, bound, judged = bounds[rule]
            step.column, step.rule, step.threshold = "similarity", f"{kind} {bound:g}", bound
            cut = bound if kind == "min" else float(np.nextafter(bound, np.inf))  # an equal value stays
            step.histogram = histogram(similarity[entered & judged], cut)
        if refused or step.histogram:
            yield step


class _Reader:
    """Retraces `filters.decide.decide` in its ledger: whom a rule refused is read there, never judged again."""

    def __init__(self, corpus: Folder, rules: Decide) -> None:
        self.corpus, self.rules = corpus, rules
        self.rows = _ledger(corpus, DecideStage.name, ["unit", "row", "reason", "detail"])
        self.reason = self.rows["reason"].to_numpy(zero_copy_only=False)
        self.left = np.ones(len(self.rows), bool)

    def steps(self) -> Iterator[Step]:
        rules, details = self.rules, self.rows["detail"].to_numpy(zero_copy_only=False)
        yield self._step("optout", found=self._column("optout_reason").to_numpy(zero_copy_only=False))
        if rules.licenses:
            yield self._step("license", ", ".join(rules.licenses), found=details)
        for name in sorted({f"blocklist:{blocklist.kind}" for blocklist in rules.blocklists}):
            yield self._step(name)
        for rule in rules.filters:
            yield self._filter(rule)
        yield self._step("duplicate", "same file")
        if rules.dedup.perceptual:
            yield self._step("near_duplicate", f"radius {rules.dedup.perceptual.radius}")
        if rules.dedup.semantic:
            yield self._step("semantic_duplicate", f"cosine {rules.dedup.semantic.threshold:g}")

    def _step(
        self, name: str, rule: str = "", refused: np.ndarray | None = None, found: np.ndarray | None = None
    ) -> Step:
        """One rule: it refused those with its name as the reason; `found` says of each row what it had."""
        refused = self.left & (self.reason == name) & (True if refused is None else refused)
        entered = int(self.left.sum())
        self.left = self.left & ~refused
        kinds = [name] * int(refused.sum()) if found is None else [str(text) for text in found[refused]]
        return Step(name, rule, entered, int(self.left.sum()), _by_number(Counter(kinds)))

    def _filter(self, rule: Filter) -> Step:
        """Several filters may judge one column; the values tell which one it was."""
        values = self._values(rule.column)
        unknown, reached = np.isnan(values), self.left
        known = values[reached & ~unknown]
        lower, said, bound = _bound(rule, known)
        with np.errstate(invalid="ignore"):
            crossed = np.zeros(len(values), bool) if bound is None else values < bound if lower else values > bound
        found = np.where(unknown, "unknown", "below" if lower else "above")
        step = self._step(rule.column, said, crossed | unknown, found)
        step.column, step.threshold = rule.column, bound
        # A value that equals an upper bound stays: it belongs to the left of the cut.
        cut = bound if bound is None or lower else float(np.nextafter(bound, np.inf))
        step.histogram = histogram(known, cut, int((reached & unknown).sum()))
        return step

    def _values(self, name: str) -> np.ndarray:
        """A numeric column as float64 in the order of the ledger, NaN where unknown."""
        if name not in DERIVED:
            return self._column(name).cast(pa.float64()).to_numpy()
        sizes = pa.table({side: self._column(side) for side in ("width", "height")})
        return with_derived(sizes)[name].to_numpy()

    def _column(self, name: str) -> pa.ChunkedArray:
        """A score of all images in the order of the ledger.

        Raises:
            ValueError: `meta/scores` is not of this ledger.
        """
        scores = pa.concat_tables(self.corpus.read_table(path, ["unit", "row", name]) for path in self._files[name])
        if not scores.select(["unit", "row"]).equals(self.rows.select(["unit", "row"])):
            raise ValueError(f"{self.corpus.url}: scores of {name} and the ledger are of different images; build again")
        return scores[name]

    @cached_property
    def _files(self) -> dict[str, list[str]]:
        """Files of each column, in the order of the units' names, as the ledger's."""
        folders: dict[str, list[str]] = {}
        for path in self.corpus.list("meta/scores", ".parquet"):
            folders.setdefault(path.split("/")[2], []).append(path)
        files: dict[str, list[str]] = {}
        for paths in folders.values():
            with self.corpus.open(paths[0]) as first:
                files |= dict.fromkeys(pq.read_schema(first).names, paths)
        return files


def _bound(rule: Filter, known: np.ndarray) -> tuple[bool, str, float | None]:
    """Whether the bound is a lower one, how the recipe says it, and where it lies (nowhere without any value)."""
    names = ("min", "max", "min_quantile", "max_quantile")
    ((name, value),) = ((name, given) for name in names if (given := getattr(rule, name)) is not None)
    lower = name.startswith("min")
    if name.endswith("quantile"):
        bound = quantile_bound(known, value, lower) if len(known) else None
        return lower, f"{name.replace('_', ' ')} {value:g}", bound
    return lower, f"{name} {value:g}", float(value)
