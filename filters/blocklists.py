"""Block lists: images that must not be trained on (benchmark images, prompts and canaries, bans).

Each list judges an image by columns of its own row, so a corpus is judged unit by unit. What a list refuses names the
list and the line of it.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from filters.clusters import unit_vectors
from filters.columns import matrix
from filters.decide import BANS, NO_VALUE
from filters.hamming import HammingIndex
from schemas.decide import AnyBlockList, CanaryList, EmbeddingList, NgramList, PHashList, Sha256List

_TEXTS = ("captions", "ready")
_CAPTIONS = ("short", "long", "alt", "tags")
_BLOCK = 256  # images compared with a whole list of vectors at a time
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # of a polynomial hash


class BlockListError(ValueError):
    """A list cannot be used; the message is `file:line: problem`."""


class Matcher(ABC):
    """A list, read and checked.

    Attributes:
        rule: its section of the recipe.
        digest: sha256 of the file.
        columns: of the images, which `match` reads.
    """

    columns: tuple[str, ...] = ("uid",)

    def __init__(self, rule: Any, data: bytes) -> None:
        self.rule, self.digest = rule, hashlib.sha256(data).hexdigest()

    @abstractmethod
    def match(self, images: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """For each image the line that bans it (int64, counted from 1; 0: none), and the value that was compared."""

    def fail(self, line: int, problem: str) -> BlockListError:
        return BlockListError(f"{self.rule.path}:{line}: {problem}")


def read_blocklist(rule: AnyBlockList, data: bytes) -> Matcher:
    """Read and check a list.

    Args:
        rule: its section of the recipe.
        data: the file.

    Raises:
        BlockListError: names the file and the line that is wrong.
    """
    return _MATCHERS[type(rule)](rule, data)


def ban(images: pa.Table, lists: Sequence[Matcher]) -> pa.Table:
    """`filters.decide.BANS` for each image: the kind of the first list that bans it, or null."""
    kind, detail = np.full(len(images), None, object), np.full(len(images), None, object)
    free, value = np.full(len(images), True), np.full(len(images), NO_VALUE)
    for matcher in lists:
        line, compared = matcher.match(images)
        rows = np.flatnonzero((line > 0) & free)
        free[rows], kind[rows], value[rows] = False, matcher.rule.kind, compared[rows]
        detail[rows] = [f"{matcher.rule.path}:{n}" for n in line[rows]]
    return pa.table([pa.array(kind, pa.string()), pa.array(value), pa.array(detail, pa.string())], schema=BANS)


def ban_report(ledger: pa.Table, lists: Iterable[AnyBlockList]) -> pa.Table:
    """How much each list banned: `kind`, `path`, `images`, and `entries`: how many of its lines banned any.

    Args:
        ledger: rows of the stage `decide` (`reason` and `detail`).
        lists: of the recipe.
    """
    path = pc.replace_substring_regex(ledger["detail"], r":\d+$", "")
    rows = []
    for rule in lists:
        its_own = pc.and_(pc.equal(ledger["reason"], f"blocklist:{rule.kind}"), pc.equal(path, rule.path))
        lines = ledger["detail"].filter(its_own)
        rows.append((rule.kind, rule.path, len(lines), len(lines.unique())))
    names = ("kind", "path", "images", "entries")
    return pa.table({name: [row[i] for row in rows] for i, name in enumerate(names)})


def _lines(data: bytes, matcher: Matcher) -> Iterator[tuple[int, str]]:
    """Lines that say something, with their numbers. `#` starts a comment line.

    Raises:
        BlockListError: not UTF-8, or nothing in it.
    """
    empty = True
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise matcher.fail(number, "not UTF-8 text") from error
        if text and not text.startswith("#"):
            empty = False
            yield number, text
    if empty:
        raise matcher.fail(1, "the list is empty")


def _hexadecimal(data: bytes, matcher: Matcher, digits: int) -> Iterator[tuple[int, str]]:
    """The first word of each line, lower case: what follows it, as the file name in `sha256sum`'s output, is free."""
    for number, line in _lines(data, matcher):
        word = line.split()[0].lower()
        if not re.fullmatch(f"[0-9a-f]{{{digits}}}", word):
            raise matcher.fail(number, f"expected {digits} hexadecimal digits, found {line[:80]!r}")
        yield number, word


