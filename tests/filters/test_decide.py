"""Decisions are queries: each rule names the value that decided, and the order of inputs decides among equals only."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.decide import RULES, decide, split_of
from schemas.recipe import Decide, Splits


def images(*rows: dict) -> pa.Table:
    defaults = {"unit": "u", "input": "x", "width": 640, "height": 480, "license": "CC0-1.0", "optout": False}
    return pa.Table.from_pylist([defaults | {"row": i, "uid": f"uid{i}"} | row for i, row in enumerate(rows)])


def reasons(table: pa.Table, **rules: object) -> list[tuple[str, float]]:
    verdicts = decide(table, Decide.model_validate(rules)).to_pylist()
    return [(v["reason"], v["value"]) for v in verdicts]


@pytest.mark.parametrize(
    ("row", "rules", "expected"),
    [
        ({}, {}, ("", -1.0)),
        ({"width": 63}, {"min_side": 64}, ("min_side", 63.0)),
        ({"width": 64, "height": 64}, {"min_side": 64}, ("", -1.0)),
        ({"width": 400, "height": 100}, {"max_aspect": 3.0}, ("max_aspect", 4.0)),
        ({"width": 300, "height": 100}, {"max_aspect": 3.0}, ("", -1.0)),
        ({"license": "CC-BY-NC-4.0"}, {"licenses": ["CC0-1.0"]}, ("license", -1.0)),
        ({"license": ""}, {"licenses": ["CC0-1.0"]}, ("license", -1.0)),
        ({"license": "anything"}, {}, ("", -1.0)),
        ({"optout": True}, {}, ("optout", 1.0)),
        ({"optout": True, "width": 1}, {}, ("optout", 1.0)),  # the first rule that refuses gives the reason
    ],
)
def test_each_rule_gives_its_reason_and_value(row, rules, expected):
    assert reasons(images(row), **rules) == [expected]


def test_of_equal_files_the_first_stays():
    table = images({"uid": "a"}, {"uid": "b"}, {"uid": "a"}, {"uid": "a"})
    assert [r for r, _ in reasons(table)] == ["", "", "duplicate", "duplicate"]


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200), st.integers(0, 4)), min_size=1, max_size=30))
def test_every_image_has_one_verdict_and_each_uid_stays_once(rows):
    table = images(*({"width": w, "height": h, "uid": str(u)} for w, h, u in rows))
    verdicts = reasons(table, min_side=50, max_aspect=2.0)
    assert len(verdicts) == len(rows) and {r for r, _ in verdicts} <= {"", *RULES}
    kept = [str(u) for (_, _, u), (reason, _) in zip(rows, verdicts, strict=True) if not reason]
    assert len(kept) == len(set(kept))
    for (w, h, _), (reason, _) in zip(rows, verdicts, strict=True):
        assert (min(w, h) < 50) == (reason == "min_side") or reason == "duplicate"


def test_splits_follow_the_scene_alone_and_have_the_asked_sizes():
    splits = Splits(val=0.1, test=0.2)
    scenes = [f"scene-{i}" for i in range(5000)]
    drawn = np.array([split_of(s, splits) for s in scenes])
    assert [split_of(s, splits) for s in scenes] == drawn.tolist()
    assert abs((drawn == "test").mean() - 0.2) < 0.02 and abs((drawn == "val").mean() - 0.1) < 0.02
    more = Splits(val=0.2, test=0.2)  # a larger val share takes from train only
    assert all(split_of(s, more) == d for s, d in zip(scenes, drawn, strict=True) if d != "train")
    assert {split_of(s, Splits()) for s in scenes} == {"train"}
