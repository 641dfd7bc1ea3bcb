"""Pairs obey every rule, whatever the crops and their order; a judge's answers and the caps decide about the rest."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from filters.pairs import (
    CANDIDATES,
    CROPS,
    DINO_BAND,
    RULES,
    band_of,
    choose,
    match,
    nearest,
    questions,
    sides,
    sorted_candidates,
    verify,
)
from schemas.pairs import Judge, Pairing

BAND = (0.5, 0.9)
FAR = (0x0, 0xFFFFFFFF, 0xFFFF0000FFFF0000, 0x5555555555555555)  # hashes that differ in 32 bits


def crops(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of `CROPS`; whatever is not given differs from row to row, but for the noun and the split."""
    made = []
    rng = np.random.default_rng(5)
    for number, row in enumerate(rows):
        hashes = rng.integers(0, 2**64, 4, dtype=np.uint64).tolist()
        unknown = {"unit": "u-000000", "row": number, "uid": f"{number:04d}", "entity": 0, "noun": "cup"}
        unknown |= {"subject_id": "", "scene_id": f"scene-{number}", "split": "train"}
        unknown |= dict(zip(("phash", "phash_mirror", "crop_phash", "crop_phash_mirror"), hashes, strict=True))
        made.append(unknown | row)
    return pa.Table.from_pylist(made, CROPS)


def at_angles(*degrees: float) -> np.ndarray:
    """Vectors in a plane: the cosine of two is that of the angle between them."""
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def fates(candidates: pa.Table) -> dict[tuple[str, str], str]:
    return {(row["uid"], row["other"]): row["reason"] for row in candidates.to_pylist()}


def test_the_band_refuses_strangers_and_copies() -> None:
    found = match(crops([{}] * 3), at_angles(0, 40, 95), Pairing(), BAND)  # cosines .77, .57, -.09
    assert found.schema.equals(CANDIDATES)
    expected = {("0000", "0001"): "", ("0000", "0002"): "too_different", ("0001", "0002"): ""}
    assert fates(found) == {**expected, **{pair[::-1]: reason for pair, reason in expected.items()}}
    assert found["similarity"].to_pylist()[0] == pytest.approx(np.cos(np.radians(40)), abs=1e-3)
    copies = match(crops([{}] * 2), at_angles(0, 10), Pairing(), BAND)
    assert set(fates(copies).values()) == {"too_similar"}


@pytest.mark.parametrize(
    ("shared", "reason"),
    [
        ({"scene_id": "kitchen"}, "same_scene"),
        ({"phash": 7}, "near_duplicate"),
        ({"crop_phash": 7}, "near_duplicate"),
        ({"phash": 255}, "near_duplicate"),
    ],
)
def test_what_two_photographs_must_not_share(shared: dict[str, Any], reason: str) -> None:
    first = {name: 0 if value == 255 else value for name, value in shared.items()}  # eight bits apart
    found = match(crops([first, shared]), at_angles(0, 40), Pairing(), BAND)
    assert set(fates(found).values()) == {reason}


def test_a_mirrored_copy_is_a_copy() -> None:
    found = match(crops([{"phash": 7}, {"phash_mirror": 7}]), at_angles(0, 40), Pairing(), BAND)
    assert fates(found)[("0000", "0001")] == "near_duplicate"


def test_only_one_noun_or_one_subject_is_compared() -> None:
    rows = [{"noun": "cup"}, {"noun": "jug"}, {"noun": "jug", "subject_id": "a"}, {"noun": "mug", "subject_id": "a"}]
    rows += [{"noun": "mug", "subject_id": "b"}]
    found = match(crops(rows), at_angles(0, 30, 60, 90, 120), Pairing(), BAND)
    pairs = {frozenset((row["uid"], row["other"])): row["evidence"] for row in found.to_pylist()}
    assert pairs == {frozenset(("0001", "0002")): "features", frozenset(("0002", "0003")): "subject_id"}


