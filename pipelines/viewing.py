"""Looking at a corpus from a notebook: tables, SQL, pictures, figures, and the way back from a sample to its source.

    corpus = open_corpus("build/demo/corpus")
    rows = corpus.sql("select key from samples where stream = 'edit' and edit_area_ratio > 0.2")
    corpus.show(rows)
    corpus.trace(rows["key"][0])

Nothing here prints or writes. Tables are Arrow; `.to_pandas()` makes a data frame of one.
"""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from PIL import Image

from pipelines import ledger
from pipelines.corpus import SAMPLE_INDEX, find_shards, read_members, summary
from pipelines.funnel import Step, funnel
from pipelines.funnel_views import filter_figure
from pipelines.preview import sample_strip, stack
from pipelines.report import facts
from pipelines.stages import STAGES
from pipelines.stages.annotate import AnnotateStage
from pipelines.stages.decide import DecideStage
from pipelines.stages.ingest import IngestStage
from pipelines.stages.score import ScoreStage
from pipelines.storage import Folder

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_SHOWN = 64  # strips that fit into one picture
_KEPT, _REFUSED = "0.45", "tab:red"
_OF_PHOTOGRAPHS = (IngestStage.name, ScoreStage.name, DecideStage.name, AnnotateStage.name)
_INDENT: dict[str, Any] = {"initial_indent": "    ", "subsequent_indent": "    "}


class ViewingError(ValueError):
    """Something that the corpus does not have."""


def open_corpus(url: str) -> Corpus:
    """Open a published corpus.

    Args:
        url: a path or an fsspec URL.

    Raises:
        ViewingError: it is no published corpus.
    """
    folder = Folder(url)
    if not folder.exists("manifest.json"):
        raise ViewingError(f"{url} has no manifest.json, so it is no published corpus; `x2i build` makes one")
    return Corpus(folder)


def progress(url: str) -> pa.Table:
    """How far every stage of a build is, published or not: `stage, units, inputs, kept, dropped, quarantined`.

    Args:
        url: of the corpus, a path or an fsspec URL.
    """
    folder = Folder(url)
    markers = {stage: ledger.read_markers(folder, stage) for stage in STAGES}
    return pa.Table.from_pylist(
        [
            {"stage": stage, "units": len(units), **ledger.totals(marker.counts for marker in units.values())}
            for stage, units in markers.items()
        ]
    )


@dataclass(frozen=True)
class Photograph:
    """One source image of a sample: what is known and was measured of it, by column name."""

    uid: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class Trace:
    """Where a sample comes from.

    Attributes:
        record: of the sample, as in its JSON member.
        photographs: its sources, in the order of the record's `parents`.
        ledger: what stages decided on these photographs, and the attempts that made this sample, as rows of
            `schemas.arrow.LEDGER` with their `stage`.
    """

    record: dict[str, Any]
    photographs: tuple[Photograph, ...]
    ledger: tuple[dict[str, Any], ...]

    @property
    def operations(self) -> list[dict[str, Any]]:
        """What was done, in order: `name, version, params, seed, model, revision`."""
        return [{**op, "params": json.loads(op["params"])} for op in self.record["ops"]]

    @property
    def models(self) -> dict[str, str]:
        """Revision of every model that took part."""
        return {op["model"]: op["revision"] for op in self.record["ops"] if op["model"]}

    def __str__(self) -> str:
        r = self.record
        lines = [f"{r['key']}  ({r['stream']} / {r['subtask']}, {r['direction']}, {r['split']})", r["instruction"]]
        for photograph in self.photographs:
            known = ", ".join(f"{name} {_short(value)}" for name, value in photograph.columns.items() if value != "")
            lines += [f"photograph {photograph.uid}", *textwrap.wrap(known, 110, **_INDENT)]
        lines += [
            ", ".join(text for text in (r["license"] or "no licence stated", r["author"], r["source_url"]) if text)
        ]
        lines.append("operations")
        for op in self.operations:
            model = f" with {op['model']} ({op['revision'] or 'no revision'})" if op["model"] else ""
            lines.append(f"    {op['name']} {op['version']}{model}  {json.dumps(op['params'], ensure_ascii=False)}")
        lines.append("ledger")
        for row in self.ledger:
            why = f": {row['reason']} {row['detail']}".rstrip() if row["reason"] else ""
            tried = row["input"].removeprefix(f"{row['uid']}/")
            lines.append(f"    {row['stage']} {row['unit']}#{row['row']}: {tried} {row['status']}{why}")
        return "\n".join(lines)

    __repr__ = __str__  # a notebook shows it as it is


