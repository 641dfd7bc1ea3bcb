"""Accounting: a ledger row per input of a stage, and the marker that says a unit is done.

`inputs = kept + dropped + quarantined` holds for every unit by construction and is checked for every stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa

from pipelines.storage import Folder
from schemas.arrow import LEDGER

Status = Literal["kept", "dropped", "quarantined"]
FOLDER = "meta/ledger"
_READERS = 16


class ConservationError(RuntimeError):
    """Inputs of a stage are not all accounted for."""


@dataclass(frozen=True)
class LedgerRow:
    """What became of one input."""

    unit: str
    row: int
    input: str
    uid: str
    status: Status
    reason: str = ""
    value: float = -1.0
    detail: str = ""
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Marker:
    """Written last: the unit's outputs are complete and were made by the work that `digest` describes."""

    stage: str
    unit: str
    digest: str
    counts: dict[str, int]
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> {"bytes", "sha256", ...}

    def write(self, corpus: Folder) -> None:
        corpus.write_json(marker_path(self.stage, self.unit), asdict(self))

    @property
    def content(self) -> str:
        """Identity of what was written, whatever it was made from: later stages depend on this alone."""
        return "".join(f"{name}:{self.outputs[name]['sha256']};" for name in sorted(self.outputs))


def marker_path(stage: str, unit: str) -> str:
    return f"{FOLDER}/{stage}/{unit}.json"


def ledger_path(stage: str, unit: str) -> str:
    return f"{FOLDER}/{stage}/{unit}.parquet"


def read_markers(corpus: Folder, stage: str) -> dict[str, Marker]:
    """All markers of a stage by unit, in unit order."""
    names = corpus.list(f"{FOLDER}/{stage}", ".json")
    with ThreadPoolExecutor(_READERS) as pool:  # remote stores answer slowly, but many at a time
        return {m.unit: m for m in (Marker(**content) for content in pool.map(corpus.read_json, names))}


def ledger_table(rows: Iterable[LedgerRow]) -> pa.Table:
    return pa.Table.from_pylist([asdict(r) | {"outputs": list(r.outputs)} for r in rows], schema=LEDGER)


def count(rows: Iterable[LedgerRow]) -> dict[str, int]:
    """Counts for a marker."""
    by_status: Counter[str] = Counter(r.status for r in rows)
    return totals([{"inputs": by_status.total(), **by_status}])


def totals(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Sum of several counts."""
    every = list(counts)
    return {name: sum(c.get(name, 0) for c in every) for name in ("inputs", "kept", "dropped", "quarantined")}


def reasons(corpus: Folder) -> dict[str, dict[str, dict[str, int]]]:
    """Inputs per stage, fate and reason, from the ledgers."""
    found: dict[str, dict[str, Counter[str]]] = {}
    for name in corpus.list(FOLDER, ".parquet"):
        fates = found.setdefault(name.split("/")[2], {})
        for row in corpus.read_table(name, ["status", "reason"]).to_pylist():
            fates.setdefault(row["status"], Counter())[row["reason"]] += 1
    return {s: {f: dict(sorted(r.items())) for f, r in sorted(fates.items())} for s, fates in found.items()}


def check_conservation(stage: str, counts: dict[str, int], expected: int | None = None) -> None:
    """Raise ConservationError unless every input has a fate, and inputs are as many as `expected` (if given)."""
    if counts["inputs"] != counts["kept"] + counts["dropped"] + counts["quarantined"]:
        raise ConservationError(f"stage {stage}: inputs are not kept + dropped + quarantined: {counts}")
    if expected is not None and counts["inputs"] != expected:
        raise ConservationError(f"stage {stage}: {counts['inputs']} inputs, but the stage before kept {expected}")
