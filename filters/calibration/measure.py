"""Recall and false rejects of one filter on one fault, and the threshold that half of the images would choose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from filters.decide import quantile_bound
from schemas.decide import Filter

RECALL_AIM, FALSE_REJECT_AIM = 0.95, 0.05

# Thresholds of the weight-free columns are chosen by `x2i calibrate` itself; see docs/calibration.md.
DEFAULTS: dict[str, tuple[Filter, ...]] = {
    "blur": (Filter(column="blur", max=1.2), Filter(column="sharpness", min=30)),
    "noise": (Filter(column="noise", max=2.7),),
    "upscale": (Filter(column="detail", min=-19),),
    "letterbox": (Filter(column="letterbox", max=0.02),),
    "collage": (Filter(column="collage", max=0.45),),
    "qr": (Filter(column="qr", max=0.01),),
    "placeholder": (Filter(column="entropy", min=2), Filter(column="flatness", max=0.95)),
    "overlay": (Filter(column="text_area", max=0.02), Filter(column="watermark", max=0.8)),
    "caption_swap": (Filter(column="conse_score", min_quantile=0.05), Filter(column="clip_score", min_quantile=0.05)),
    "nsfw": (Filter(column="nsfw", max=0.5),),
}
_PIXELS = ("blur", "sharpness", "noise", "detail", "letterbox", "collage", "qr", "entropy", "flatness")
SCORER_OF = dict.fromkeys(_PIXELS, "pixels") | {
    "text_area": "text",
    "watermark": "watermark",
    "conse_score": "conse",
    "clip_score": "clip",
    "nsfw": "nsfw",
}


@dataclass(frozen=True)
class Values:
    """A column on clean and on faulty images: float64, NaN where unknown, and which of them tune."""

    clean: np.ndarray
    faulty: np.ndarray
    clean_tunes: np.ndarray
    faulty_tunes: np.ndarray

    def half(self, tuning: bool) -> tuple[np.ndarray, np.ndarray]:
        """Clean and faulty values of the tuning half, or of the other one, on which results are reported."""
        return self.clean[self.clean_tunes == tuning], self.faulty[self.faulty_tunes == tuning]


@dataclass(frozen=True)
class Check:
    """What a filter made of one fault.

    Attributes:
        rule: the filter and its threshold, in words.
        clean, faulty: bool, one per image: refused. Both empty where `not_measured` says what is missing.
        values, bound, suggested: of a filter over a column: what it compared, and the threshold that the tuning half
            would choose.
    """

    fault: str
    severity: str
    rule: str
    clean: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    faulty: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    note: str = ""
    not_measured: str = ""
    column: str = ""
    values: Values | None = None
    bound: float = math.nan
    suggested: float = math.nan

    @property
    def recall(self) -> float:
        """Share of the faulty images that are refused; NaN where there are none."""
        return float(self.faulty.mean()) if len(self.faulty) else math.nan

    @property
    def false_reject(self) -> float:
        """Share of the clean images that are refused; NaN where there are none."""
        return float(self.clean.mean()) if len(self.clean) else math.nan

    @property
    def reaches_aim(self) -> bool:
        return self.recall >= RECALL_AIM and self.false_reject <= FALSE_REJECT_AIM

    def to_json(self) -> dict[str, Any]:
        """Plain values; a NaN becomes None."""
        counts = {"faulty": len(self.faulty), "clean": len(self.clean), "reaches_aim": self.reaches_aim}
        plain = {name: getattr(self, name) for name in ("fault", "severity", "rule", "column", "note", "not_measured")}
        numbers = {"recall": self.recall, "false_reject": self.false_reject, "suggested": self.suggested}
        auc = {"auc": roc_auc(self.values, self.rule)} if self.values else {}
        return plain | counts | {k: None if math.isnan(v) else round(v, 4) for k, v in (numbers | auc).items()}


def check_column(fault: str, severity: str, rule: Filter, values: Values, note: str = "") -> Check:
    """Judge the reporting half by a filter of a recipe; quantiles are those of its clean images."""
    clean, faulty = values.half(tuning=False)
    bound = _bound(rule, clean)
    return Check(
        fault,
        severity,
        describe(rule),
        clean=refused(clean, rule, bound),
        faulty=refused(faulty, rule, bound),
        note=note,
        column=rule.column,
        values=values,
        bound=bound,
        suggested=suggest(*values.half(tuning=True), keeps_high(rule)),
    )


def describe(rule: Filter) -> str:
    """`blur ≤ 1.2`, `conse_score ≥ quantile 0.05`: what stays."""
    for name in ("min", "max", "min_quantile", "max_quantile"):
        value = getattr(rule, name)
        if value is not None:
            quantile = "quantile " if name.endswith("quantile") else ""
            return f"{rule.column} {'≥' if name.startswith('min') else '≤'} {quantile}{value:g}"
    raise AssertionError("a filter has one bound")


def keeps_high(rule: Filter) -> bool:
    """Whether large values are the good ones."""
    return rule.min is not None or rule.min_quantile is not None


def refused(values: np.ndarray, rule: Filter, bound: float) -> np.ndarray:
    """What the filter drops, bool [n]: a value equal to the bound stays, an unknown one goes as the filter says."""
    beyond = values < bound if keeps_high(rule) else values > bound
    return beyond | (np.isnan(values) & (rule.unknown == "drop"))


def suggest(clean: np.ndarray, faulty: np.ndarray, high_is_good: bool) -> float:
    """The threshold with the largest recall minus false rejects (Youden's J); of equal ones the middle.

    NaN if there are no values.
    """
    sign = 1.0 if high_is_good else -1.0
    good, bad = (np.sort(sign * side[~np.isnan(side)]) for side in (clean, faulty))
    if not len(good) or not len(bad):
        return math.nan
    every = np.unique(np.concatenate([good, bad]))
    cuts = (every[1:] + every[:-1]) / 2
    if not len(cuts):
        return math.nan
    youden = np.searchsorted(bad, cuts) / len(bad) - np.searchsorted(good, cuts) / len(good)
    best = np.flatnonzero(youden >= youden.max() - 1e-12)
    return float(sign * cuts[best[len(best) // 2]])


def roc(values: Values, high_is_good: bool) -> tuple[np.ndarray, np.ndarray]:
    """False-reject rate and recall of the reporting half at every threshold, each rising from 0 to 1."""
    sign = 1.0 if high_is_good else -1.0
    clean, faulty = (np.sort(sign * side[~np.isnan(side)]) for side in values.half(tuning=False))
    cuts = np.unique(np.concatenate([clean, faulty, [np.inf]]))
    return np.searchsorted(clean, cuts) / max(1, len(clean)), np.searchsorted(faulty, cuts) / max(1, len(faulty))


def roc_auc(values: Values, rule: str) -> float:
    """Area under the ROC curve: how often a faulty image scores worse than a clean one (ties count half)."""
    x, y = roc(values, "≥" in rule)
    return float(np.trapezoid(y, x))


def rules_for(fault: str, filters: Sequence[Filter] = ()) -> list[Filter]:
    """The default rules against a fault, or those of a recipe for the same columns where it has some."""
    own = {rule.column: rule for rule in filters}
    return [own.get(rule.column, rule) for rule in DEFAULTS[fault]]


def _bound(rule: Filter, clean: np.ndarray) -> float:
    if rule.min is not None:
        return rule.min
    if rule.max is not None:
        return rule.max
    share = rule.min_quantile if rule.min_quantile is not None else rule.max_quantile
    known = clean[~np.isnan(clean)]
    assert share is not None
    return quantile_bound(known, share, keeps_high(rule)) if len(known) else math.nan