@dataclass(frozen=True)
class Corpus:
    """A published corpus. `open_corpus` makes one."""

    folder: Folder

    @cached_property
    def samples(self) -> ds.Dataset:
        """The sample index (`schemas.arrow.SAMPLES`), a row per sample. It is read when it is asked for something."""
        return self._dataset(shard.sample_index for shard in find_shards(self.folder))

    @cached_property
    def ledger(self) -> pa.Table:
        """What became of every input of every stage: `schemas.arrow.LEDGER` with the `stage`."""
        tables = []
        for path in self.folder.list(ledger.FOLDER, ".parquet"):
            table = self.folder.read_table(path)
            stage = pa.repeat(path.split("/")[2], len(table))
            tables.append(table.append_column("stage", stage))
        return pa.concat_tables(tables)

    @cached_property
    def images(self) -> pa.Table:
        """What is known of every photograph: a row for each, with the columns of all scorers."""
        folders: dict[str, list[str]] = {}
        for path in self.folder.list("meta/scores", ".parquet"):
            folders.setdefault(path.split("/")[2], []).append(path)
        names = sorted(folders, key=lambda name: (name != IngestStage.name, name))  # all images are in ingest's
        first, *others = (self._dataset(folders[name]).to_table() for name in names)
        for table in others:
            first = first.join(table.drop_columns(["uid"]), ["unit", "row"], join_type="left outer")
        return first.sort_by([("unit", "ascending"), ("row", "ascending")])

    def sql(self, query: str) -> pa.Table:
        """Ask with SQL. Tables are `samples`, `ledger` and `images`; only what the query needs is read of `samples`.

        Raises:
            ViewingError: duckdb is not installed.
        """
        try:
            import duckdb
        except ImportError as error:
            raise ViewingError("SQL needs duckdb: pip install 'x2i[notebooks]'") from error
        with duckdb.connect() as connection:
            for name in ("samples", "ledger", "images"):
                if name in query:  # the others need not be read
                    connection.register(name, getattr(self, name))
            return connection.sql(query).to_arrow_table()

    def summary(self) -> dict[str, Any]:
        """Counts per stream and subtask, see `pipelines.corpus.summary`."""
        return summary(self.folder)

    def rows(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """Index rows of samples, in the order of their keys.

        Raises:
            ViewingError: there is no such sample.
        """
        found = self.samples.to_table(filter=pc.field("key").isin(list(keys))).to_pylist()
        by_key = {row["key"]: row for row in found}
        if missing := [key for key in keys if key not in by_key]:
            raise ViewingError(f"{self.folder.url} has no sample {missing[0]!r}; look in {SAMPLE_INDEX}")
        return [by_key[key] for key in keys]

    def members(self, key: str) -> dict[str, bytes]:
        """The files of a sample by name, e.g. `input_1.jpg`."""
        return read_members(self.folder, self.rows([key])[0])

    def pictures(self, key: str) -> dict[str, Image.Image]:
        """The images of a sample by role: `input_1`, ..., `output`, and `edit_mask` where there is one."""
        members = self.members(key).items()
        return {name[:-4]: Image.open(io.BytesIO(data)) for name, data in members if name.endswith((".jpg", ".png"))}

    def show(self, rows: pa.Table | pd.DataFrame | Iterable[str | Mapping[str, Any]], title: str = "") -> Image.Image:
        """Samples below each other: inputs, output, edit mask, loss weight, instruction.

        Args:
            rows: keys, or anything with a `key` in every row, such as a result of `sql`; at most 64.
            title: to stand above them.

        Raises:
            ViewingError: no rows, too many of them, or an unknown key.
        """
        keys = _keys(rows)
        if not 0 < len(keys) <= _MOST_SHOWN:
            raise ViewingError(f"{len(keys)} samples to show; give 1 to {_MOST_SHOWN}, e.g. with `limit` in SQL")
        shown = [sample_strip(row, read_members(self.folder, row)) for row in self.rows(keys)]
        return stack(shown, title or f"{len(keys)} sample{'s' if len(keys) != 1 else ''}")

    def trace(self, key: str) -> Trace:
        """Follow a sample back to its photographs. It reads the ledger of all stages.

        Raises:
            ViewingError: there is no such sample.
        """
        (row,) = self.rows([key])
        place = ("shard", "index", "offset", "size", "members")
        record = {name: value for name, value in row.items() if name not in place}
        parents = record["parents"]
        images = self.images.filter(pc.is_in(self.images["uid"], pa.array(parents))).to_pylist()
        columns = {i["uid"]: {n: v for n, v in i.items() if n not in ("uid", "unit", "row")} for i in images}
        entries = self.ledger.filter(pc.is_in(self.ledger["uid"], pa.array(parents))).to_pylist()
        made = sorted(_entries_of(key, entries), key=lambda entry: [*STAGES].index(entry["stage"]))
        return Trace(record, tuple(Photograph(uid, columns.get(uid, {})) for uid in parents), tuple(made))

    def plot_distributions(self, *names: str) -> Figure:
        """Histograms by stream of what samples measure, e.g. `instruction length`, `edit area` or any gate's score.

        Args:
            names: which ones; none for all but the scores.

        Raises:
            ViewingError: an unknown name; the message lists those that there are.
        """
        known = {d.name: d for d in self._contents.distributions}
        if unknown := [name for name in names if name not in known]:
            raise ViewingError(f"no sample has {unknown[0]!r}; there are {', '.join(known)}")
        chosen = [known[name] for name in names] or [d for d in known.values() if not d.is_score]
        panels = [(d, stream) for d in chosen for stream in d.counts]
        figure = _figure(7, 0.6 + 0.75 * len(panels))
        for axes, (distribution, stream) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
            _draw(axes, distribution, stream)
        return figure

    def plot_funnel(self) -> Figure:
        """How many photographs each rule let pass and refused, in the order of judgement."""
        steps = [step for step in self._funnel if step.entered]
        figure = _figure(8, 0.8 + 0.28 * len(steps))
        axes = figure.subplots()
        names = [f"{step.name}  {step.rule}" for step in steps]
        left = [step.left for step in steps]
        refused = [step.entered - step.left for step in steps]
        axes.barh(names, left, color=_KEPT, label="left")
        axes.barh(names, refused, left=left, color=_REFUSED, label="refused")
        axes.invert_yaxis()
        axes.set_xlabel("photographs")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
        return figure

    def plot_filter(self, column: str) -> Figure:
        """The values that a filter saw, with its threshold.

        Raises:
            ViewingError: no filter judged the column; the message lists those that did.
        """
        steps = {step.column: step for step in self._funnel if step.histogram}
        if column not in steps:
            raise ViewingError(f"no filter judged {column!r}; there are {', '.join(steps) or 'none'}")
        return filter_figure(steps[column])

    def plot_mixture(self) -> Figure:
        """Shares of tasks in the corpus, beside those that OmniGen was trained with."""
        shares = facts.mixture({name: stream["samples"] for name, stream in self.summary()["streams"].items()})
        figure = _figure(7, 2.4)
        axes = figure.subplots()
        names = [share.name for share in shares]
        axes.barh(names, [share.present for share in shares], color=_KEPT, label="in the corpus")
        axes.plot([share.requested for share in shares], names, "|", color=_REFUSED, ms=20, mew=3, label="requested")
        axes.invert_yaxis()
        axes.set_xlabel("share of samples")
        axes.legend()
        return figure

    @cached_property
    def _funnel(self) -> list[Step]:
        return funnel(self.folder)

    @cached_property
    def _contents(self) -> facts.Contents:
        return facts.contents(self.folder)

    def _dataset(self, paths: Iterable[str]) -> ds.Dataset:
        return ds.dataset([self.folder.path(path) for path in paths], format="parquet", filesystem=self.folder.fs)


def _entries_of(key: str, entries: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of the ledger entries of a sample's photographs, those that led to the sample or say what became of it.

    A few-shot group is made of samples, so the attempts that made those led to it too.
    """
    keys = {key, *(entry["input"] for entry in entries if key in entry["outputs"])}
    for entry in entries:
        if entry["stage"] in _OF_PHOTOGRAPHS or key == entry["input"] or keys & {*entry["outputs"]}:
            yield dict(entry)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _keys(rows: Any) -> list[str]:
    """Keys of samples in an Arrow table, a data frame, or a sequence of keys or rows."""
    if hasattr(rows, "columns"):  # of Arrow or pandas
        return [str(key) for key in (rows["key"].to_pylist() if isinstance(rows, pa.Table) else rows["key"])]
    return [str(row if isinstance(row, str | pa.StringScalar) else row["key"]) for row in rows]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _draw(axes: Axes, distribution: facts.Distribution, stream: str) -> None:
    axes.stairs(distribution.counts[stream], distribution.edges, fill=True, color=_KEPT)
    axes.axvline(distribution.medians[stream], color=_REFUSED)
    if distribution.logarithmic:
        axes.set_xscale("log")
    axes.set_yticks([])
    axes.spines[["left", "right", "top"]].set_visible(False)
    unit = f" ({distribution.unit})" if distribution.unit else ""
    median = f"median {distribution.medians[stream]:.3g}"
    axes.set_title(f"{stream}: {distribution.name}{unit}, {median}", fontsize=9, loc="left")
    axes.tick_params(labelsize=8)
