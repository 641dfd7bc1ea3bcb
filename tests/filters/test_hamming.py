"""The search finds exactly what comparing everything finds, however the bits are cut and the work is shared out."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.hamming import BITS, HammingIndex, best_cut, cut


def flipped(value: int, bits: list[int]) -> int:
    for bit in bits:
        value ^= 1 << bit
    return value


@st.composite
def hashes_near_the_radius(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Hashes around a few centres, at distances of exactly the radius and one bit more among others."""
    radius = draw(st.integers(0, 10))
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
    distances = st.sampled_from([0, 1, radius, radius, radius + 1])
    values = list(centres)
    for centre in centres:
        for distance in draw(st.lists(distances, max_size=6)):
            bits = draw(st.lists(st.integers(0, 63), min_size=distance, max_size=distance, unique=True))
            values.append(flipped(centre, bits))
    return np.array(draw(st.permutations(values)), np.uint64), radius


def brute_force(a: np.ndarray, b: np.ndarray, radius: int) -> dict[tuple[int, int], int]:
    distance = np.bitwise_count(a[:, None] ^ b[None])
    return {(i, j): int(distance[i, j]) for i, j in np.argwhere(distance <= radius).tolist()}


@given(hashes_near_the_radius(), st.sampled_from([None, 3, 4, 5, 7, 11]), st.integers(1, 5))
def test_all_pairs_come_exactly_once(drawn, count, shares):
    hashes, radius = drawn
    index = HammingIndex(hashes, radius, cut(radius, count) if count else None)
    edges = [len(hashes) * i // shares for i in range(shares + 1)]
    found = [
        (min(pair), max(pair), int(bits))
        for start, stop in pairwise(edges)
        for batch in index.pairs(start, stop)
        for *pair, bits in zip(*batch, strict=True)
    ]
    expected = [(i, j, bits) for (i, j), bits in brute_force(hashes, hashes, radius).items() if i < j]
    assert sorted(found) == sorted(expected)


@given(hashes_near_the_radius(), hashes_near_the_radius())
def test_a_search_finds_every_entry_once(drawn, others):
    (hashes, radius), (queries, _) = drawn, others
    queries = np.concatenate([queries, hashes])
    found = [
        tuple(map(int, hit))
        for batch in HammingIndex(hashes, radius).search(queries)
        for hit in zip(*batch, strict=True)
    ]
    assert sorted(found) == sorted((*pair, bits) for pair, bits in brute_force(queries, hashes, radius).items())


@pytest.mark.parametrize("radius", range(11))
def test_a_large_index_with_crowded_buckets_agrees_with_brute_force(radius):
    rng = np.random.default_rng(radius)
    shared = rng.integers(0, 2**16, 2000, dtype=np.uint64)  # 48 bits are equal: every other bucket is full
    near = rng.integers(0, 2**64, 1000, dtype=np.uint64)
    moved = near.copy()
    for _ in range(radius):
        moved ^= np.uint64(1) << rng.integers(0, 64, len(moved)).astype(np.uint64)
    hashes = np.unique(np.concatenate([shared, near, moved]))
    found = sum(len(batch.query) for batch in HammingIndex(hashes, radius).pairs(0, len(hashes)))
    assert found == np.triu(np.bitwise_count(hashes[:, None] ^ hashes[None]) <= radius, 1).sum()


@pytest.mark.parametrize("radius", range(11))
@pytest.mark.parametrize("count", [3, 4, 5, 8, 11])
def test_a_cut_misses_no_way_to_place_the_bits(radius, count):
    """The pigeonhole: bits can be placed so that no substring admits them only if they are more than the radius."""
    searched = cut(radius, count)
    unsearched = BITS - sum(part.bits for part in searched)
    assert unsearched == 0 or radius + 1 < count
    assert sum(part.radius + 1 for part in searched) >= radius + 1
    assert all(a.shift + a.bits == b.shift for a, b in pairwise(searched))


def test_the_cut_follows_the_size():
    assert [len(best_cut(10, 10**e)) for e in (2, 4, 6, 8)] == sorted(
        (len(best_cut(10, 10**e)) for e in (2, 4, 6, 8)), reverse=True
    )
    assert max(part.bits for part in best_cut(0, 10**9)) <= 22
