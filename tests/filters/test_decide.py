"""Decisions are queries: each rule names the value that decided, and the order of inputs decides among equals only."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from filters.decide import BANS, decide, numeric_columns, quantile_bound, split_of
from filters.dedup import PAIRS
from schemas.decide import Decide, Splits

NOTHING: dict = {"filters": []}


def images(*rows: dict) -> pa.Table:
    defaults = {
        "unit": "u",
        "width": 640,
        "height": 480,
        "license": "CC0-1.0",
        "optout": False,
        "optout_reason": "",
        "ready": "",
    }
    places = ({"row": i, "uid": f"uid{i}", "input": f"{i}.jpg"} for i in range(len(rows)))
    return pa.Table.from_pylist([defaults | place | row for place, row in zip(places, rows, strict=True)])


def scored(**columns: list) -> pa.Table:
    table = images(*({} for _ in next(iter(columns.values()))))
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    return table


def pairs(*rows: tuple[str, str, float]) -> list[pa.Table]:
    names = ("uid_a", "uid_b", "distance", "same")
    return [pa.Table.from_pylist([dict(zip(names, (*row, False), strict=True)) for row in rows], PAIRS)]


def judge(table: pa.Table, found: dict | None = None, **rules: object) -> list[tuple[str, float, str]]:
    return [tuple(v.values()) for v in decide(table, Decide.model_validate(rules), found).to_pylist()]


def reasons(table: pa.Table, found: dict | None = None, **rules: object) -> list[str]:
    return [reason for reason, _, _ in judge(table, found, **rules)]


@pytest.mark.parametrize(
    ("row", "rules", "expected"),
    [
        ({}, {}, ("", -1.0, "")),
        ({"width": 63}, {}, ("min_side", 63.0, "below 64")),
        ({"width": 64, "height": 64}, {}, ("", -1.0, "")),
        ({"width": 400, "height": 100}, {}, ("aspect", 4.0, "above 3")),
        ({"width": 300, "height": 100}, {}, ("", -1.0, "")),
        ({"width": 300, "height": 1}, NOTHING, ("", -1.0, "")),
        ({}, {"filters": [{"column": "pixels", "min": 640 * 480 + 1}]}, ("pixels", 307200.0, "below 307201")),
        ({"license": "CC-BY-NC-4.0"}, {"licenses": ["CC0-1.0"]}, ("license", -1.0, "CC-BY-NC-4.0")),
        ({"license": ""}, {"licenses": ["CC0-1.0"]}, ("license", -1.0, "")),
        ({"license": "anything"}, {}, ("", -1.0, "")),
        ({"optout": True, "optout_reason": "X-Robots-Tag: noai"}, {}, ("optout", 1.0, "X-Robots-Tag: noai")),
        ({"optout": True, "width": 1}, {}, ("optout", 1.0, "")),  # the first rule that refuses gives the reason
    ],
)
def test_each_rule_gives_its_reason_value_and_bound(row, rules, expected):
    assert judge(images(row), **rules) == [expected]


def test_filters_are_tried_in_order_and_say_which_bound_was_crossed():
    table = scored(sharpness=[50.0, 150.0, 900.0], entropy=[1.0, 1.0, 7.0])
    low = {"column": "sharpness", "min": 100}
    assert judge(table, filters=[low, {"column": "entropy", "min": 4}])[:2] == [
        ("sharpness", 50.0, "below 100"),
        ("entropy", 1.0, "below 4"),
    ]
    assert judge(table, filters=[low, {"column": "sharpness", "max": 500}])[2] == ("sharpness", 900.0, "above 500")
    assert reasons(table, filters=[{"column": "entropy", "min": 4}, low]) == ["entropy", "entropy", ""]


@pytest.mark.parametrize("unknown", [None, float("nan")])
@pytest.mark.parametrize("bound", [{"min": 1}, {"max": 1}, {"min_quantile": 0.5}, {"max_quantile": 0.5}])
def test_null_and_nan_are_unknown_and_do_what_the_rule_says(unknown, bound):
    table = scored(clip_score=[1.0, unknown])
    assert judge(table, filters=[{"column": "clip_score", **bound}]) == [
        ("", -1.0, ""),
        ("clip_score", -1.0, "unknown"),
    ]
    assert reasons(table, filters=[{"column": "clip_score", "unknown": "keep", **bound}]) == ["", ""]


def test_a_column_without_any_value_is_no_error():
    table = scored(a=pa.array([None, None], pa.float32()))
    assert reasons(table, filters=[{"column": "a", "min_quantile": 0.5, "unknown": "keep"}]) == ["", ""]


def test_booleans_and_integers_are_numbers():
    table = scored(refusal=[True, False], words=pa.array([3, 5], pa.int32()))
    assert reasons(table, filters=[{"column": "refusal", "max": 0}, {"column": "words", "min": 6}]) == [
        "refusal",
        "words",
    ]


def test_a_quantile_is_of_the_images_that_reach_the_rule():
    values = list(range(10))
    table = scored(a=values, b=values)
    assert reasons(table, filters=[{"column": "a", "min_quantile": 0.3}]) == ["a"] * 3 + [""] * 7
    assert reasons(table, filters=[{"column": "a", "max_quantile": 0.9}]) == [""] * 9 + ["a"]
    after = reasons(table, filters=[{"column": "a", "min": 5}, {"column": "b", "min_quantile": 0.2}])
    assert after == ["a"] * 5 + ["b"] + [""] * 4
    assert judge(table, filters=[{"column": "a", "min_quantile": 0.3}])[0] == ("a", 0.0, "below 3 (quantile 0.3)")


def test_equal_values_are_not_torn_apart_by_a_quantile():
    assert reasons(scored(a=[1, 2, 2, 2, 3]), filters=[{"column": "a", "min_quantile": 0.5}]) == ["a", "", "", "", ""]
    assert reasons(scored(a=[2, 2, 2, 2]), filters=[{"column": "a", "min_quantile": 0.99}]) == [""] * 4


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=60), st.integers(1, 99))
def test_a_quantile_drops_at_most_its_share_and_the_two_directions_mirror_each_other(values, percent):
    array, share = np.array(values, float), percent / 100
    bound = quantile_bound(array, share, lower=True)
    allowed = Fraction(percent, 100) * len(values)
    assert bound in array and (array < bound).sum() <= allowed
    assert (array <= bound).sum() > allowed  # the next larger bound would drop too many
    mirrored = quantile_bound(-array, float(1 - Fraction(percent, 100)), lower=False)
    assert mirrored == -bound


def test_a_quantile_share_is_the_decimal_number_it_is_written_as():
    assert 0.29 * 100 < 29
    assert quantile_bound(np.arange(100.0), 0.29, lower=True) == 29


def test_of_equal_files_the_first_that_is_left_stays_and_the_other_names_it():
    table = images({"uid": "a"}, {"uid": "b"}, {"uid": "a"}, {"uid": "a"})
    assert judge(table)[2:] == [("duplicate", -1.0, "0.jpg")] * 2
    shadow = images({"uid": "a", "license": "?"}, {"uid": "a"}, {"uid": "a"})
    assert reasons(shadow, licenses=["CC0-1.0"]) == ["license", "", "duplicate"]


def test_near_duplicates_name_the_image_that_stays_and_dropped_images_shadow_none():
    table = images({"width": 900}, {"width": 800}, {"width": 700}, {"width": 10})
    found = {"perceptual": pairs(("uid0", "uid1", 4.0), ("uid1", "uid2", 5.0), ("uid2", "uid3", 1.0)), "semantic": []}
    rules = {"dedup": {"perceptual": {}}}
    assert judge(table, found, **rules) == [
        ("", -1.0, ""),
        ("near_duplicate", 4.0, "uid0"),
        ("", -1.0, ""),  # near only to an image that is gone
        ("min_side", 10.0, "below 64"),
    ]
    best_is_small = {"perceptual": pairs(("uid2", "uid3", 1.0))}
    assert reasons(table, best_is_small, filters=[{"column": "min_side", "max": 480}], **rules)[2:] == [
        "",
        "near_duplicate",
    ]


def test_finished_samples_may_share_a_photograph():
    table = images({"ready": "{}"}, {"ready": "{}"}, {}, {})
    found = {"perceptual": pairs(("uid0", "uid1", 0.0), ("uid1", "uid2", 0.0), ("uid2", "uid3", 0.0))}
    assert reasons(table, found, dedup={"perceptual": {}}) == ["", "", "", "near_duplicate"]


def test_semantic_duplicates_come_last_and_say_their_cosine():
    table = scored(quality=[1.0, 2.0, 3.0])
    found = {
        "perceptual": pairs(("uid0", "uid2", 0.0)),
        "semantic": pairs(("uid0", "uid1", 0.01), ("uid1", "uid2", 0.03)),
    }
    dedup = {"perceptual": {}, "semantic": {"column": "e", "threshold": 0.95}, "prefer": ["quality"]}
    verdicts = judge(table, found, dedup=dedup)
    assert [v[0] for v in verdicts] == ["near_duplicate", "semantic_duplicate", ""]
    assert verdicts[1][1:] == (pytest.approx(0.97), "uid2")


def test_bans_come_after_licences_and_before_filters():
    table = images({"license": "?"}, {"width": 1}, {})
    bans = {"ban": ["sha256", "ngram", None], "ban_value": [-1.0, 13.0, -1.0], "ban_detail": ["a:1", "b:2", None]}
    for field in BANS:
        table = table.append_column(field, pa.array(bans[field.name], field.type))
    rules = {"licenses": ["CC0-1.0"], "blocklists": [{"kind": "sha256", "path": "a"}]}
    assert judge(table, **rules) == [("license", -1.0, "?"), ("blocklist:ngram", 13.0, "b:2"), ("", -1.0, "")]


@given(
    st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200), st.integers(0, 4)), min_size=1, max_size=30),
    st.integers(1, 9),
)
def test_every_image_has_one_verdict_and_each_uid_stays_once(rows, tenths):
    table = images(*({"width": w, "height": h, "uid": str(u)} for w, h, u in rows))
    filters = [{"column": "min_side", "min": 50}, {"column": "aspect", "max_quantile": tenths / 10}]
    verdicts = reasons(table, filters=filters)
    assert len(verdicts) == len(rows) and set(verdicts) <= {"", "min_side", "aspect", "duplicate"}
    left = [(w, h, u) for (w, h, u), reason in zip(rows, verdicts, strict=True) if not reason]
    reached = {u for (_, _, u), reason in zip(rows, verdicts, strict=True) if reason in ("", "duplicate")}
    assert len(left) == len({u for _, _, u in left}) == len(reached)
    for (w, h, _), reason in zip(rows, verdicts, strict=True):
        assert (min(w, h) < 50) == (reason == "min_side")


def test_what_is_said_of_kept_images_never_changes():
    table = scored(a=list(range(10)))
    for share in (0.1, 0.2, 0.5):
        verdicts = judge(table, filters=[{"column": "a", "min_quantile": share}])
        assert {v for v in verdicts if not v[0]} == {("", -1.0, "")}


def test_only_columns_that_are_needed_are_asked_for():
    rules = {"filters": [{"column": "aspect", "max": 3}, {"column": "b", "min": 1}], "dedup": {"prefer": ["a"]}}
    assert numeric_columns(Decide.model_validate(rules)) == ["b"]  # without dedup nothing is preferred
    rules["dedup"]["perceptual"] = {}
    assert numeric_columns(Decide.model_validate(rules)) == ["a", "b"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"filters": [{"column": "a"}]}, "exactly one of min, max, min_quantile, max_quantile, here: none"),
        ({"filters": [{"column": "a", "min": 1, "max": 2}]}, "here: min and max; two bounds are two filters"),
        ({"filters": [{"column": "a", "min_quantile": 1.0}]}, "less than 1"),
        ({"filters": [{"column": "a", "min_quantile": 0}]}, "greater than 0"),
        ({"filters": [{"column": "a", "min": float("nan")}]}, "finite"),
        ({"min_side": 64}, "min_side"),
        ({"dedup": {"perceptual": {"radius": 11}}}, "less than or equal to 10"),
        ({"dedup": {"semantic": None}}, "column"),
        ({"blocklists": [{"kind": "sha1", "path": "x"}]}, "'sha256', 'phash', 'embedding', 'ngram', 'canary'"),
    ],
)
def test_mistakes_in_the_section_are_explained(rules, message):
    with pytest.raises(ValidationError, match=message):
        Decide.model_validate(rules)


def test_the_section_survives_its_json_form_and_an_empty_key_means_its_defaults():
    rules = Decide.model_validate({"dedup": {"perceptual": None}})
    assert rules.dedup.perceptual is not None and rules.dedup.perceptual.radius == 6
    for given_rules in (rules, Decide()):
        assert Decide.model_validate(given_rules.model_dump(mode="json")) == given_rules
    assert Decide().dedup.perceptual is None


def test_splits_follow_the_scene_alone_and_have_the_asked_sizes():
    splits = Splits(val=0.1, test=0.2)
    scenes = [f"scene-{i}" for i in range(5000)]
    drawn = np.array([split_of(s, splits) for s in scenes])
    assert [split_of(s, splits) for s in scenes] == drawn.tolist()
    assert abs((drawn == "test").mean() - 0.2) < 0.02 and abs((drawn == "val").mean() - 0.1) < 0.02
    more = Splits(val=0.2, test=0.2)  # a larger val share takes from train only
    assert all(split_of(s, more) == d for s, d in zip(scenes, drawn, strict=True) if d != "train")
    assert {split_of(s, Splits()) for s in scenes} == {"train"}
