"""Subject pairs: which crops of different photographs show one and the same thing.

Three steps, of which only the first reads embeddings: `match` compares the crops of one noun or one subject, takes the
most similar ones of each and says which rule refuses them; `verify` weighs the answers of a judge, if there is one;
`choose` limits how often a photograph is used. A pair is directed: `uid` is the target, `other` the reference.

Nothing depends on the order of the crops or on the machine. Vectors are rounded to integers whose products float32
holds exactly (see `filters.clusters`), and every tie is broken by uid.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from filters.clusters import SAMPLES_PER_CLUSTER, assign, fit, quantised, unit_vectors
from schemas.pairs import Pairing

DINO_BAND = (0.60, 0.95)
BANDS = {"efficientnet-lite0": (0.70, 0.90)}  # measured, see benchmarks/RESULTS.md
# In the order in which they are tried; the last two are of `choose`, and the three before them of `verify`.
RULES = (
    *("other_split", "same_scene", "near_duplicate", "too_similar", "too_different", "stranger"),
    *("judge_unreadable", "judge_no", "judge_ratio"),
    *("image_cap", "reuse_cap"),
)
_SIDE = [("unit", pa.string()), ("row", pa.int64()), ("uid", pa.string()), ("entity", pa.int32())]

# One row per embedded entity. Hashes are of the photograph and of the crop.
CROPS = pa.schema(
    [
        *_SIDE,
        *((name, pa.string()) for name in ("noun", "subject_id", "scene_id", "split")),
        *((name, pa.uint64()) for name in ("phash", "phash_mirror", "crop_phash", "crop_phash_mirror")),
    ]
)
# One row per candidate. `reason` is "" or the rule that refuses it, `evidence` is `subject_id`, `features` or `judge`.
CANDIDATES = pa.schema(
    [
        *_SIDE,
        *((f"other_{name}" if name != "uid" else "other", kind) for name, kind in _SIDE),
        ("noun", pa.string()),
        ("similarity", pa.float64()),
        ("evidence", pa.string()),
        ("reason", pa.string()),
    ]
)
_BLOCK = 1024  # crops compared with a whole group at a time
_DECIMALS = 5

Side = tuple[str, int]  # uid and number of the entity
Question = tuple[Side, Side]  # the smaller one first


@dataclass(frozen=True)
class _Found:
    """Candidates by position: target and reference (int64), cosine (float64), whether the source vouches for them."""

    target: np.ndarray
    other: np.ndarray
    similarity: np.ndarray
    vouched: bool


def band_of(rules: Pairing, model: str) -> tuple[float, float]:
    """The band of a recipe, or that of the model which made the embeddings."""
    return rules.band or BANDS.get(model, DINO_BAND)


def match(crops: pa.Table, vectors: np.ndarray, rules: Pairing, band: tuple[float, float]) -> pa.Table:
    """Candidates and what the rules say of them.

    Of each crop these are the `candidates` most similar ones of its noun or subject in other photographs; and, so that
    a corpus of few scenes does not look as if nothing were alike, as many that only a scene or a split sets apart.

    Args:
        crops: rows of `CROPS`; (uid, entity) is unique.
        vectors: float [n, d], any length but zero.
        rules: of the recipe.
        band: least and largest cosine of crops with one noun; the largest holds for all.

    Returns:
        Rows of `CANDIDATES`, sorted by target and reference.
    """
    order = pc.sort_indices(crops, [("uid", "ascending"), ("entity", "ascending")])
    crops = crops.take(order).combine_chunks()
    space = _Space(crops, quantised(vectors[order.to_numpy()]), rules)
    found = [*space.by_subject(), *space.by_noun()]
    tables = [_judged(crops, some, rules, band) for some in found]
    return sorted_candidates(pa.concat_tables([CANDIDATES.empty_table(), *tables]))


def questions(candidates: pa.Table, others: int) -> dict[Question, str]:
    """What to ask a judge: the crops of each open pair, once, with their noun.

    Of crops with one `subject_id` each is asked against its `others` most similar ones.
    """
    asked: dict[Question, str] = {}
    count: Counter[Side] = Counter()
    for row in _by_similarity(candidates):
        target, other = sides(row)
        if row["evidence"] == "subject_id":
            count[target] += 1
            if count[target] > others:
                continue
        asked.setdefault(_question(target, other), row["noun"])
    return asked


def verify(candidates: pa.Table, answers: Mapping[Question, bool | None], min_yes: float) -> pa.Table:
    """Open candidates that a judge does not confirm get a reason; those of one noun that it confirms, new evidence.

    Args:
        candidates: of `match`.
        answers: yes, no or None (neither) to all `questions`.
        min_yes: least share of yes for a crop of a subject; unreadable answers do not count.
    """
    rows = candidates.to_pylist()
    vouched = {_question(*sides(row)) for row in rows if not row["reason"] and row["evidence"] == "subject_id"}
    said: dict[Side, list[bool]] = defaultdict(list)
    for question in vouched:
        if (answer := answers.get(question)) is not None:
            for side in question:
                said[side].append(answer)
    for row in rows:
        if row["reason"]:
            continue
        if row["evidence"] == "subject_id":
            row["reason"] = _verdict_on_subject([said[side] for side in sides(row)], min_yes)
        else:
            answer = answers[_question(*sides(row))]
            row["reason"] = "" if answer else "judge_unreadable" if answer is None else "judge_no"
            row["evidence"] = "judge" if answer else row["evidence"]
    return pa.Table.from_pylist(rows, CANDIDATES)


def choose(candidates: pa.Table, rules: Pairing) -> pa.Table:
    """Open candidates beyond the caps get a reason. The most similar pairs come first: they are the surest."""
    targets: Counter[str] = Counter()
    references: Counter[str] = Counter()
    reason = candidates["reason"].to_pylist()
    for row in _by_similarity(candidates):
        if targets[row["uid"]] == rules.max_per_image:
            reason[row["at"]] = "image_cap"
        elif references[row["other"]] == rules.max_reuse:
            reason[row["at"]] = "reuse_cap"
        else:
            targets[row["uid"]] += 1
            references[row["other"]] += 1
    return candidates.set_column(CANDIDATES.get_field_index("reason"), "reason", pa.array(reason, pa.string()))


def sides(row: Mapping[str, Any]) -> tuple[Side, Side]:
    """Target and reference of a candidate."""
    return (row["uid"], row["entity"]), (row["other"], row["other_entity"])


def sorted_candidates(candidates: pa.Table) -> pa.Table:
    keys = ("uid", "entity", "other", "other_entity")
    return candidates.sort_by([(key, "ascending") for key in keys]).combine_chunks()


def _question(one: Side, two: Side) -> Question:
    return (one, two) if one < two else (two, one)


def _verdict_on_subject(said: list[list[bool]], min_yes: float) -> str:
    """Of both crops of a pair, the answers to the questions about each."""
    if not all(said):
        return "judge_unreadable"
    return "judge_ratio" if min(sum(answers) / len(answers) for answers in said) < min_yes else ""


def _by_similarity(candidates: pa.Table) -> Iterator[dict[str, Any]]:
    """Open candidates, the most similar first; `at` is the row."""
    table = candidates.append_column("at", pa.array(range(len(candidates)), pa.int64()))
    table = sorted_candidates(table.filter(pc.equal(table["reason"], "")))
    at = pc.sort_indices(table.append_column("place", pa.array(range(len(table)))), _SUREST)
    for batch in table.take(at).to_batches(max_chunksize=10_000):
        yield from batch.to_pylist()


_SUREST = [("similarity", "descending"), ("place", "ascending")]


class _Space:
    """Crops sorted by uid, with rounded vectors: float32 [n, d] of integers."""

    def __init__(self, crops: pa.Table, vectors: np.ndarray, rules: Pairing) -> None:
        self.vectors, self.rules = vectors, rules
        self.length = np.sqrt((vectors.astype(np.int64) ** 2).sum(axis=1).astype(np.float64))
        names = ("uid", "noun", "subject_id", "scene_id", "split")
        self.uid, self.noun, self.subject, self.scene, self.split = (_codes(crops[name]) for name in names)
        self.named = pc.not_equal(crops["subject_id"], "").to_numpy()

    def by_subject(self) -> Iterator[_Found]:
        for members in _groups(self.subject, np.flatnonzero(self.named)):
            yield from self._compare(members, vouched=True)

    def by_noun(self) -> Iterator[_Found]:
        for nouns in _groups(self.noun, np.arange(len(self.noun))):
            for members in self._clusters(nouns):
                yield from self._compare(members, vouched=False)

    def _clusters(self, members: np.ndarray) -> Iterator[np.ndarray]:
        count = -(-len(members) // self.rules.cluster_crops)
        if count == 1:
            yield members
            return
        # Every so many-th by uid, which is random.
        sample = members[:: max(1, len(members) // (SAMPLES_PER_CLUSTER * count))]
        centroids = fit(unit_vectors(self.vectors[sample]), count)
        clusters = assign(unit_vectors(self.vectors[members]), centroids)
        yield from (members[group] for group in _groups(clusters, np.arange(len(members))))

    def _compare(self, members: np.ndarray, vouched: bool) -> Iterator[_Found]:
        """The nearest candidates of every member among the others, in blocks."""
        for start in range(0, len(members), _BLOCK):
            block = members[start : start + _BLOCK]
            possible = self.uid[block, None] != self.uid[members]
            apart = self.split[block, None] == self.split[members]
            if not vouched:  # two that the source names differently are different
                possible &= ~(self.named[block, None] & self.named[members])
                apart &= self.scene[block, None] != self.scene[members]
            dots = (self.vectors[block] @ self.vectors[members].T).astype(np.float64)
            cosine = (dots / np.maximum(self.length[block, None] * self.length[members], 1)).round(_DECIMALS)
            for eligible in (possible & apart, possible & ~apart):
                target, other = nearest(np.where(eligible, cosine, -np.inf), self.rules.candidates)
                yield _Found(block[target], members[other], cosine[target, other], vouched)


def nearest(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the `count` largest finite values of each row, of equal ones the first.

    Args:
        values: float [n, m], -inf where there is none.
        count: at least 1.
    """
    if values.shape[1] > count:
        least = np.partition(values, -count, axis=1)[:, -count, None]
        row, column = np.nonzero((values >= least) & np.isfinite(values))
    else:
        row, column = np.nonzero(np.isfinite(values))
    order = np.lexsort((column, -values[row, column], row))
    row, column = row[order], column[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    return row[rank < count], column[rank < count]


def _judged(crops: pa.Table, found: _Found, rules: Pairing, band: tuple[float, float]) -> pa.Table:
    """Rows of `CANDIDATES`; the first rule in the order of `RULES` that refuses a pair is its reason."""
    target, other = crops.take(pa.array(found.target)), crops.take(pa.array(found.other))
    low, high = band
    cosine = found.similarity
    refused = {
        "other_split": _differ(target, other, "split"),
        "same_scene": ~_differ(target, other, "scene_id") & (not found.vouched),
        "near_duplicate": _hash_distance(target, other) <= rules.radius,
        "too_similar": cosine > high,
        "too_different": (cosine < low) & (not found.vouched),
        "stranger": (cosine < rules.min_similarity) & found.vouched,
    }
    reason = np.select(list(refused.values()), list(refused), "")
    columns = [target[name] for name, _ in _SIDE] + [other[name] for name, _ in _SIDE] + [target["noun"]]
    evidence = pa.array(["subject_id" if found.vouched else "features"] * len(target))
    return pa.table([*columns, pa.array(cosine), evidence, pa.array(reason, pa.string())], schema=CANDIDATES)


def _differ(one: pa.Table, two: pa.Table, name: str) -> np.ndarray:
    return pc.not_equal(one[name], two[name]).to_numpy()


def _hash_distance(one: pa.Table, two: pa.Table) -> np.ndarray:
    """Bits in which the photographs or the crops differ, the smaller number, mirrored or not."""
    distances = [
        np.bitwise_count(one[f"{of}phash"].to_numpy() ^ two[f"{of}{kind}"].to_numpy())
        for of in ("", "crop_")
        for kind in ("phash", "phash_mirror")
    ]
    return np.minimum.reduce(distances)


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    return column.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)


def _groups(codes: np.ndarray, members: np.ndarray) -> Iterator[np.ndarray]:
    """Members with one code each, ascending; those that are alone are left out."""
    order = members[np.argsort(codes[members], kind="stable")]
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    yield from (group for group in np.split(order, starts[1:]) if len(group) > 1)
