"""Finds the rows of a unit that kill the process handling them (a decoder that crashes, an image that eats memory).

Deaths are counted in a file beside the unit's marker, so the count survives the worker, the driver and the cluster.
After two deaths the unit's rows are tried in child processes, by bisection; a row that kills its child every time
it is tried alone is quarantined, and the unit goes on without it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.storage import Folder

if TYPE_CHECKING:
    from pipelines.engine import RowStage, Task

_TRIES_ALONE = 3  # a child may also die of something else, such as an operator's kill


@contextmanager
def attempt(corpus: Folder, stage: str, task: Task) -> Iterator[int]:
    """Count this attempt at a unit; yields how many earlier ones ended with the death of the process."""
    path = f"work/attempts/{stage}/{task.unit}.json"
    known = corpus.read_json(path) if corpus.exists(path) else {}
    deaths = known["attempts"] if known.get("digest") == task.digest else 0
    corpus.write_json(path, {"digest": task.digest, "attempts": deaths + 1})
    try:
        yield deaths
    finally:  # only the death of the process leaves the file behind
        corpus.remove(path)


def find_poison(stage: RowStage, task: Task) -> frozenset[int]:
    """Indices of the rows that kill a process of their own."""
    total = sum(1 for _ in stage.rows(task))
    return frozenset(_bisect(stage, task, 0, total))


def _bisect(stage: RowStage, task: Task, start: int, stop: int) -> Iterator[int]:
    if start == stop:
        return
    tries = _TRIES_ALONE if stop - start == 1 else 1
    if any(_survives(stage, task, start, stop) for _ in range(tries)):
        return
    if stop - start == 1:
        yield start
        return
    middle = (start + stop) // 2
    yield from _bisect(stage, task, start, middle)
    yield from _bisect(stage, task, middle, stop)


def _survives(stage: RowStage, task: Task, start: int, stop: int) -> bool:
    job = {
        "stage": stage.name,
        "corpus_url": stage.corpus.url,
        "recipe": stage.recipe.model_dump(mode="json"),
        "base": stage.base,
        "task": vars(task),
        "rows": [start, stop],
    }
    child = subprocess.run(
        [sys.executable, "-m", "pipelines.poison"],
        input=json.dumps(job).encode(),
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    if child.returncode > 0:
        raise RuntimeError(f"stage {stage.name}, unit {task.unit}: the trial process failed; see its output above")
    return child.returncode == 0


def _try_rows() -> None:
    """The child: handle some rows of a unit and write nothing."""
    from pipelines.engine import RowStage, Task
    from pipelines.stages import make_stage

    job = json.load(sys.stdin)
    stage = make_stage(job["stage"], job["corpus_url"], job["recipe"], job["base"])
    assert isinstance(stage, RowStage)
    for row in islice(stage.rows(Task(**job["task"])), *job["rows"]):
        stage.guarded([row])


if __name__ == "__main__":
    _try_rows()