def test_a_subject_may_look_different_but_not_the_same() -> None:
    subject = {"subject_id": "toys/duck", "scene_id": "toys/duck"}
    rules = Pairing(min_similarity=-0.5)
    found = fates(match(crops([subject] * 4), at_angles(0, 5, 90, 180), rules, BAND))
    assert found[("0000", "0001")] == "too_similar"  # a copy, whoever vouches for it
    assert found[("0000", "0002")] == ""  # below the band, and in one scene
    assert found[("0000", "0003")] == "stranger"
    assert fates(match(crops([subject] * 2), at_angles(0, 90), Pairing(min_similarity=0.1), BAND)) == {
        ("0000", "0001"): "stranger",
        ("0001", "0000"): "stranger",
    }


def test_splits_are_never_crossed() -> None:
    rows = [{"split": "train", "subject_id": "a"}, {"split": "val", "subject_id": "a"}]
    assert set(fates(match(crops(rows), at_angles(0, 40), Pairing(), BAND)).values()) == {"other_split"}


def random_crops(count: int, seed: int) -> tuple[pa.Table, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = [
        {
            "uid": f"{i // 2:04d}",
            "entity": i % 2,
            "noun": str(rng.choice(["cup", "jug"])),
            "subject_id": str(rng.choice(["", "", "a", "b"])),
            "scene_id": f"scene-{rng.integers(3)}",
            "split": str(rng.choice(["train", "train", "val"])),
            **{name: int(FAR[rng.integers(4)]) for name in ("phash", "phash_mirror")},
        }
        for i in range(count)
    ]
    return crops(rows), rng.normal(size=(count, 4)).astype(np.float16)


@settings(max_examples=40)
@given(count=st.integers(0, 24), seed=st.integers(0, 1000), caps=st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_every_chosen_pair_obeys_every_rule(count: int, seed: int, caps: tuple[int, int]) -> None:
    table, vectors = random_crops(count, seed)
    rules = Pairing(max_per_image=caps[0], max_reuse=caps[1], min_similarity=-0.3)
    found = choose(match(table, vectors, rules, BAND), rules)
    about = {(row["uid"], row["entity"]): row for row in table.to_pylist()}
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    place = {side: i for i, side in enumerate(about)}
    assert set(found["reason"].to_pylist()) <= {"", *RULES}
    chosen = [row for row in found.to_pylist() if not row["reason"]]
    for row in chosen:
        target, other = sides(row)
        one, two = about[target], about[other]
        assert one["uid"] != two["uid"] and one["split"] == two["split"]
        assert row["similarity"] == pytest.approx(unit[place[target]] @ unit[place[other]], abs=2e-3)
        assert row["similarity"] <= BAND[1]
        assert bin(one["phash"] ^ two["phash"]).count("1") > 8
        if row["evidence"] == "subject_id":
            assert one["subject_id"] == two["subject_id"] != "" and row["similarity"] >= -0.3
        else:
            assert one["noun"] == two["noun"] and one["scene_id"] != two["scene_id"]
            assert row["similarity"] >= BAND[0] and "" in (one["subject_id"], two["subject_id"])
    assert max(Counter(row["uid"] for row in chosen).values(), default=0) <= caps[0]
    assert max(Counter(row["other"] for row in chosen).values(), default=0) <= caps[1]


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), shuffle=st.permutations(range(16)))
def test_the_order_of_the_crops_changes_nothing(seed: int, shuffle: list[int]) -> None:
    table, vectors = random_crops(16, seed)
    rules = Pairing(max_per_image=1, max_reuse=1, candidates=3)
    expected = choose(match(table, vectors, rules, BAND), rules)
    mixed = choose(match(table.take(pa.array(shuffle)), vectors[shuffle], rules, BAND), rules)
    assert mixed.equals(expected)
    reversed_rows = expected.set_column(
        CANDIDATES.get_field_index("reason"), "reason", match(table, vectors, rules, BAND)["reason"]
    ).take(pa.array(range(len(expected))[::-1], pa.int64()))
    assert sorted_candidates(choose(reversed_rows, rules)).equals(expected)


def test_the_most_similar_pairs_use_up_the_caps() -> None:
    found = match(crops([{}] * 3), at_angles(0, 30, 57), Pairing(), BAND)  # cosines .87, .89 and .54
    chosen = fates(choose(found, Pairing(max_per_image=1, max_reuse=1)))
    assert [pair for pair, reason in chosen.items() if not reason] == [("0001", "0002"), ("0002", "0001")]
    assert chosen[("0000", "0001")] == "reuse_cap" and chosen[("0001", "0000")] == "image_cap"