class _Sha256(Matcher):
    def __init__(self, rule: Sha256List, data: bytes) -> None:
        super().__init__(rule, data)
        lines, uids = zip(*_hexadecimal(data, self, 64), strict=True)
        self._lines, self._uids = np.array([0, *lines]), pa.array(uids)

    def match(self, images: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        place = pc.fill_null(pc.index_in(images["uid"], self._uids), -1).to_numpy()
        return self._lines[place + 1], np.full(len(images), NO_VALUE)


class _PHash(Matcher):
    columns = ("phash",)

    def __init__(self, rule: PHashList, data: bytes) -> None:
        super().__init__(rule, data)
        lines, words = zip(*_hexadecimal(data, self, 16), strict=True)
        self._lines = np.array(lines)
        self._index = HammingIndex(np.array([int(word, 16) for word in words], np.uint64), rule.radius)

    def match(self, images: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        column = images["phash"].combine_chunks()
        known = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        lines, bits = np.zeros(len(images), np.int64), np.full(len(images), 65.0)
        for found in self._index.search(column.drop_null().to_numpy()):
            order = np.lexsort((found.found, found.distance, found.query))  # the nearest entry of each image first
            query, first = np.unique(found.query[order], return_index=True)
            rows, distance = known[query], found.distance[order][first]
            line = self._lines[found.found[order][first]]
            nearer = (distance < bits[rows]) | ((distance == bits[rows]) & (line < lines[rows]))
            lines[rows[nearer]], bits[rows[nearer]] = line[nearer], distance[nearer]
        return lines, bits


class _Embedding(Matcher):
    def __init__(self, rule: EmbeddingList, data: bytes) -> None:
        super().__init__(rule, data)
        self.columns = (rule.column,)
        vectors = self._read(data)
        self._vectors = unit_vectors(vectors)
        unusable = np.flatnonzero(~self._vectors.any(axis=1))
        if len(unusable):
            raise self.fail(int(unusable[0]) + 1, "the vector is zero or not finite")

    def _read(self, data: bytes) -> np.ndarray:
        try:
            if self.rule.path.endswith(".parquet"):
                table = pq.read_table(io.BytesIO(data))
                name = next(
                    f.name for f in table.schema if pa.types.is_list(f.type) or pa.types.is_fixed_size_list(f.type)
                )
                vectors, known = matrix(table[name])
                if not known.all():
                    raise self.fail(int(np.flatnonzero(~known)[0]) + 1, "the vector is null")
            else:
                vectors = np.load(io.BytesIO(data), allow_pickle=False)
        except BlockListError:
            raise
        except StopIteration as error:
            raise self.fail(1, "the Parquet file has no list column") from error
        except (ValueError, OSError, EOFError, pa.ArrowException) as error:
            raise self.fail(1, f"expected vectors as .npy or .parquet: {error}") from error
        if vectors.ndim != 2 or not len(vectors) or vectors.dtype.kind != "f":
            raise self.fail(1, f"expected floats [n, d], found {vectors.dtype} {list(vectors.shape)}")
        return vectors

    def match(self, images: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        vectors, known = matrix(images[self.rule.column])
        if len(vectors) and vectors.shape[1] != self._vectors.shape[1]:
            found, wanted = self._vectors.shape[1], vectors.shape[1]
            raise self.fail(1, f"vectors have {found} values, those of column {self.rule.column!r} have {wanted}")
        lines, best = np.zeros(len(images), np.int64), np.full(len(images), NO_VALUE)
        rows, units = np.flatnonzero(known), unit_vectors(vectors)
        for i in range(0, len(rows), _BLOCK):
            cosine = units[i : i + _BLOCK] @ self._vectors.T
            nearest = np.argmax(cosine, axis=1)
            best[rows[i : i + _BLOCK]] = cosine[np.arange(len(nearest)), nearest]
            lines[rows[i : i + _BLOCK]] = nearest + 1
        lines[best < self.rule.threshold] = 0
        return lines, best


class _Ngram(Matcher):
    columns = _TEXTS

    def __init__(self, rule: NgramList, data: bytes) -> None:
        super().__init__(rule, data)
        lines, prompts = zip(*_lines(data, self), strict=True)
        words = _words(pa.array(prompts))
        self._vocabulary = words.flatten().unique()
        self._whole: dict[tuple[int, ...], int] = {}
        self._grams: dict[tuple[int, ...], int] = {}
        for line, prompt in zip(lines, words.to_pylist(), strict=True):
            if not prompt:
                raise self.fail(line, "no words")
            ids = tuple(pc.index_in(pa.array(prompt), self._vocabulary).to_pylist())
            if len(ids) < rule.n:
                self._whole.setdefault(ids, line)
            for i in range(len(ids) - rule.n + 1):
                self._grams.setdefault(ids[i : i + rule.n], line)
        self._hashes = _gram_hashes(np.array([w for gram in self._grams for w in gram], np.int64), rule.n)[:: rule.n]

    def match(self, images: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        lines = np.zeros(len(images), np.int64)
        for text in _texts(images):
            for row, line in self._match_text(_words(text)):
                lines[row] = line if lines[row] == 0 else min(line, int(lines[row]))
        return lines, np.where(lines > 0, self.rule.n, NO_VALUE)

    def _match_text(self, words: pa.ListArray) -> Iterator[tuple[int, int]]:
        ids = pc.fill_null(pc.index_in(words.flatten(), self._vocabulary), -1).to_numpy().astype(np.int64)
        ends = np.cumsum(words.value_lengths().to_numpy())
        starts = ends - words.value_lengths().to_numpy()
        for place in np.flatnonzero(np.isin(_gram_hashes(ids, self.rule.n), self._hashes)).tolist():
            row = int(np.searchsorted(ends, place, side="right"))
            gram = tuple(ids[place : min(place + self.rule.n, ends[row])].tolist())
            if gram in self._grams:
                yield row, self._grams[gram]
        short = (ends > starts) & (ends - starts < self.rule.n) if self._whole else np.zeros(len(ends), bool)
        for row in np.flatnonzero(short).tolist():
            whole = tuple(ids[starts[row] : ends[row]].tolist())
            if whole in self._whole:
                yield row, self._whole[whole]


class _Canary(Matcher):
    columns = _TEXTS

    def __init__(self, rule: CanaryList, data: bytes) -> None:
        super().__init__(rule, data)
        self._entries = list(_lines(data, self))

    def match(self, images: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        lines = np.zeros(len(images), np.int64)
        for text in _texts(images):
            for line, canary in reversed(self._entries):
                found = pc.match_substring(text, canary, ignore_case=True).to_numpy(zero_copy_only=False)
                lines = np.where(found & ((lines == 0) | (lines > line)), line, lines)
        return lines, np.full(len(images), NO_VALUE)


def _texts(images: pa.Table) -> Iterator[pa.Array]:
    """All that is written about each image: its captions, and the instruction of a finished sample."""
    captions = images["captions"].combine_chunks()
    for name in _CAPTIONS:
        yield pc.fill_null(pc.struct_field(captions, name), "")
    ready = images["ready"].to_pylist()
    if any(ready):
        yield pa.array([json.loads(sample)["instruction"] if sample else "" for sample in ready])


def _words(texts: pa.Array) -> pa.ListArray:
    """Words without case and punctuation."""
    plain = pc.utf8_lower(pc.utf8_normalize(texts, form="NFKC"))
    spaced = pc.utf8_trim_whitespace(pc.replace_substring_regex(plain, r"[^\pL\pN\pM]+", " "))
    return pc.if_else(pc.equal(spaced, ""), pa.scalar([], pa.list_(pa.string())), pc.split_pattern(spaced, " "))


def _gram_hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """A 64-bit hash of the n words that start at each place where n follow; equal words have equal hashes."""
    count = max(0, len(ids) - n + 1)
    hashes = np.zeros(count, np.uint64)
    for i in range(n):
        hashes = hashes * _FACTOR + ids[i : i + count].astype(np.uint64)
    return hashes


_MATCHERS: dict[type, type[Matcher]] = {
    Sha256List: _Sha256,
    PHashList: _PHash,
    EmbeddingList: _Embedding,
    NgramList: _Ngram,
    CanaryList: _Canary,
}
