"""All pairs of 64-bit hashes within a Hamming radius, exactly, without comparing all pairs.

Multi-index hashing (Norouzi, Punjani, Fleet, "Fast exact search in Hamming space with multi-index hashing", 2014,
§3.1). Cut the 64 bits into m substrings and write radius = q m + a with 0 <= a < m. If two hashes differ in at most
`radius` bits, then one of the first a + 1 substrings differs in at most q bits or one of the others in at most q - 1:
otherwise they differ in at least (a + 1)(q + 1) + (m - a - 1) q = radius + 1 bits. So it is enough to look, for each
substring, at the hashes whose substring is one of a few values, and to compare those in full.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import comb
from typing import NamedTuple

import numpy as np

BITS = 64
_LEAST_SUBSTRINGS = 3  # 2^22 table entries at most
_LOOKUP_COST = 3  # of one table entry, in comparisons
_BATCH = 1 << 16  # candidates compared at a time: they stay in the processor's cache


class Matches(NamedTuple):
    """Pairs within the radius: positions (int64) in the queries and in the index, and their distance (uint8)."""

    query: np.ndarray
    found: np.ndarray
    distance: np.ndarray


@dataclass(frozen=True)
class Substring:
    """Bits `shift` ... `shift + bits - 1`, in which a match differs in at most `radius`."""

    shift: int
    bits: int
    radius: int

    @property
    def masks(self) -> Iterator[int]:
        """All values with at most `radius` bits set, zero first."""
        for ones in range(self.radius + 1):
            yield from (sum(1 << bit for bit in chosen) for chosen in combinations(range(self.bits), ones))

    @property
    def lookups(self) -> int:
        return sum(comb(self.bits, ones) for ones in range(self.radius + 1))

    def keys(self, hashes: np.ndarray) -> np.ndarray:
        """This part of each hash, int64."""
        return ((hashes >> np.uint64(self.shift)) & np.uint64((1 << self.bits) - 1)).astype(np.int64)

    def admits(self, differing: np.ndarray) -> np.ndarray:
        """Whether the search by this substring finds a pair with these differing bits (uint64)."""
        return np.bitwise_count(self.keys(differing)) <= self.radius


def cut(radius: int, count: int) -> tuple[Substring, ...]:
    """The substrings to search by when the bits are cut into `count` parts."""
    q, a = divmod(radius, count)
    edges = [-(-i * BITS // count) for i in range(count + 1)]
    parts = (Substring(edges[i], edges[i + 1] - edges[i], q if i <= a else q - 1) for i in range(count))
    return tuple(part for part in parts if part.radius >= 0)


def best_cut(radius: int, size: int) -> tuple[Substring, ...]:
    """The cut that compares the least when `size` random hashes are indexed."""

    def cost(parts: tuple[Substring, ...]) -> float:
        return sum(part.lookups * (_LOOKUP_COST + size / (1 << part.bits)) for part in parts)

    counts = range(_LEAST_SUBSTRINGS, max(_LEAST_SUBSTRINGS, radius + 1) + 1)
    return min((cut(radius, count) for count in counts), key=cost)


class _Table:
    """Hashes sorted by one substring, with the place where each value of the substring starts."""

    def __init__(self, part: Substring, hashes: np.ndarray) -> None:
        keys = part.keys(hashes)
        self.rows = np.argsort(keys.astype(np.uint16) if part.bits <= 16 else keys, kind="stable")
        self.hashes = hashes[self.rows]
        self.starts = np.zeros((1 << part.bits) + 1, np.int64)
        np.cumsum(np.bincount(keys, minlength=1 << part.bits), out=self.starts[1:])

    @cached_property
    def places(self) -> np.ndarray:
        """Where each hash stands in `hashes`."""
        places = np.empty(len(self.rows), np.int64)
        places[self.rows] = np.arange(len(self.rows))
        return places


class HammingIndex:
    """An index of hashes for one radius.

    Args:
        hashes: uint64 [n].
        radius: 0 to 64 bits; the search is fast up to about 10.
        parts: from `cut`; default: what suits the size.
    """

    def __init__(self, hashes: np.ndarray, radius: int, parts: tuple[Substring, ...] | None = None) -> None:
        self.hashes, self.radius = hashes, radius
        self.parts = best_cut(radius, len(hashes)) if parts is None else parts
        self._tables = [_Table(part, hashes) for part in self.parts]

    def search(self, queries: np.ndarray) -> Iterator[Matches]:
        """Every (query, indexed hash) within the radius, once, in batches of bounded size."""
        rows = np.arange(len(queries))
        for number, (part, table) in enumerate(zip(self.parts, self._tables, strict=True)):
            keys = part.keys(queries)
            for mask in part.masks:
                first, end = table.starts[keys ^ mask], table.starts[(keys ^ mask) + 1]
                yield from self._compare(number, queries, rows, first, end - first)

    def pairs(self, start: int, stop: int) -> Iterator[Matches]:
        """The share of `hashes[start:stop]` in all pairs of indexed hashes within the radius.

        Over a partition of the whole range, every unordered pair of positions comes exactly once: of two hashes
        found by substring, the one with the smaller value there asks (of equal values the one that is indexed first).
        """
        rows = np.arange(start, stop)
        queries = self.hashes[start:stop]
        for number, (part, table) in enumerate(zip(self.parts, self._tables, strict=True)):
            keys = part.keys(queries)
            for mask in part.masks:
                partner = keys ^ mask
                asks = np.flatnonzero(partner > keys) if mask else np.arange(len(keys))
                first = table.starts[partner[asks]] if mask else table.places[rows] + 1
                count = table.starts[partner[asks] + 1] - first
                yield from self._compare(number, queries[asks], rows[asks], first, count)

    def _compare(
        self, number: int, queries: np.ndarray, rows: np.ndarray, first: np.ndarray, count: np.ndarray
    ) -> Iterator[Matches]:
        """Compare each query with `count` entries of table `number` from `first` on."""
        ends = np.cumsum(count)
        begin = 0
        while begin < len(count):
            done = ends[begin - 1] if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, done + _BATCH, side="right")))
            batch = slice(begin, end)
            yield from self._compare_batch(number, queries[batch], rows[batch], first[batch], count[batch])
            begin = end

    def _compare_batch(
        self, number: int, queries: np.ndarray, rows: np.ndarray, first: np.ndarray, count: np.ndarray
    ) -> Iterator[Matches]:
        table, ends = self._tables[number], np.cumsum(count)
        places = np.arange(ends[-1]) + np.repeat(first - ends + count, count)
        differing = table.hashes[places] ^ np.repeat(queries, count)
        hits = np.flatnonzero(np.bitwise_count(differing) <= self.radius)
        for earlier in self.parts[:number]:  # a pair that several substrings find is the first one's
            hits = hits[~earlier.admits(differing[hits])]
        if len(hits):
            asked = rows[np.searchsorted(ends, hits, side="right")]
            yield Matches(asked, table.rows[places[hits]], np.bitwise_count(differing[hits]))
