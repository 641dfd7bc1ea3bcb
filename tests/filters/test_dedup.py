"""Near duplicates: the pairs are those of comparing everything, and so is the choice among them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.clusters import assign, cluster_count, fit, unit_vectors
from filters.dedup import PAIRS, PerceptualPairs, first_of_equal, keep, preference_order, semantic_pairs
from schemas.decide import SemanticDedup


def uids(count: int) -> list[str]:
    return [hashlib.sha256(str(i).encode()).hexdigest() for i in range(count)]


def greedy(images: list[dict], near) -> dict[str, tuple[str, float]]:
    """The rule, word by word: uid -> (uid that stays for it, distance). `near(a, b)` is their distance or None."""
    order = sorted(images, key=lambda i: (i["score"] is None, -(i["score"] or 0), i["uid"]))
    kept, dropped = [], {}
    for image in order:
        for other in kept:
            if (distance := near(image, other)) is not None:
                dropped[image["uid"]] = (other["uid"], distance)
                break
        else:
            kept.append(image)
    return dropped


def chosen(images: list[dict], pairs: list[pa.Table]) -> dict[str, tuple[str, float]]:
    table = pa.Table.from_pylist(images, pa.schema([("uid", pa.string()), ("score", pa.float64())]))
    result = keep(table, ["score"], pairs)
    names = [i["uid"] for i in images]
    return {
        names[i]: (names[of], gap)
        for i, (of, gap) in enumerate(zip(result.of, result.distance, strict=True))
        if of >= 0
    }


# Few bits and few scores, so that chains, clumps and ties are the rule.
IMAGES = st.lists(
    st.tuples(st.integers(0, 15), st.sampled_from([None, 0.0, 1.0, 2.0]), st.booleans()), min_size=1, max_size=16
)


@given(IMAGES, st.integers(0, 2), st.integers(1, 4), st.randoms())
def test_the_choice_is_that_of_the_greedy_rule(drawn, radius, parts, random):
    """Also when images that have pairs were dropped before, in any order and any number of parts."""
    rows = [
        {"uid": u, "hash": h * 17, "score": s, "left": left} for u, (h, s, left) in zip(uids(16), drawn, strict=False)
    ]
    everything = PerceptualPairs(
        pa.array([r["uid"] for r in rows]), pa.array([r["hash"] for r in rows], pa.uint64()), radius
    )
    tables = [table for part in range(parts) for table in everything.part(part, parts)]
    random.shuffle(tables)
    random.shuffle(rows)
    left = [r for r in rows if r["left"]]

    def near(a: dict, b: dict) -> float | None:
        bits = (a["hash"] ^ b["hash"]).bit_count()
        return bits if bits <= radius else None

    assert chosen([{"uid": r["uid"], "score": r["score"]} for r in left], tables) == greedy(left, near)


def test_parts_hold_the_pairs_of_one_part_and_each_once():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 300, dtype=np.uint64)
    hashes[100:200] = hashes[:100] ^ np.uint64(0b101)
    hashes[250:] = hashes[250]
    pairs = PerceptualPairs(pa.array(uids(300)), pa.array(hashes), 4)

    def rows(parts: int) -> list[tuple]:
        tables = [table for part in range(parts) for table in pairs.part(part, parts)]
        return sorted(tuple(row.values()) for table in tables for row in table.to_pylist())

    whole = rows(1)
    assert len(whole) == len(set(whole)) == 100 + 49
    assert rows(7) == whole and rows(300) == whole


def test_a_clump_of_equal_hashes_is_a_star_and_not_a_clique():
    count = 20_000
    names = uids(count)
    pairs = PerceptualPairs(pa.array(names), pa.array(np.full(count, 7, np.uint64)), 10)
    tables = list(pairs.part(0, 1))
    assert sum(map(len, tables)) == count - 1
    result = keep(pa.table({"uid": names, "pixels": np.arange(count)}), ["pixels"], tables)
    assert (result.of[:-1] == count - 1).all() and result.of[-1] == -1  # the best, not the representative


def test_hashes_that_are_unknown_or_of_equal_files_have_no_pairs():
    pairs = PerceptualPairs(pa.array(["a", "b", "b", "c"]), pa.array([1, 1, 1, None], pa.uint64()), 6)
    assert [(row["uid_a"], row["uid_b"]) for table in pairs.part(0, 1) for row in table.to_pylist()] == [("a", "b")]
    nothing = PerceptualPairs(pa.array([], pa.string()), pa.array([], pa.uint64()), 6)
    assert sum(map(len, nothing.part(0, 1))) == 0


def test_the_best_comes_first_and_images_without_a_value_last():
    table = pa.table(
        {
            "uid": ["e", "d", "c", "b", "a"],
            "pixels": pa.array([2, 2, None, 3, 2]),
            "aesthetic": [None, 5.0, 9.0, 1.0, float("nan")],
        }
    )
    order = preference_order(table, ["pixels", "aesthetic"])
    assert [table["uid"][i].as_py() for i in order] == ["b", "d", "a", "e", "c"]


def test_the_first_of_equal_files():
    assert first_of_equal(pa.chunked_array([["x", "y"], ["x", "z", "y"]])).tolist() == [0, 1, 0, 3, 1]
    assert first_of_equal(pa.chunked_array([[]], pa.string())).tolist() == []


# --- semantic


def near_vectors(count: int, width: int, seed: int) -> np.ndarray:
    """Half of the vectors are copies of the others with some noise, a few are exact copies."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((count, width))
    half = count // 2
    vectors[half:] = vectors[:half] + rng.uniform(0, 0.6, (half, 1)) * rng.standard_normal((half, width))
    vectors[1:6] = vectors[0]
    return unit_vectors(vectors)


