"""What a report says about a corpus, as plain numbers: the page and the notebook's figures draw the same.

Everything is read from what is published. Of the samples only the index is read, once, a shard at a time; memory does
not grow with their number.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fine_tune.index import Index, SkipLog, StreamIndex
from fine_tune.order import AUTHORS_MIXTURE, OTHER, stream_shares
from pipelines import ledger
from pipelines.corpus import iter_index, output_position
from pipelines.stages import STAGES
from pipelines.storage import Folder
from schemas.records import UNKNOWN
from schemas.vocabulary import STREAMS

BINS = 40
_DIGITS = 3  # significant ones that are kept of a value, so that the number of distinct values is bounded
_LOG_SPREAD = 20  # values whose largest is so many times their median are drawn on a logarithmic axis
_COLUMNS = (
    *("stream", "subtask", "instruction", "members", "edit_area_ratio", "severity"),
    *("align", "change", "scores", "ops"),
)


@dataclass(frozen=True)
class Distribution:
    """One number that samples have, by stream, in bins common to all streams.

    Attributes:
        name: what it is.
        unit: e.g. `px`; "" for none.
        edges: n + 1 ascending bin edges.
        counts: n samples per bin, by stream.
        medians: by stream.
        is_score: whether it is one that a builder's gate measured (the record's `scores`).
        logarithmic: edges are equally spaced on a logarithmic axis.
    """

    name: str
    unit: str
    edges: tuple[float, ...]
    counts: dict[str, tuple[int, ...]]
    medians: dict[str, float]
    is_score: bool = False
    logarithmic: bool = False

    @property
    def samples(self) -> dict[str, int]:
        """How many samples of each stream have a value."""
        return {stream: sum(counts) for stream, counts in self.counts.items()}


@dataclass(frozen=True)
class Model:
    """A model that took part: in which operations, and how often over all samples."""

    model: str
    revision: str
    operations: tuple[str, ...]
    uses: int


@dataclass(frozen=True)
class Contents:
    """What one pass over the sample index finds."""

    distributions: tuple[Distribution, ...]
    models: tuple[Model, ...]


def contents(corpus: Folder) -> Contents:
    """Distributions of what samples measure, by stream, and the models that made them."""
    tally = _Tally()
    for table in iter_index(corpus, columns=_COLUMNS):
        tally.add(table)
    distributions = (_distribution(*key, by_stream) for key, by_stream in tally.values.items())
    return Contents(tuple(d for d in distributions if any(d.samples.values())), tally.found_models())


@dataclass
class _Tally:
    """Counts of rounded values by (name, unit, is_score) and stream, and of operations with a model."""

    values: dict[tuple[str, str, bool], dict[str, Counter[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(Counter))
    )
    models: dict[tuple[str, str], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, table: pa.Table) -> None:
        """Add the index of one shard."""
        stream = table["stream"][0].as_py()
        for name, unit, values in _measured(table, stream):
            self._count(name, unit, False, stream, values)
        scores: dict[str, list[float]] = defaultdict(list)
        for row in table["scores"].to_pylist():
            for name, value in json.loads(row).items():
                if isinstance(value, int | float) and value != UNKNOWN:
                    scores[name].append(value)
        for name in sorted(scores):
            self._count(name, "", True, stream, np.array(scores[name], float))
        ops = pc.list_flatten(table["ops"])
        names = zip(*(pc.struct_field(ops, part).to_pylist() for part in ("model", "revision", "name")), strict=True)
        for model, revision, name in names:
            if model:
                self.models[model, revision][name] += 1

    def _count(self, name: str, unit: str, is_score: bool, stream: str, values: np.ndarray) -> None:
        found, counts = np.unique(_rounded(values[np.isfinite(values)]), return_counts=True)
        self.values[name, unit, is_score][stream].update(dict(zip(found.tolist(), counts.tolist(), strict=True)))

    def found_models(self) -> tuple[Model, ...]:
        return tuple(
            Model(model, revision, tuple(sorted(operations)), operations.total())
            for (model, revision), operations in sorted(self.models.items())
        )


def _measured(table: pa.Table, stream: str) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name, unit and known values of what every record measures."""
    output = pc.list_element(table["members"], output_position(stream))
    width, height = (pc.struct_field(output, side).to_numpy().astype(float) for side in ("width", "height"))
    yield "output size", "px", np.sqrt(width * height)
    words = pc.list_value_length(pc.utf8_split_whitespace(table["instruction"]))
    yield "instruction length", "words", words.to_numpy().astype(float)
    for name, unit, column in (
        ("edit area", "of the image", table["edit_area_ratio"]),
        ("severity", "", table["severity"]),
        ("PSNR outside the mask", "dB", pc.struct_field(table["align"], "psnr_outside")),
        ("change inside the mask", "levels", pc.struct_field(table["change"], "l1_inside")),
    ):
        values = column.to_numpy()
        yield name, unit, values[values >= 0]