def test_a_large_noun_is_compared_within_clusters() -> None:
    """Four bundles of crops: with clusters of about one bundle, what is in one bundle still finds its like."""
    rng = np.random.default_rng(2)
    centres = np.linalg.qr(rng.normal(size=(16, 16)))[0][:4]
    vectors = np.repeat(centres, 30, axis=0) + rng.normal(size=(120, 16)) * 0.12
    table = crops([{}] * 120)
    exact, clustered = (match(table, vectors, Pairing(cluster_crops=size), (0.6, 0.99)) for size in (10_000, 40))
    open_pairs = [{p for p, reason in fates(found).items() if not reason} for found in (exact, clustered)]
    assert len(open_pairs[0] & open_pairs[1]) >= 0.9 * len(open_pairs[0])


@given(
    st.lists(st.lists(st.sampled_from([-np.inf, 0.1, 0.5, 0.5, 0.9]), min_size=5, max_size=5), min_size=1),
    st.integers(1, 7),
)
def test_nearest_takes_the_largest_and_of_equal_ones_the_first(rows: list[list[float]], count: int) -> None:
    found: dict[int, list[int]] = {}
    for row, column in zip(*nearest(np.array(rows), count), strict=True):
        found.setdefault(int(row), []).append(int(column))
    for number, row in enumerate(rows):
        finite = [i for i in range(5) if np.isfinite(row[i])]
        assert found.get(number, []) == sorted(finite, key=lambda i: (-row[i], i))[:count]


def subject_of(count: int) -> pa.Table:
    return match(crops([{"subject_id": "pets/rex"}] * count), at_angles(*range(0, 30 * count, 30)), Pairing(), BAND)


def test_each_pair_is_asked_about_once_and_subjects_against_a_few() -> None:
    asked = questions(subject_of(5), others=1)
    assert all(one < two for one, two in asked) and set(asked.values()) == {"cup"}
    assert {side for question in asked for side in question} == {(f"000{i}", 0) for i in range(5)}
    assert len(asked) <= 4  # with one of its neighbours each
    assert len(questions(subject_of(5), others=8)) == len(subject_of(5).filter(pc.field("reason") == "")) / 2


def test_a_photograph_that_is_not_recognised_leaves_its_subject() -> None:
    found = subject_of(4)
    stranger = ("0003", 0)
    answers = {question: stranger not in question for question in questions(found, 8)}
    kept = verify(found, answers, min_yes=0.5)
    reasons = {reason for pair, reason in fates(kept).items() if "0003" in pair}
    assert reasons == {"judge_ratio"}
    assert any(not reason for pair, reason in fates(kept).items() if "0003" not in pair)
    nobody = verify(found, dict.fromkeys(answers), min_yes=0.5)
    assert set(nobody["reason"].to_pylist()) - {"too_different"} == {"judge_unreadable"}


def test_pairs_of_a_noun_need_a_yes_of_their_own() -> None:
    found = match(crops([{}] * 3), at_angles(0, 28, 56), Pairing(), BAND)
    one, two, three = ((f"000{i}", 0) for i in range(3))
    kept = verify(found, {(one, two): True, (two, three): None, (one, three): False}, min_yes=0.5)
    said = {(row["uid"], row["other"]): (row["reason"], row["evidence"]) for row in kept.to_pylist()}
    assert said[("0001", "0000")] == said[("0000", "0001")] == ("", "judge")
    assert said[("0001", "0002")] == ("judge_unreadable", "features")
    assert said[("0002", "0000")] == ("judge_no", "features")


def test_the_band_is_the_model_s_unless_the_recipe_has_one() -> None:
    assert band_of(Pairing(), "facebook/dinov2-base") == DINO_BAND
    assert band_of(Pairing(), "efficientnet-lite0") != DINO_BAND
    assert band_of(Pairing(band=(0.1, 0.2)), "efficientnet-lite0") == (0.1, 0.2)


def test_bad_rules_are_told() -> None:
    with pytest.raises(ValidationError, match=r"\[0.9, 0.5\] is not \[low, high\]"):
        Pairing(band=(0.9, 0.5))
    with pytest.raises(ValidationError, match="prompt"):
        Judge(model="/models/judge", prompt="Is the {thing} the same?")
    with pytest.raises(ValidationError, match="no base_url is given"):
        Judge(model="judge")