def brute_semantic(vectors: np.ndarray, threshold: float) -> set[tuple[int, int]]:
    cosine = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    return {(i, j) for i, j in np.argwhere(cosine >= threshold).tolist() if i < j}


def closure(tables: list[pa.Table], names: list[str]) -> set[tuple[int, int]]:
    """All pairs of images that tables stand for, with those of represented images."""
    rows = [row for table in tables for row in table.to_pylist()]
    of = {row["uid_b"]: row["uid_a"] for row in rows if row["same"]}
    near = {frozenset((row["uid_a"], row["uid_b"])) for row in rows if not row["same"]}
    leader = [of.get(name, name) for name in names]
    return {
        (i, j)
        for i in range(len(names))
        for j in range(i + 1, len(names))
        if leader[i] == leader[j] or frozenset((leader[i], leader[j])) in near
    }


@pytest.mark.parametrize("threshold", [0.8, 0.9, 0.95, 1.0])
def test_within_a_cluster_all_pairs_are_found(threshold):
    vectors, names = near_vectors(1500, 24, 0), sorted(uids(1500))
    found = closure(list(semantic_pairs(pa.array(names), vectors, threshold)), names)
    expected = (
        brute_semantic(vectors, threshold) if threshold < 1 else {(i, j) for i in range(6) for j in range(i + 1, 6)}
    )
    assert found == expected and len(found) >= 15


def test_a_higher_threshold_drops_fewer():
    """SemDeDup's README has the direction of epsilon = 1 - threshold reversed."""
    vectors, names = near_vectors(600, 24, 1), sorted(uids(600))
    images = [{"uid": name, "score": None} for name in names]
    dropped = [
        set(chosen(images, list(semantic_pairs(pa.array(names), vectors, threshold))))
        for threshold in (0.80, 0.90, 0.95, 0.99)
    ]
    assert [len(d) for d in dropped] == sorted((len(d) for d in dropped), reverse=True)
    assert len(dropped[0]) > len(dropped[1]) > len(dropped[2]) > len(dropped[3]) >= 5