def _rounded(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        scale = 10.0 ** (_DIGITS - 1 - np.floor(np.log10(np.abs(values))))
    return np.where(values == 0, 0.0, np.round(values * np.where(values == 0, 1, scale)) / scale)


def _distribution(name: str, unit: str, is_score: bool, by_stream: Mapping[str, Counter[float]]) -> Distribution:
    pairs = {stream: np.array(sorted(counts.items()), float).reshape(-1, 2) for stream, counts in by_stream.items()}
    pairs = {stream: found for stream, found in pairs.items() if len(found)}
    every = np.unique(np.concatenate([found[:, 0] for found in pairs.values()])) if pairs else np.zeros(1)
    low, high = every[0], every[-1]
    medians = {stream: float(_median(found)) for stream, found in pairs.items()}
    logarithmic = bool(low > 0 and medians and high > _LOG_SPREAD * max(medians.values()))
    if low == high:
        edges = np.array([low - 0.5, low + 0.5])
    else:
        edges = np.geomspace(low, high, BINS + 1) if logarithmic else np.linspace(low, high, BINS + 1)
        edges[0], edges[-1] = low, high  # rounding must not push the extremes out
    counts = {
        stream: tuple(np.histogram(found[:, 0], edges, weights=found[:, 1])[0].astype(int).tolist())
        for stream, found in pairs.items()
    }
    return Distribution(name, unit, tuple(edges.tolist()), counts, medians, is_score, logarithmic)


def _median(pairs: np.ndarray) -> float:
    """Of values with their numbers: the smallest that at least half do not exceed."""
    cumulative = np.cumsum(pairs[:, 1])
    return pairs[np.searchsorted(cumulative, cumulative[-1] / 2), 0]


@dataclass(frozen=True)
class Share:
    """A part of OmniGen's mixture.

    Attributes:
        name: the task group, as in `fine_tune.order.AUTHORS_MIXTURE`.
        requested: its share there.
        samples, present: of it in the corpus, and their share.
        drawn: the share that training draws with that mixture: the requested one, scaled up for what is missing.
        streams: samples and drawn share of each stream.
    """

    name: str
    requested: float
    samples: int
    present: float
    drawn: float
    streams: dict[str, tuple[int, float]]

    @property
    def repeats(self) -> float:
        """How often a sample of it is drawn, compared with one drawn evenly from the corpus; 0 if there is none."""
        return self.drawn / self.present if self.samples else 0.0


def mixture(samples: Mapping[str, int], requested: Mapping[str, float] = AUTHORS_MIXTURE) -> list[Share]:
    """Samples by stream, compared with a mixture of tasks (default: the authors')."""
    nothing = np.zeros(1, np.int32)
    index = Index(
        tuple(
            StreamIndex(name, (), np.array([0, n]), np.broadcast_to(nothing, n), np.broadcast_to(nothing, n))
            for name, n in samples.items()
        ),
        SkipLog(),
        sum(samples.values()),
    )
    drawn = stream_shares(index, requested)
    total = sum(samples.values())
    shares = []
    for name, wanted in requested.items():
        streams = {s: n for s, n in samples.items() if _group(s, requested) == name}
        of_it = sum(streams.values())
        draws = {s: (n, drawn.get(s, 0.0)) for s, n in streams.items()}
        shares.append(Share(name, wanted, of_it, of_it / total, sum(d for _, d in draws.values()), draws))
    return shares


def _group(stream: str, requested: Mapping[str, float]) -> str:
    return next((name for name in (stream, STREAMS[stream].task) if name in requested), OTHER)


@dataclass
class Yield:
    """What became of the attempts at one thing; `parts` are the attempts by their own name."""

    name: str
    attempts: int = 0
    kept: int = 0
    samples: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    parts: dict[str, Yield] = field(default_factory=dict)

    def add(self, kept: bool, samples: int, reason: str) -> None:
        self.attempts += 1
        self.kept += kept
        self.samples += samples
        if not kept:
            self.reasons[reason] += 1


def yields(corpus: Folder) -> dict[str, list[Yield]]:
    """Attempts of every stage that makes samples, by stage and builder.

    Such a stage names the samples in its ledger. Inputs are `uid/builder/attempt`, or samples of which several make
    a new one.
    """
    found: dict[str, dict[str, Yield]] = {}
    columns = ["input", "uid", "status", "reason", "outputs"]
    for path in corpus.list(ledger.FOLDER, ".parquet"):
        stage = path.split("/")[2]
        named: set[str] = set()
        for row in corpus.read_table(path, columns).to_pylist():
            tried = row["input"].removeprefix(f"{row['uid']}/")
            builder, _, attempt = tried.partition("/") if tried != row["input"] else (stage, "", "")
            of_builder = found.setdefault(stage, {}).setdefault(builder, Yield(builder))
            outcome = row["status"] == "kept", len({*row["outputs"]} - named), row["reason"]
            named.update(row["outputs"])
            of_builder.add(*outcome)
            if attempt:
                of_builder.parts.setdefault(attempt, Yield(attempt)).add(*outcome)
    return {
        stage: [by_builder[name] for name in sorted(by_builder)]
        for stage, by_builder in found.items()
        if any(y.samples for y in by_builder.values())
    }


def accounts(corpus: Folder) -> dict[str, dict[str, int]]:
    """Inputs, kept, dropped and quarantined per stage, in the order of stages, from the markers."""
    present = {name.split("/")[2] for name in corpus.list(ledger.FOLDER, ".json")}
    stages = (stage for stage in STAGES if stage in present)
    return {s: ledger.totals(m.counts for m in ledger.read_markers(corpus, s).values()) for s in stages}


@dataclass(frozen=True)
class Neighbours:
    """Near duplicates among the photographs, as found before one of each pair is dropped."""

    kind: str
    pairs: int
    images: int


def neighbours(corpus: Folder) -> list[Neighbours]:
    """Pairs and images concerned, by kind of comparison."""
    tables: dict[str, list[pa.Table]] = defaultdict(list)
    for path in corpus.list("meta/neighbours", ".parquet"):
        tables[path.split("/")[2]].append(corpus.read_table(path, ["uid_a", "uid_b"]))
    found = []
    for kind in sorted(tables):
        pairs = pa.concat_tables(tables[kind])
        uids: set[Any] = {*pairs["uid_a"].unique().to_pylist(), *pairs["uid_b"].unique().to_pylist()}
        found.append(Neighbours(kind, len(pairs), len(uids)))
    return found
