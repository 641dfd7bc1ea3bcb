"""Decisions over the columns of all images: keep, or drop with the rule and the value that decided.

Rules are queries, never models, so a changed threshold costs seconds. Rules are tried in the order of `RULES`; the
first that refuses an image gives the reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.recipe import Decide, Splits
from schemas.records import Split

COLUMNS = ("unit", "row", "input", "uid", "width", "height", "license", "optout")
Verdict = tuple[np.ndarray, np.ndarray]  # (bool [N]: refused, float64 [N]: the value that was compared)


def decide(images: pa.Table, rules: Decide) -> pa.Table:
    """Judge every image.

    Args:
        images: one row per image with `COLUMNS`, in source order: of equal files the first one stays.
        rules: thresholds.

    Returns:
        `reason` ("" for kept) and `value` per row of `images`, in the same order.
    """
    reason = np.full(len(images), "", dtype=object)
    value = np.full(len(images), -1.0)
    for name, rule in RULES.items():
        refused, compared = rule(images, rules)
        now = refused & (reason == "")
        reason[now], value[now] = name, compared[now]
    return pa.table({"reason": pa.array(reason, pa.string()), "value": pa.array(value)})


def split_of(scene_id: str, splits: Splits) -> Split:
    """The split of a scene: a function of its id alone, so that it never changes when sources are added."""
    share = int.from_bytes(hashlib.sha256(f"split\0{scene_id}".encode()).digest()[:8], "big") / 2**64
    if share < splits.test:
        return "test"
    return "val" if share < splits.test + splits.val else "train"


def _duplicate(images: pa.Table, rules: Decide) -> Verdict:
    uids = images["uid"].to_numpy(zero_copy_only=False)
    _, first = np.unique(uids, return_index=True)
    refused = np.ones(len(uids), bool)
    refused[first] = False
    return refused, np.full(len(uids), -1.0)


def _optout(images: pa.Table, rules: Decide) -> Verdict:
    refused = images["optout"].to_numpy(zero_copy_only=False).astype(bool)
    return refused, np.where(refused, 1.0, -1.0)


def _license(images: pa.Table, rules: Decide) -> Verdict:
    if not rules.licenses:
        return np.zeros(len(images), bool), np.full(len(images), -1.0)
    allowed = pc.is_in(images["license"], pa.array(rules.licenses)).to_numpy(zero_copy_only=False)
    return ~allowed.astype(bool), np.full(len(images), -1.0)


def _min_side(images: pa.Table, rules: Decide) -> Verdict:
    side = np.minimum(*_size(images))
    return side < rules.min_side, side


def _max_aspect(images: pa.Table, rules: Decide) -> Verdict:
    width, height = _size(images)
    aspect = np.maximum(width, height) / np.minimum(width, height)
    return aspect > rules.max_aspect, aspect


def _size(images: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    return images["width"].to_numpy().astype(np.float64), images["height"].to_numpy().astype(np.float64)


RULES: dict[str, Callable[[pa.Table, Decide], Verdict]] = {
    "optout": _optout,
    "license": _license,
    "min_side": _min_side,
    "max_aspect": _max_aspect,
    "duplicate": _duplicate,
}
