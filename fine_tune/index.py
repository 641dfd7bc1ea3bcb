"""What the trainer knows of a corpus without reading a shard: where every sample is and how many tokens it takes.

The sample index of a corpus (`meta/samples/*.parquet`, see `schemas.arrow.SAMPLES`) is read once, a shard at a time,
and kept as two int32 numbers per sample, 8 GB at 10^9 samples. Everything else about a sample (its key, offsets and
prompt) is looked up in the Parquet file of its shard when it is its turn.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from fine_tune.packing import tokens_of
from fine_tune.tokens import Tokenizer, count_tokens, fitted_size, image_only_prompt
from schemas.vocabulary import STREAMS

log = logging.getLogger(__name__)

SAMPLE_INDEX = "meta/samples"
COLUMNS = [
    *("key", "shard", "index", "offset", "size", "members", "split", "task", "subtask"),
    *("instruction", "instruction_variants", "edit_source_index"),
]
_KEPT_EXAMPLES = 1000


class CorpusError(ValueError):
    """A corpus that cannot be trained on; the message says what is wrong with it and what to do."""


class SampleError(ValueError):
    """A sample that cannot be used. `reason` is one of a few words to count by, the message has the details."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True)
class Skip:
    """A sample that was left out."""

    shard: str
    key: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.shard}:{self.key}:{self.detail}"


@dataclass
class SkipLog:
    """Samples left out, counted by reason; only the first thousand are kept in full."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[Skip] = field(default_factory=list)

    def add(self, skips: Iterable[Skip]) -> None:
        for skip in skips:
            self.counts[skip.reason] += 1
            if len(self.examples) < _KEPT_EXAMPLES:
                self.examples.append(skip)

    @property
    def total(self) -> int:
        return sum(self.counts.values())


class Corpus:
    """A corpus folder on any fsspec path, read only. Safe to use from many threads."""

    def __init__(self, url: str, cached_tables: int = 256) -> None:
        self.url = url
        self.fs, root = fsspec.core.url_to_fs(url)
        self.root = root.rstrip("/")
        self.table = lru_cache(maxsize=cached_tables)(self.read_table)

    def list_indexes(self) -> list[str]:
        """Sorted paths of the sample indexes, relative to the corpus.

        Raises:
            CorpusError: there is none.
        """
        folder = f"{self.root}/{SAMPLE_INDEX}"
        names = self.fs.ls(folder, detail=False) if self.fs.exists(folder) else []
        found = sorted(f"{SAMPLE_INDEX}/{name.rsplit('/', 1)[1]}" for name in names if name.endswith(".parquet"))
        if not found:
            raise CorpusError(f"{self.url} has no {SAMPLE_INDEX}/*.parquet: it is not a corpus built by `x2i build`")
        return found

    def fingerprint(self, path: str) -> str:
        """Changes when the file does, as far as the file system tells."""
        return str(self.fs.ukey(f"{self.root}/{path}"))

    def version(self) -> str:
        """Changes when the corpus is built again."""
        manifest = f"{self.root}/manifest.json"
        self.fs.invalidate_cache(self.root)
        return str(self.fs.ukey(manifest)) if self.fs.exists(manifest) else ""

    def row(self, stream: StreamIndex, item: int) -> dict[str, Any]:
        """What the sample index has on a sample."""
        table, number = stream.locate(item)
        return self.table(table).slice(number, 1).to_pylist()[0]

    def read(self, path: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file; fewer where it ends earlier."""
        if isinstance(self.fs, LocalFileSystem):
            with open(f"{self.root}/{path}", "rb", buffering=0) as file:  # noqa: PTH123 - buffering
                return os.pread(file.fileno(), stop - start, start)
        return self.fs.cat_file(f"{self.root}/{path}", start=start, end=stop)

    def read_table(self, path: str) -> pa.Table:
        """The columns that training needs, of one sample index. `table` is the same, cached.

        Raises:
            CorpusError: not a sample index.
        """
        data = self.fs.cat_file(f"{self.root}/{path}")
        try:
            return pq.read_table(io.BytesIO(data), columns=COLUMNS).select(COLUMNS)
        except (pa.ArrowInvalid, KeyError) as error:
            raise CorpusError(f"{self.url}/{path} lacks fields of a sample index: {error}") from error


