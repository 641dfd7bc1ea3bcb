"""Duplicates: which images are nearly the same (pairs: costly, found once), and which of them stay (a query).

Pairs are those of all images, whatever is dropped later. Images with one and the same hash or vector have the same
neighbours, so only the one with the smallest uid, their representative, is paired with others and the rest points at
it (`same`): 100,000 copies of a blank image are 100,000 rows, not five billion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from filters.hamming import HammingIndex

_UID = pa.dictionary(pa.int32(), pa.string())
# `distance` is in bits, or 1 - cosine. Where `same` holds, uid_a represents uid_b; all other rows pair representatives.
PAIRS = pa.schema([("uid_a", _UID), ("uid_b", _UID), ("distance", pa.float64()), ("same", pa.bool_())])

_BLOCK = 1024  # vectors compared with a whole cluster at a time
_RECHECKED = 1 << 14  # pairs whose cosine is computed in float64 at a time
_FLOAT32_MARGIN = 1e-4  # far above what rounding does to the cosine of unit vectors


def first_of_equal(uids: pa.ChunkedArray) -> np.ndarray:
    """For each row the first row with its uid, int64 [n]: the one that stays."""
    codes = uids.combine_chunks().dictionary_encode().indices.to_numpy()
    _, first = np.unique(codes, return_index=True)
    return first[codes]


class PerceptualPairs:
    """All pairs of images whose hashes differ in at most `radius` bits, exactly.

    Args:
        uids: string [n]; of rows with one uid only the first counts.
        hashes: uint64 [n]; null where unknown.
        radius: bits.
    """

    def __init__(self, uids: pa.Array, hashes: pa.Array, radius: int) -> None:
        known = pa.table({"uid": uids, "hash": hashes}).drop_null()
        known = known.filter(pa.array(first_of_equal(known["uid"]) == np.arange(len(known))))
        known = known.take(pc.sort_indices(known["uid"]))
        by_hash = np.argsort(known["hash"].to_numpy(), kind="stable")  # of one hash the smallest uid comes first
        self._uids = known["uid"].combine_chunks().take(by_hash)
        distinct, self._starts = np.unique(known["hash"].to_numpy()[by_hash], return_index=True)
        self._index = HammingIndex(distinct, radius)

    def part(self, number: int, count: int) -> Iterator[pa.Table]:
        """Share `number` of `count`, as tables of `PAIRS`; together the shares hold every pair once."""
        groups = len(self._starts)
        start, stop = number * groups // count, (number + 1) * groups // count
        ends = np.append(self._starts, len(self._uids))
        members = np.arange(ends[start], ends[stop])
        leaders = np.repeat(self._starts[start:stop], np.diff(ends[start : stop + 1]))
        copies = members != leaders
        yield _pairs_table(self._uids, leaders[copies], members[copies], np.zeros(copies.sum()), same=True)
        for a, b, bits in self._index.pairs(start, stop):
            yield _pairs_table(self._uids, self._starts[a], self._starts[b], bits.astype(np.float64))


def semantic_pairs(uids: pa.Array, vectors: np.ndarray, threshold: float) -> Iterator[pa.Table]:
    """All pairs of one cluster with a cosine of at least `threshold`, as tables of `PAIRS`.

    As in SemDeDup (Abbas et al., 2023) nothing is compared across clusters. Of n vectors near one another all
    n (n - 1) / 2 pairs are written, unless they are identical.

    Args:
        uids: string [n], sorted and unique.
        vectors: float32 [n, d] of length 1 (or 0: like no other).
        threshold: cosine, above 0.
    """
    rows = np.ascontiguousarray(vectors).view(np.dtype((np.void, vectors.shape[1] * vectors.itemsize))).ravel()
    _, leaders, group = np.unique(rows, return_index=True, return_inverse=True)
    copies = np.flatnonzero((leaders[group] != np.arange(len(rows))) & vectors.any(axis=1))
    yield _pairs_table(uids, leaders[group][copies], copies, np.zeros(len(copies)), same=True)
    leaders = np.sort(leaders)
    distinct = vectors[leaders]
    for start in range(0, len(distinct), _BLOCK):
        near = distinct[start : start + _BLOCK] @ distinct[start:].T >= threshold - _FLOAT32_MARGIN
        a, b = np.nonzero(np.triu(near, 1))
        for i in range(0, len(a), _RECHECKED):
            first, second = a[i : i + _RECHECKED] + start, b[i : i + _RECHECKED] + start
            cosine = np.einsum("nd,nd->n", distinct[first], distinct[second], dtype=np.float64)
            hits = cosine >= threshold
            pairs = leaders[first[hits]], leaders[second[hits]]
            yield _pairs_table(uids, *pairs, np.maximum(1 - cosine[hits], 0))


@dataclass(frozen=True)
class Duplicates:
    """Per image: the row of the image that stays in its place (int64, -1: it stays itself), and their distance."""

    of: np.ndarray
    distance: np.ndarray


def keep(images: pa.Table, prefer: Sequence[str], pairs: Sequence[pa.Table]) -> Duplicates:
    """Greedy choice: take images from the best on, and drop each that is paired with one already kept.

    The result is that of comparing all images, because images with a common representative share their fate: the
    best of them meets the same kept images as the others, and if it is kept, it is what drops them. Depends on
    neither the order of images or pairs nor the number of tables.

    Args:
        images: `uid` (unique) and the columns of `prefer`; only these images are considered.
        prefer: see `schemas.decide.Dedup`.
        pairs: tables of `PAIRS`, of any images.
    """
    order = preference_order(images, prefer)
    place = np.arange(len(order))
    found = pa.concat_tables([PAIRS.empty_table(), *pairs]).unify_dictionaries().combine_chunks()
    uids = images["uid"].combine_chunks().take(pa.array(order))
    groups = _representatives(uids, found).dictionary_encode()  # numbered in the order of their best images
    group = groups.indices.to_numpy()
    _, leader = np.unique(group, return_index=True)

    low, high, distance = _edges(groups.dictionary, found)
    dropped = _greedy(len(leader), low, high)
    decisive = np.flatnonzero(~dropped[low])
    losers, at = np.unique(high[decisive], return_index=True)  # edges are sorted: the first is that of the best image
    winner, gap = np.arange(len(leader)), np.zeros(len(leader))
    winner[losers], gap[losers] = low[decisive[at]], distance[decisive[at]]

    stays = leader[winner[group]]
    result = Duplicates(np.empty_like(order), np.empty(len(order)))
    result.of[order] = np.where(stays == place, -1, order[stays])
    result.distance[order] = gap[group]
    return result


def preference_order(images: pa.Table, prefer: Sequence[str]) -> np.ndarray:
    """Rows from the best to the worst image, int64 [n]."""
    keys = {f"{i}": _without_nan(images[name]) for i, name in enumerate(prefer)}
    directions = [(key, "descending", "at_end") for key in keys] + [("uid", "ascending", "at_end")]
    return pc.sort_indices(pa.table(keys | {"uid": images["uid"]}), directions).to_numpy().astype(np.int64)


def _greedy(count: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Which of `count` nodes are dropped, bool; edges (low < high) are sorted, and a kept node drops all above it."""
    dropped = np.zeros(count, bool)
    nodes, starts = np.unique(low, return_index=True)
    ends = np.append(starts, len(low))[1:]
    for node, start, end in zip(nodes.tolist(), starts.tolist(), ends.tolist(), strict=True):
        if not dropped[node]:
            dropped[high[start:end]] = True
    return dropped


