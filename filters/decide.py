"""Decisions over the columns of all images: keep, or drop with the rule and the value that decided.

Rules are queries, never models, so a changed threshold costs seconds. The order of judgement is fixed: opt-out,
licence, block lists, filters as listed, equal files, near duplicates, semantic duplicates. The first rule that refuses
an image gives the reason, and a refused image takes no further part: it moves no quantile, and nothing is dropped as
its duplicate.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from filters.dedup import first_of_equal, keep
from schemas.decide import Decide, Filter, Splits
from schemas.records import Split

COLUMNS = ("unit", "row", "input", "uid", "width", "height", "license", "optout", "optout_reason", "ready")
DERIVED = ("min_side", "aspect", "pixels")
BANS = pa.schema([("ban", pa.string()), ("ban_value", pa.float64()), ("ban_detail", pa.string())])
NO_VALUE = -1.0


def decide(images: pa.Table, rules: Decide, pairs: Mapping[str, Sequence[pa.Table]] | None = None) -> pa.Table:
    """Judge every image.

    Args:
        images: one row per image with `COLUMNS`, in source order: of equal files the first one stays. Further the
            `numeric_columns` of the rules and, where there are block lists, `BANS` of `filters.blocklists.ban`.
        rules: thresholds.
        pairs: tables of `filters.dedup.PAIRS` for `perceptual` and `semantic`, where the rules ask for it.

    Returns:
        Per row of `images`, in the same order: `reason` (string, "" for kept), `value` (float64, what was compared,
        or -1) and `detail` (string, whom it was compared with). Those of a kept image never change.

    Raises:
        KeyError: a column that a rule needs is missing.
    """
    images = with_derived(images)
    verdicts = _Verdicts(len(images))
    _refuse_by_law(images, rules, verdicts)
    if rules.blocklists:
        _refuse_banned(images, verdicts)
    for rule in rules.filters:
        _refuse_by_value(images, rule, verdicts)
    _refuse_duplicates(images, rules, pairs or {}, verdicts)
    return verdicts.table()


def numeric_columns(rules: Decide) -> list[str]:
    """Columns that `decide` reads beyond those that every image has."""
    wanted = [rule.column for rule in rules.filters]
    if rules.dedup.perceptual or rules.dedup.semantic:
        wanted += rules.dedup.prefer
    return sorted(set(wanted) - {*COLUMNS, *DERIVED})


def split_of(scene_id: str, splits: Splits) -> Split:
    """The split of a scene: a function of its id alone, so that it never changes when sources are added."""
    share = int.from_bytes(hashlib.sha256(f"split\0{scene_id}".encode()).digest()[:8], "big") / 2**64
    if share < splits.test:
        return "test"
    return "val" if share < splits.test + splits.val else "train"


def quantile_bound(values: np.ndarray, share: float, lower: bool) -> float:
    """The bound that drops the lowest `share` of the values (or keeps the lowest `share`, if it is an upper bound).

    It is always one of the values, which stays, with all that equal it: of n values a lower bound drops at most
    floor(share n), an upper one at most floor((1 - share) n), and just as many if none are equal. `share` counts as
    the decimal number that it prints as: 0.29 of 100 are 29, in spite of what binary fractions make of it.

    Args:
        values: float64 [n], n > 0, no NaN.
        share: 0 < share < 1.
        lower: whether values below the bound are dropped, or those above.
    """
    count = Fraction(str(share)) * len(values)
    place = math.floor(count) if lower else math.ceil(count) - 1
    return float(np.partition(values, place)[place])


class _Verdicts:
    """What was decided so far: every row is left or has been refused once."""

    def __init__(self, count: int) -> None:
        self._reasons, self._reason = [""], np.zeros(count, np.int64)
        self._details, self._detail = [pa.array([""])], np.zeros(count, np.int64)
        self._value = np.full(count, NO_VALUE)

    @property
    def left(self) -> np.ndarray:
        """Rows that no rule has refused, in order."""
        return np.flatnonzero(self._reason == 0)

    def refuse(
        self, rows: np.ndarray, reason: str, value: np.ndarray | float = NO_VALUE, detail: str | pa.Array = ""
    ) -> None:
        """Drop rows that are left; `value` and `detail` are of all of them or one for each."""
        self._reason[rows] = len(self._reasons)
        self._reasons.append(reason)
        self._value[rows] = value
        start = sum(map(len, self._details))
        shared = isinstance(detail, str)
        self._detail[rows] = start if shared else start + np.arange(len(rows))
        self._details.append(pa.array([detail]) if shared else detail)

    def table(self) -> pa.Table:
        reason = pa.array(self._reasons).take(pa.array(self._reason))
        detail = pa.concat_arrays(self._details).take(pa.array(self._detail))
        return pa.table({"reason": reason, "value": self._value, "detail": detail})


def with_derived(images: pa.Table) -> pa.Table:
    images = images.combine_chunks()
    width, height = (images[name].to_numpy().astype(np.float64) for name in ("width", "height"))
    low, high = np.minimum(width, height), np.maximum(width, height)
    for name, values in zip(DERIVED, (low, high / low, width * height), strict=True):
        images = images.append_column(name, pa.array(values))
    return images


def _refuse_by_law(images: pa.Table, rules: Decide, verdicts: _Verdicts) -> None:
    asked = np.flatnonzero(images["optout"].to_numpy())
    verdicts.refuse(asked, "optout", 1.0, _take(images, "optout_reason", asked))
    if rules.licenses:
        left = verdicts.left
        licenses = _take(images, "license", left)
        other = np.flatnonzero(~pc.is_in(licenses, pa.array(rules.licenses)).to_numpy(zero_copy_only=False))
        verdicts.refuse(left[other], "license", detail=licenses.take(pa.array(other)))


def _refuse_banned(images: pa.Table, verdicts: _Verdicts) -> None:
    left = verdicts.left
    bans = _take(images, "ban", left)
    for ban in sorted(bans.unique().drop_null().to_pylist()):
        rows = left[np.flatnonzero(pc.fill_null(pc.equal(bans, ban), False).to_numpy(zero_copy_only=False))]
        value = images["ban_value"].to_numpy()[rows]
        verdicts.refuse(rows, f"blocklist:{ban}", value, _take(images, "ban_detail", rows))


def _refuse_by_value(images: pa.Table, rule: Filter, verdicts: _Verdicts) -> None:
    left = verdicts.left
    values = images[rule.column].cast(pa.float64()).to_numpy()[left]
    known = ~np.isnan(values)
    if rule.unknown == "drop":
        verdicts.refuse(left[~known], rule.column, detail="unknown")
    if not known.any():
        return
    bound, lower, detail = _bound(rule, values[known])
    with np.errstate(invalid="ignore"):
        refused = values < bound if lower else values > bound
    verdicts.refuse(left[refused], rule.column, values[refused], detail)


def _bound(rule: Filter, values: np.ndarray) -> tuple[float, bool, str]:
    """The bound, whether it is a lower one, and how to say that it was crossed."""
    lower = rule.min is not None or rule.min_quantile is not None
    absolute, share = (rule.min, rule.min_quantile) if lower else (rule.max, rule.max_quantile)
    bound = quantile_bound(values, share, lower) if share is not None else float(absolute)  # type: ignore[arg-type]
    crossed = f"{'below' if lower else 'above'} {bound:.6g}"
    return bound, lower, crossed if share is None else f"{crossed} (quantile {share:g})"


def _refuse_duplicates(
    images: pa.Table, rules: Decide, pairs: Mapping[str, Sequence[pa.Table]], verdicts: _Verdicts
) -> None:
    # Finished samples may share a photograph: one photograph, edited in several ways.
    photographs = pc.equal(images["ready"], "").to_numpy()
    left = verdicts.left
    first = first_of_equal(images["uid"].take(pa.array(left)))
    copies = np.flatnonzero(first != np.arange(len(left)))
    verdicts.refuse(left[copies], "duplicate", detail=_take(images, "input", left[first[copies]]))
    for kind, reason in (("perceptual", "near_duplicate"), ("semantic", "semantic_duplicate")):
        if getattr(rules.dedup, kind) is None:
            continue
        left = verdicts.left
        left = left[photographs[left]]
        judged = images.select(dict.fromkeys(["uid", *rules.dedup.prefer])).take(pa.array(left))
        duplicates = keep(judged, rules.dedup.prefer, pairs[kind])
        lost = np.flatnonzero(duplicates.of >= 0)
        gap = duplicates.distance[lost]
        value = 1 - gap if kind == "semantic" else gap  # a cosine, as the threshold is
        verdicts.refuse(left[lost], reason, value, _take(images, "uid", left[duplicates.of[lost]]))


def _take(images: pa.Table, column: str, rows: np.ndarray) -> pa.Array:
    return images[column].combine_chunks().take(pa.array(rows, pa.int64()))
