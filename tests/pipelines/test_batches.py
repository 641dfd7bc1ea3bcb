"""Batches of a row stage: whatever a batch does, every row has exactly one fate, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.models import ModelMissing
from pipelines import ledger
from pipelines.engine import Context, Kept, Outcome, Quarantined, RowStage, Task
from pipelines.recipes import RECIPE
from pipelines.storage import Folder

RECIPE_OF_NOTHING = RECIPE.model_validate(
    {"name": "x", "sources": [{"name": "a", "type": "folder", "path": "a"}], "build": {}}
)


@dataclass(frozen=True)
class Row:
    input: str
    uid: str = ""


class Writer:
    def __init__(self) -> None:
        self.written: list[tuple[int, str, Any]] = []
        self.outputs: dict[str, Any] = {}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def add(self, index: int, row: Row, result: Any) -> None:
        self.written.append((index, row.input, result))


class Batched(RowStage):
    """Doubles numbers, in batches; `bad` rows misbehave in one of the ways that have been seen in other systems."""

    name, version = "batched", "1"

    def __init__(self, folder: Folder, rows: int, size: int, bad: dict[int, str]) -> None:
        super().__init__(Context(folder, RECIPE_OF_NOTHING, ""))
        self.count, self.size, self.bad = rows, size, bad
        self.out = Writer()
        self.calls: list[int] = []

    def tasks(self) -> list[Task]:
        return [Task("u", "d", {})]

    def batch_size(self, task: Task) -> int:
        return self.size

    def rows(self, task: Task) -> Iterator[Row]:
        return (Row(str(i)) for i in range(self.count))

    def process(self, row: Row) -> Outcome:
        return self.process_batch([row])[0]

    def process_batch(self, rows: Sequence[Row]) -> list[Outcome]:
        self.calls.append(len(rows))
        outcomes: list[Outcome] = []
        for row in rows:
            match self.bad.get(int(row.input)):
                case "raise":
                    raise ArithmeticError(f"row {row.input}")
                case "missing":
                    continue
                case "twice":
                    outcomes.append((Kept(), 2 * int(row.input)))
                case "model":
                    raise ModelMissing("model", "it is gone")
            outcomes.append((Kept(), 2 * int(row.input)))
        return outcomes

    def writer(self, task: Task) -> Writer:
        return self.out


@given(
    rows=st.integers(0, 20),
    size=st.integers(1, 8),
    bad=st.frozensets(st.integers(0, 19), max_size=4),
    way=st.sampled_from(["raise", "missing", "twice"]),
    poison=st.frozensets(st.integers(0, 19), max_size=3),
)
def test_no_row_is_lost_or_doubled(tmp_path_factory, *, rows, size, bad, way, poison):
    stage = Batched(Folder(str(tmp_path_factory.getbasetemp() / "batches")), rows, size, dict.fromkeys(bad, way))
    outcomes = list(stage._outcomes(stage.tasks()[0], size, poison))
    assert [(index, row.input) for index, row, _ in outcomes] == [(i, str(i)) for i in range(rows)]
    for index, _, (fate, result) in outcomes:
        if index in poison:
            assert fate == Quarantined("poison", "kills the process that handles it")
        elif index in bad:
            assert isinstance(fate, Quarantined) and result is None
        else:
            assert (fate, result) == (Kept(), 2 * index)


def test_a_batch_that_fails_costs_only_the_row_that_fails(tmp_path):
    """data-juicer loses the batch's other rows, or counts them twice, when it retries one by one."""
    stage = Batched(Folder(str(tmp_path)), 7, 4, {2: "raise", 3: "missing", 6: "twice"})
    marker = stage.run(stage.tasks()[0])
    assert stage.out.written == [(i, str(i), 2 * i) for i in (0, 1, 4, 5)]
    assert marker.counts == {"inputs": 7, "kept": 4, "dropped": 0, "quarantined": 3}
    entries = Folder(str(tmp_path)).read_table(ledger.ledger_path("batched", "u")).to_pylist()
    assert [e["row"] for e in entries] == list(range(7))
    assert {e["row"]: (e["reason"], e["detail"]) for e in entries if e["status"] != "kept"} == {
        2: ("error:ArithmeticError", "row 2"),
        3: ("error:BatchError", "stage batched gave 0 outcomes for 1 rows"),
        6: ("error:BatchError", "stage batched gave 2 outcomes for 1 rows"),
    }


def test_batches_are_as_large_as_asked_for_and_tried_again_only_if_they_fail(tmp_path: Path):
    stage = Batched(Folder(str(tmp_path)), 10, 4, {5: "raise"})
    stage.run(stage.tasks()[0])
    assert stage.calls == [4, 4, 1, 1, 1, 1, 2]


def test_a_unit_that_killed_its_process_twice_goes_row_by_row(tmp_path, monkeypatch):
    """A batch may have been too much for the memory where no single row is."""
    folder = Folder(str(tmp_path))
    folder.write_json("work/attempts/batched/u.json", {"digest": "d", "attempts": 2})
    monkeypatch.setattr("pipelines.engine.find_poison", lambda stage, task: frozenset())
    stage = Batched(folder, 5, 4, {})
    stage.run(stage.tasks()[0])
    assert stage.calls == [1] * 5 and len(stage.out.written) == 5


def test_a_missing_model_is_nobodys_fault_and_ends_the_job(tmp_path):
    stage = Batched(Folder(str(tmp_path)), 3, 2, {1: "model"})
    with pytest.raises(ModelMissing, match="it is gone"):
        stage.run(stage.tasks()[0])