@given(st.integers(0, 10_000), st.integers(2, 40), st.sampled_from([0.5, 0.7, 0.9]))
def test_the_semantic_choice_is_that_of_the_greedy_rule(seed, count, threshold):
    vectors = near_vectors(2 * count, 6, seed)
    names = sorted(uids(2 * count))
    images = [{"uid": name, "score": float(i % 3), "row": i} for i, name in enumerate(names)]

    def near(a: dict, b: dict) -> float | None:
        same = (vectors[a["row"]] == vectors[b["row"]]).all()
        cosine = 1.0 if same else float(vectors[a["row"]].astype(float) @ vectors[b["row"]].astype(float))
        return max(0.0, 1 - cosine) if cosine >= threshold else None

    found = chosen(
        [{"uid": i["uid"], "score": i["score"]} for i in images],
        list(semantic_pairs(pa.array(names), vectors, threshold)),
    )
    expected = greedy(images, near)
    assert {k: v[0] for k, v in found.items()} == {k: v[0] for k, v in expected.items()}
    assert all(found[k][1] == pytest.approx(expected[k][1], abs=1e-6) for k in found)


def test_zero_and_broken_vectors_are_like_no_other():
    vectors = unit_vectors(np.array([[0, 0], [0, 0], [np.nan, 1], [np.inf, 1], [1, 1]], np.float32))
    assert not vectors[:4].any() and np.linalg.norm(vectors[4]) == pytest.approx(1)
    assert sum(map(len, semantic_pairs(pa.array(list("abcde")), vectors, 0.01))) == 0


def test_a_small_corpus_is_one_cluster_and_a_larger_one_keeps_most_pairs():
    rule = SemanticDedup(column="e", threshold=0.95, cluster_images=500)
    vectors = near_vectors(4000, 32, 2)
    centroids = fit(vectors, cluster_count(4000, rule))
    of = assign(vectors, centroids)
    assert len(centroids) == 8 and np.bincount(of, minlength=8).min() > 100
    pairs = brute_semantic(vectors, 0.95)
    together = np.mean([of[i] == of[j] for i, j in pairs])
    assert len(pairs) > 200 and 0.85 < together < 1  # the pairs that straddle two clusters are the price
    assert cluster_count(500, rule) == 1


def test_more_centroids_than_distinct_vectors_do_no_harm():
    vectors = unit_vectors(np.repeat(np.eye(3), 4, axis=0))
    of = assign(vectors, fit(vectors, 6))
    assert len({tuple(of[i : i + 4]) for i in (0, 4, 8)}) == 3


def test_clusters_are_the_same_at_any_thread_count_and_sum_order():
    """Every product is exact in float32: summing the dimensions in another order changes no bit."""
    vectors = near_vectors(5000, 96, 3)
    centroids = fit(vectors, 16)
    assert np.array_equal(centroids, np.rint(centroids))
    shuffled = np.random.default_rng(0).permutation(96)
    assert np.array_equal(fit(np.ascontiguousarray(vectors[:, shuffled]), 16), centroids[:, shuffled])
    points = np.rint(vectors * 2048)
    assert np.array_equal(
        assign(vectors, centroids), np.argmax(points.astype(np.int64) @ centroids.T.astype(np.int64), 1)
    )
    program = (
        "import numpy as np, hashlib; from filters.clusters import assign, fit, unit_vectors;"
        "v = unit_vectors(np.random.default_rng(3).standard_normal((3000, 96))); c = fit(v, 16);"
        "print(hashlib.sha256(c.tobytes() + assign(v, c).tobytes()).hexdigest())"
    )
    results = set()
    for threads in ("1", "2", "4"):
        limits = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "PYTHONPATH": str(Path.cwd())}
        results.add(subprocess.check_output([sys.executable, "-c", program], env=os.environ | limits))
    assert len(results) == 1


def test_no_pairs_keep_everything():
    table = pa.table({"uid": uids(3), "pixels": [1, 2, 3]})
    for pairs in ([], [PAIRS.empty_table()]):
        assert keep(table, ["pixels"], pairs).of.tolist() == [-1] * 3
    assert keep(table.slice(0, 0), ["pixels"], []).of.tolist() == []