def _representatives(uids: pa.Array, pairs: pa.Table) -> pa.Array:
    same = pairs.filter(pairs["same"])
    at = pc.index_in(uids, same["uid_b"].cast(pa.string()).combine_chunks())
    return pc.coalesce(same["uid_a"].cast(pa.string()).combine_chunks().take(at), uids)


def _edges(groups: pa.Array, pairs: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs between these groups as (low, high, distance), low < high, sorted."""
    near = pairs.filter(pc.invert(pairs["same"]))
    a, b = (_codes(near[name], groups) for name in ("uid_a", "uid_b"))
    here = np.flatnonzero((a >= 0) & (b >= 0))
    low, high = np.minimum(a, b)[here], np.maximum(a, b)[here]
    order = np.lexsort((high, low))
    return low[order], high[order], near["distance"].to_numpy()[here][order]


def _codes(column: pa.ChunkedArray, values: pa.Array) -> np.ndarray:
    """Positions in `values`, int64, -1 where a value is not there."""
    encoded = column.combine_chunks()
    codes = pc.fill_null(pc.index_in(encoded.dictionary, values), -1).to_numpy().astype(np.int64)
    return codes[encoded.indices.to_numpy()]


def _pairs_table(uids: pa.Array, a: np.ndarray, b: np.ndarray, distance: np.ndarray, same: bool = False) -> pa.Table:
    rows, codes = np.unique(np.concatenate([a, b]), return_inverse=True)
    names = uids.take(pa.array(rows))
    sides = (pa.DictionaryArray.from_arrays(side.astype(np.int32), names) for side in np.split(codes, 2))
    return pa.table([*sides, pa.array(distance), pa.array(np.full(len(a), same))], schema=PAIRS)


def _without_nan(column: pa.ChunkedArray) -> pa.ChunkedArray:
    values = column.cast(pa.float64())
    return pc.if_else(pc.is_nan(values), None, values)