@dataclass(frozen=True)
class StreamIndex:
    """The usable samples of one stream, in the order of its shards.

    Attributes:
        name: of the stream.
        tables: paths of the sample indexes, relative to the corpus.
        starts: int64 [tables + 1]; samples `starts[i] : starts[i + 1]` are those of table i.
        rows: int32 [N]; the row of each sample in its table.
        tokens: int32 [N]; an upper bound of the rows it takes in a pack, reached if nothing of it is dropped.
        tokens_at: the same by longest side in pixels, for sides other than the one that `tokens` is counted for.
    """

    name: str
    tables: tuple[str, ...]
    starts: np.ndarray
    rows: np.ndarray
    tokens: np.ndarray
    tokens_at: Mapping[int, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def task(self) -> str:
        return STREAMS[self.name].task

    def locate(self, item: int) -> tuple[str, int]:
        """Table and row of a sample."""
        table = int(np.searchsorted(self.starts, item, side="right")) - 1
        return self.tables[table], int(self.rows[item])

    @cached_property
    def members(self) -> str:
        """Identity of the samples and their order, whatever size they are brought to."""
        return _digest([self.name, self.tables], self.starts, self.rows)


@dataclass(frozen=True)
class Index:
    """All usable samples of a split."""

    streams: tuple[StreamIndex, ...]
    skips: SkipLog
    samples_seen: int

    def __len__(self) -> int:
        return sum(len(stream) for stream in self.streams)

    @cached_property
    def digest(self) -> str:
        """Identity of what is trained on: the order of samples is a function of this, the settings and the seed."""
        parts = [_digest([s.members, *s.tokens_at], s.tokens, *s.tokens_at.values()) for s in self.streams]
        return _digest(parts)


def _digest(names: Sequence[Any], *arrays: np.ndarray) -> str:
    total = hashlib.sha256(json.dumps(names).encode())
    for array in arrays:
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


@dataclass(frozen=True)
class CountRule:
    """What decides how many tokens a sample takes, and whether it is taken at all.

    Attributes:
        max_side: longest side of an image in pixels.
        budget: tokens that a pack has room for.
        other_sides: smaller sides to which samples are brought too, in turn.
        draws: of the target of every sample.
    """

    tokenizer: Tokenizer
    max_side: int
    budget: int
    other_sides: tuple[int, ...] = ()
    draws: int = 1

    @property
    def sides(self) -> tuple[int, ...]:
        return (self.max_side, *self.other_sides)

    def tokens(self, row: Mapping[str, Any], inputs: int) -> int:
        """Most rows that the sample can take in a pack, whichever of its instructions is drawn.

        Raises:
            SampleError: malformed prompt, edit pair of different shapes, or more tokens than a pack holds.
        """
        sizes = fitted_sizes(row, inputs, self.max_side)
        prompts = [row["instruction"], *row["instruction_variants"]]
        if inputs:
            prompts.append(image_only_prompt(inputs))
        tokens = max(self._prompt_tokens(prompt, sizes) for prompt in prompts)
        if tokens > self.budget:
            raise SampleError("too long", f"{tokens} tokens do not fit into a pack of {self.budget}")
        return tokens

    def _prompt_tokens(self, prompt: str, sizes: Sequence[tuple[int, int]]) -> int:
        *input_sizes, target_size = sizes
        try:
            # Images of one token each: where they stand is all that matters here.
            condition = self.tokenizer.encode(prompt, [(16, 16)] * len(input_sizes))
        except ValueError as error:
            raise SampleError("malformed prompt", str(error)) from error
        text = len(condition.token_ids) - len(condition.image_spans)
        shown = [_patches(input_sizes[index]) for _, _, index in condition.image_spans]
        return tokens_of(text, shown, _patches(target_size), self.draws)

    @cached_property
    def digest(self) -> str:
        vocabulary = json.dumps(sorted(self.tokenizer.backend.get_vocab().items()))
        return hashlib.sha256(f"{vocabulary}\0{self.max_side}\0{self.budget}\0{self.draws}".encode()).hexdigest()


def fitted_sizes(row: Mapping[str, Any], inputs: int, max_side: int) -> list[tuple[int, int]]:
    """(height, width) of the input images and the target as the model sees them, from the index alone.

    Raises:
        SampleError: an edit pair whose images cannot be fitted by one window.
    """
    members = row["members"][: inputs + 1]
    sizes = [(member["width"], member["height"]) for member in members]
    fitted = [fitted_size(size, max_side) for size in sizes]
    if (source := row["edit_source_index"]) >= 0:
        (width, height), (target_width, target_height) = sizes[source], sizes[-1]
        scale = min(target_width / width, target_height / height)
        if max(target_width - width * scale, target_height - height * scale) >= 16:
            detail = f"source {width}x{height}, target {target_width}x{target_height}"
            raise SampleError("edit pair of different shapes", detail)
        fitted[source] = fitted[-1]
    return fitted


def open_index(corpus: Corpus, split: str, rule: CountRule, cache: Path | None = None, threads: int = 4) -> Index:
    """Read the sample index of a split, counting the tokens of every sample exactly.

    Counting needs the tokenizer, about 5,000 samples a second on a core and side; the result is kept in `cache`, under
    a name that changes with the corpus, the tokenizer and the settings.

    Raises:
        CorpusError: no sample index, a sample index without the fields needed, or no usable sample of the split.
    """
    index = _open_side(corpus, split, rule, cache, threads)
    others = {s: _open_side(corpus, split, replace(rule, max_side=s), cache, threads) for s in rule.other_sides}
    return replace(index, streams=tuple(_with_sides(stream, others) for stream in index.streams))


def _with_sides(stream: StreamIndex, others: Mapping[int, Index]) -> StreamIndex:
    """The stream with its tokens at other sides. Samples that fit into a pack at the largest fit at all of them."""
    found = {side: next(s for s in index.streams if s.name == stream.name) for side, index in others.items()}
    return replace(stream, tokens_at={side: other.tokens[_find(stream, other)] for side, other in found.items()})


def _find(stream: StreamIndex, other: StreamIndex) -> np.ndarray:
    """Where the samples of a stream are in another index of it, which has them all."""
    parts = []
    for number, table in enumerate(stream.tables):
        place = other.tables.index(table)
        rows = stream.rows[stream.starts[number] : stream.starts[number + 1]]
        among = other.rows[other.starts[place] : other.starts[place + 1]]
        parts.append(other.starts[place] + np.searchsorted(among, rows))
    return np.concatenate(parts)


def _open_side(corpus: Corpus, split: str, rule: CountRule, cache: Path | None, threads: int) -> Index:
    tables = corpus.list_indexes()
    parts = [corpus.fingerprint(table) for table in tables] + [rule.digest, split]
    file = cache / f"index-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]}.npz" if cache else None
    if file and file.is_file():
        return _load(file)
    with ThreadPoolExecutor(threads) as pool:
        counted = list(pool.map(lambda table: _count_table(corpus, table, split, rule), tables))
    index = _join(tables, counted)
    if not len(index):
        reasons = ", ".join(f"{number} {reason}" for reason, number in index.skips.counts.items()) or "none at all"
        raise CorpusError(f"{corpus.url} has no usable sample of split {split!r} (left out: {reasons})")
    if file:
        _save(index, file)
    return index


@dataclass(frozen=True)
class _Counted:
    rows: np.ndarray
    tokens: np.ndarray
    skips: list[Skip]


def _count_table(corpus: Corpus, path: str, split: str, rule: CountRule) -> _Counted:
    inputs = len(STREAMS[_stream_of(path)].inputs)
    rows, tokens, skips = [], [], []
    for number, row in enumerate(iter_rows(corpus, path)):
        if row["split"] != split:
            continue
        try:
            tokens.append(rule.tokens(row, inputs))
            rows.append(number)
        except SampleError as error:
            skips.append(Skip(row["shard"], row["key"], error.reason, str(error)))
    return _Counted(np.array(rows, np.int32), np.array(tokens, np.int32), skips)


def iter_rows(corpus: Corpus, path: str) -> Iterator[dict[str, Any]]:
    """The rows of one sample index, past the cache: a pass over all tables would only churn it."""
    for batch in corpus.read_table(path).to_batches(max_chunksize=1024):
        yield from batch.to_pylist()


def _join(tables: Sequence[str], counted: Sequence[_Counted]) -> Index:
    skips, streams = SkipLog(), []
    for part in counted:
        skips.add(part.skips)
    for name, group in groupby(zip(tables, counted, strict=True), key=lambda pair: _stream_of(pair[0])):
        pairs = [pair for pair in group if len(pair[1].rows)]
        if not pairs:
            continue
        starts = np.cumsum([0, *(len(part.rows) for _, part in pairs)], dtype=np.int64)
        rows = np.concatenate([part.rows for _, part in pairs])
        tokens = np.concatenate([part.tokens for _, part in pairs])
        streams.append(StreamIndex(name, tuple(table for table, _ in pairs), starts, rows, tokens))
    return Index(tuple(streams), skips, sum(len(part.rows) + len(part.skips) for part in counted))


def _stream_of(table: str) -> str:
    name = table.rsplit("/", 1)[-1].rsplit("-", 1)[0]
    if name not in STREAMS:
        raise CorpusError(f"{table} belongs to no known stream; streams are {', '.join(STREAMS)}")
    return name


def _save(index: Index, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{stream.name}/{name}": getattr(stream, name)
        for stream in index.streams
        for name in ("starts", "rows", "tokens")
    }
    about = {
        "streams": [[stream.name, stream.tables] for stream in index.streams],
        "skips": [vars(skip) for skip in index.skips.examples],
        "counts": index.skips.counts,
        "samples_seen": index.samples_seen,
    }
    partial = file.with_suffix(f".{os.getpid()}.npz")  # several ranks may write it at once
    np.savez(partial, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)
    partial.replace(file)


def _load(file: Path) -> Index:
    with np.load(file) as arrays:
        about = json.loads(arrays["about"].tobytes())
        streams = tuple(
            StreamIndex(name, tuple(tables), *(arrays[f"{name}/{part}"] for part in ("starts", "rows", "tokens")))
            for name, tables in about["streams"]
        )
    skips = SkipLog(Counter(about["counts"]), [Skip(**skip) for skip in about["skips"]])
    return Index(streams, skips, about["samples_seen"])


def _patches(size: tuple[int, int]) -> tuple[int, int]:
    count_tokens(size)
    return size[0] // 16, size[1] // 16
