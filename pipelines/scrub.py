"""Takes images out of everything beside the shards: tables, ledgers, and the tars that belong to tables.

Whatever names a forgotten image goes with it, whichever stage wrote it. In a tar, bytes are overwritten with zeros and
nothing moves, so that the places which a table knows stay right whenever the work is interrupted. All of it may be
repeated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import ledger
from pipelines.stages.ingest import IngestStage
from pipelines.storage import Folder
from pipelines.tombstones import REASON
from schemas.arrow import LEDGER
from schemas.identity import UID_CHARS

_TOKEN = re.compile(rf"[a-z0-9][a-z0-9_-]{{{UID_CHARS - 1},}}")
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Doomed:
    """What is to be forgotten: images by the start of their uid, with which their samples' keys begin, and samples."""

    prefixes: frozenset[str]
    keys: frozenset[str]

    @classmethod
    def of(cls, uids: Iterable[str], keys: Iterable[str] = ()) -> Doomed:
        return cls(frozenset(uid[:UID_CHARS] for uid in uids), frozenset(keys))

    def is_named_in(self, text: str) -> bool:
        return any(token[:UID_CHARS] in self.prefixes or token in self.keys for token in _TOKEN.findall(text))

    def rows_naming(self, table: pa.Table) -> np.ndarray:
        """bool [rows]: which rows name any of it, in whatever column of text."""
        named = np.zeros(len(table), bool)
        for column in table.columns:
            for rows, texts in _texts(column.combine_chunks(), np.arange(len(table))):
                values = texts.dictionary_encode()
                long = pc.match_substring_regex(values.dictionary, _TOKEN.pattern).to_numpy(zero_copy_only=False)
                hits = [i for i in np.flatnonzero(long) if self.is_named_in(values.dictionary[int(i)].as_py())]
                indices = values.indices.fill_null(-1).to_numpy(zero_copy_only=False)
                named[rows[np.isin(indices, hits)]] = True
        return named


def scrub_table(corpus: Folder, name: str, doomed: Doomed) -> bool:
    """Take rows out of a table, and their members out of its tar; whether there were any."""
    rows = _find(corpus, name, doomed)
    if rows is None:
        return False
    table, tar = corpus.read_table(name), f"{name.removesuffix('.parquet')}.tar"
    if "members" in table.column_names and corpus.exists(tar):
        gone = table["members"].filter(pa.array(rows)).to_pylist()
        blank(corpus, tar, (tuple(place) for members in gone for place in json.loads(members).values()))
    corpus.write_table(name, _without(table, rows))
    return True


def scrub_part(corpus: Folder, name: str, doomed: Doomed) -> bool:
    """Take samples out of a part, given by its index. The others stay at their places, and so in their shards."""
    rows = _find(corpus, name, doomed)
    if rows is None:
        return False
    table = corpus.read_table(name)
    gone = table.select(["offset", "size"]).filter(pa.array(rows)).to_pylist()
    blank(corpus, f"{name.removesuffix('.parquet')}.tar", ((row["offset"], row["size"]) for row in gone))
    corpus.write_table(name, _without(table, rows))
    return True


def scrub_ledger(corpus: Folder, name: str, doomed: Doomed) -> bool:
    """Take images out of a ledger.

    The first stage still accounts for its input, without saying which it was; later ones never saw it. What is said of
    other images loses what names these; if nothing is left of what became of them, they are dropped.
    """
    if _find(corpus, name, doomed) is None:
        return False
    is_first = name.startswith(f"{ledger.FOLDER}/{IngestStage.name}/")
    rows = (_scrubbed(row, doomed, is_first) for row in corpus.read_table(name).to_pylist())
    corpus.write_table(name, pa.Table.from_pylist([row for row in rows if row], LEDGER))
    return True


def recount(corpus: Folder) -> None:
    """Bring the counts of all markers in line with what their tables hold."""
    for path in corpus.list(ledger.FOLDER, ".json"):
        marker = ledger.Marker(**corpus.read_json(path))
        tables = [name for name in marker.outputs if name.endswith(".parquet")]
        ledgers = [name for name in tables if name.startswith(f"{ledger.FOLDER}/")]
        if ledgers:
            counts = ledger.totals(_count(corpus, name) for name in ledgers)
        elif marker.stage == "neighbours":  # counts pairs
            pairs = sum(len(corpus.read_table(name, [])) for name in tables)
            counts = ledger.totals([{"inputs": pairs, "kept": pairs}])
        else:
            continue
        if counts != marker.counts:
            ledger.Marker(marker.stage, marker.unit, marker.digest, counts, marker.outputs).write(corpus)


def blank(corpus: Folder, name: str, places: Iterable[tuple[int, int]]) -> None:
    """Overwrite `(offset, size)` ranges of a file with zeros."""
    with corpus.writing(name) as local:
        with local.open("wb") as out, corpus.open(name) as file:
            while chunk := file.read(_CHUNK):
                out.write(chunk)
        with local.open("r+b") as out:
            for offset, size in places:
                out.seek(offset)
                out.write(bytes(size))


def _find(corpus: Folder, name: str, doomed: Doomed) -> np.ndarray | None:
    """Rows that name any of it; None if there are none."""
    with corpus.open(name) as file:
        schema = pq.read_schema(file)
    texts = [field.name for field in schema if _has_text(field.type)]
    rows = doomed.rows_naming(corpus.read_table(name, texts)) if texts else np.zeros(0, bool)
    return rows if rows.any() else None


def _without(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """The other rows; dictionaries hold only what they need."""
    kept = table.filter(pa.array(~rows))
    for i, field in enumerate(kept.schema):
        if pa.types.is_dictionary(field.type):
            values = kept.column(i).cast(field.type.value_type).combine_chunks()
            kept = kept.set_column(i, field, values.dictionary_encode().cast(field.type))
    return kept


def _scrubbed(row: dict[str, Any], doomed: Doomed, is_first: bool) -> dict[str, Any] | None:
    anonymous = {"input": "", "uid": "", "value": -1.0, "detail": "", "outputs": []}
    if any(doomed.is_named_in(row[name]) for name in ("uid", "input")):
        return row | anonymous | {"status": "dropped", "reason": REASON} if is_first else None
    outputs = [name for name in row["outputs"] if not doomed.is_named_in(name)]
    detail = "" if doomed.is_named_in(row["detail"]) else row["detail"]
    lost = {"status": "dropped", "reason": REASON} if row["outputs"] and not outputs else {}
    return row | {"detail": detail, "outputs": outputs} | lost


def _count(corpus: Folder, name: str) -> dict[str, int]:
    status = corpus.read_table(name, ["status"])["status"]
    return {"inputs": len(status)} | {v["values"]: v["counts"] for v in pc.value_counts(status).to_pylist()}


def _has_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _has_text(kind.value_type)
    if pa.types.is_struct(kind):
        return any(_has_text(kind.field(i).type) for i in range(kind.num_fields))
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _texts(array: pa.Array, rows: np.ndarray) -> Iterator[tuple[np.ndarray, pa.Array]]:
    """Every array of text within a column, with the row of each value."""
    kind = array.type
    if not _has_text(kind):
        return
    if pa.types.is_dictionary(kind):
        yield from _texts(array.cast(kind.value_type), rows)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield from _texts(pc.list_flatten(array), rows[pc.list_parent_indices(array).to_numpy()])
    elif pa.types.is_struct(kind):
        for field in array.flatten():
            yield from _texts(field, rows)
    else:
        yield rows, array
