"""Runs a stage: skip the units that are done, schedule the others on Ray, and commit each with its marker last.

All state is files in the corpus. Ray Data only decides where a unit runs (one row = one block = one unit), so a
killed driver, a lost worker or another cluster size never changes what is written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby, islice
from typing import Any, ClassVar

from filters.models import ModelMissing
from pipelines import ledger
from pipelines.ledger import LedgerRow, Marker
from pipelines.poison import attempt, find_poison
from pipelines.storage import Folder
from schemas.recipe import Recipe

Progress = Callable[[Marker, bool], None]  # (marker, whether it was already there)


@dataclass(frozen=True)
class Task:
    """One unit of one stage.

    Attributes:
        unit: name of the unit, unique in the stage.
        digest: identifies the work: a marker with another one is stale.
        payload: what the stage needs to do it; plain JSON.
        num_gpus: share of a GPU that Ray reserves for it, above 1 rounded up; 0 runs without one.
        phase: tasks of a phase start when all of those before are done, and may read what they wrote.
        model: names what it loads onto the GPU; its workers serve tasks of the same name only.
    """

    unit: str
    digest: str
    payload: dict[str, Any]
    num_gpus: float = 0.0
    phase: int = 0
    model: str = ""


@dataclass(frozen=True)
class Context:
    """Where a build happens: the corpus, the recipe, and what relative source paths are relative to."""

    corpus: Folder
    recipe: Recipe
    base: str


@dataclass(frozen=True)
class Kept:
    """An input that went on. `uid` identifies it from here on, `outputs` names what was made of it.

    A `reason` notes what went wrong all the same (a value that could not be measured).
    """

    uid: str = ""
    outputs: tuple[str, ...] = ()
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Dropped:
    """An input that a rule or gate refused, with the value that decided."""

    reason: str
    value: float = -1.0
    detail: str = ""
    uid: str = ""


@dataclass(frozen=True)
class Quarantined:
    """An input that is broken."""

    reason: str
    detail: str = ""


Fate = Kept | Dropped | Quarantined
Outcome = tuple[Fate, Any]  # what became of a row, and what to write for it


class BatchError(RuntimeError):
    """A stage did not answer for every row of a batch."""


class Stage(ABC):
    """A pure function of one unit. Raise `version` when the same inputs give other outputs than before."""

    name: ClassVar[str]
    version: ClassVar[str]
    whole_corpus: ClassVar[bool] = False  # one unit over the columns of all others: runs in the driver

    def __init__(self, context: Context) -> None:
        self.corpus, self.recipe, self.base = context.corpus, context.recipe, context.base

    @property
    def warnings(self) -> list[str]:
        """What a person should know about the plan; complete once `tasks` was called."""
        return []

    @abstractmethod
    def tasks(self) -> list[Task]:
        """All units of the stage, in output order. Reads markers and listings only."""

    def is_superseded(self, marker: Marker) -> bool:
        """Whether the outputs of a unit that the plan no longer has are to be removed."""
        return True

    @abstractmethod
    def run(self, task: Task) -> Marker:
        """Do the work of one unit, write its outputs, and return the marker (the engine writes it)."""


class RowStage(Stage):
    """A stage that treats the rows of a unit in small batches. An error costs the row, never the unit."""

    def batch_size(self, task: Task) -> int:
        """Rows to process at a time."""
        return 1

    @abstractmethod
    def rows(self, task: Task) -> Iterator[Any]:
        """Rows of the unit in a fixed order, streamed. Each has `input` (where from) and `uid` ("" if unknown)."""

    @abstractmethod
    def process(self, row: Any) -> Outcome:
        """The fate of one row, and what to write for it."""

    def process_batch(self, rows: Sequence[Any]) -> list[Outcome]:
        """The outcome of each row, in order. If it raises, the rows are tried one by one."""
        return [self.process(row) for row in rows]

    @abstractmethod
    def writer(self, task: Task) -> Any:
        """Context manager with `add(index, row, result)` for kept rows; `outputs` is read after it closed."""

    def failed(self, row: Any, reason: str, detail: str) -> Outcome:
        """The outcome of a row that raises or kills: quarantine, unless the stage has a use for it."""
        return Quarantined(reason, detail), None

    def run(self, task: Task) -> Marker:
        with attempt(self.corpus, self.name, task) as deaths:
            poison = find_poison(self, task) if deaths >= 2 else frozenset()
            entries: list[LedgerRow] = []
            with self.writer(task) as writer:
                # Of a unit that killed its process, a batch may have been too much for the memory.
                size = self.batch_size(task) if deaths < 2 else 1
                for index, row, (fate, result) in self._outcomes(task, size, poison):
                    if isinstance(fate, Kept):
                        writer.add(index, row, result)
                    entries.append(_entry(task.unit, index, row, fate))
            outputs = dict(writer.outputs)
            path = ledger.ledger_path(self.name, task.unit)
            self.corpus.write_table(path, ledger.ledger_table(entries))
            outputs[path] = describe(self.corpus, path)
        return Marker(self.name, task.unit, task.digest, ledger.count(entries), outputs)

    def guarded(self, rows: Sequence[Any]) -> list[Outcome]:
        """`process_batch`, in which an error costs only the row that causes it."""
        if not rows:
            return []
        try:
            outcomes = self.process_batch(rows)
            if len(outcomes) != len(rows):
                raise BatchError(f"stage {self.name} gave {len(outcomes)} outcomes for {len(rows)} rows")
            return outcomes
        except ModelMissing:  # no row is to blame
            raise
        except Exception as error:
            if len(rows) == 1:
                return [self.failed(rows[0], f"error:{type(error).__name__}", f"{error}"[:500])]
            return [outcome for row in rows for outcome in self.guarded([row])]

    def _outcomes(self, task: Task, size: int, poison: frozenset[int]) -> Iterator[tuple[int, Any, Outcome]]:
        """Every row of the unit once, in order, with its outcome."""
        for batch in _batches(enumerate(self.rows(task)), size):
            outcomes = iter(self.guarded([row for index, row in batch if index not in poison]))
            for index, row in batch:
                yield index, row, self.failed(row, *_POISON) if index in poison else next(outcomes)


_POISON = ("poison", "kills the process that handles it")


def _batches(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive rows, `size` at a time; the last batch may be shorter."""
    remaining = iter(rows)
    while batch := list(islice(remaining, size)):
        yield batch


def _entry(unit: str, index: int, row: Any, fate: Fate) -> LedgerRow:
    match fate:
        case Kept(uid, outputs, reason, detail):
            return LedgerRow(unit, index, row.input, uid or row.uid, "kept", reason, detail=detail, outputs=outputs)
        case Dropped(reason, value, detail, uid):
            return LedgerRow(unit, index, row.input, uid or row.uid, "dropped", reason, value, detail)
        case Quarantined(reason, detail):
            return LedgerRow(unit, index, row.input, row.uid, "quarantined", reason, detail=detail)


def describe(corpus: Folder, name: str) -> dict[str, Any]:
    """Size and sha256 of a file in the corpus, for a marker."""
    digest, size = hashlib.sha256(), 0
    with corpus.open(name) as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def is_done(stage: Stage) -> bool:
    """Whether every unit of the stage has a marker of exactly this work."""
    done = ledger.read_markers(stage.corpus, stage.name)
    return all(t.unit in done and done[t.unit].digest == t.digest for t in stage.tasks())


def run_stage(
    stage: Stage,
    context: Context,
    tasks: list[Task],
    workers: int,
    *,
    progress: Progress,
    expected: int | None = None,
    may_grow: bool = False,
) -> list[Marker]:
    """Bring a stage up to date.

    Args:
        stage: the stage; it must be one of `pipelines.stages.STAGES`, which workers make anew by name.
        context: what workers make it from.
        tasks: `stage.tasks()`.
        workers: units at a time on Ray; 0 runs in this process without Ray.
        progress: called once per unit.
        expected: how many inputs the stage must account for.
        may_grow: whether Ray may get GPUs that it does not have yet.

    Returns:
        Markers of all units, in unit order.

    Raises:
        ConservationError: an input is unaccounted for.
        RecipeError: units reserve a GPU, and there will be none.
    """
    done = ledger.read_markers(context.corpus, stage.name)
    fresh = {t.unit: done[t.unit] for t in tasks if t.unit in done and done[t.unit].digest == t.digest}
    for marker in fresh.values():
        progress(marker, True)
    todo = [t for t in tasks if t.unit not in fresh]
    run = _run_here if workers == 0 or stage.whole_corpus else _run_on_ray
    if run is _run_on_ray and not may_grow:
        _check_gpus(stage, todo)
    for marker in run(stage, context, todo, workers):
        fresh[marker.unit] = marker
        progress(marker, False)
    markers = [fresh[t.unit] for t in tasks]
    ledger.check_conservation(stage.name, ledger.totals(m.counts for m in markers), expected)
    _prune(stage, {t.unit for t in tasks}, done)
    return markers


def _check_gpus(stage: Stage, tasks: list[Task]) -> None:
    """Ray lets what it has no GPU for wait without end, as a machine that has one might join."""
    import ray

    wanting = [task for task in tasks if task.num_gpus]
    if wanting and not ray.cluster_resources().get("GPU"):
        problem = "num_gpus reserves a share of a GPU, and Ray finds none on this machine; num_gpus: 0 runs without"
        raise stage.recipe.error((stage.name, *filter(None, [wanting[0].model])), problem)


def _run_unit(stage: Stage, task: Task) -> Marker:
    marker = stage.run(task)
    marker.write(stage.corpus)
    return marker


def _run_here(stage: Stage, context: Context, tasks: list[Task], workers: int) -> Iterator[Marker]:
    return (_run_unit(stage, task) for task in sorted(tasks, key=lambda t: t.phase))


@cache
def _worker_stage(arguments: str) -> Stage:
    """A worker process makes each stage once, and keeps it for the units to come."""
    import cv2

    from pipelines.stages import make_stage

    cv2.setNumThreads(1)
    return make_stage(**json.loads(arguments))


def _run_batch(batch: dict[str, Any], arguments: str) -> dict[str, Any]:
    stage = _worker_stage(arguments)
    tasks = [Task(**json.loads(text)) for text in batch["task"]]
    return {"marker": [json.dumps(asdict(_run_unit(stage, task))) for task in tasks]}


class _Worker:
    """An actor. It loads a model once for all of its units, and frees the GPU when the last unit is done."""

    def __init__(self, arguments: str) -> None:
        self.arguments = arguments

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return _run_batch(batch, self.arguments)


def _run_on_ray(stage: Stage, context: Context, tasks: list[Task], workers: int) -> Iterator[Marker]:
    arguments = json.dumps(
        {
            "name": stage.name,
            "corpus_url": context.corpus.url,
            "recipe": context.recipe.model_dump(mode="json"),
            "base": context.base,
        }
    )
    groups = groupby(sorted(tasks, key=_group), key=_group)
    for (_, num_gpus, _), group in groups:
        yield from _map_on_ray(list(group), arguments, workers, num_gpus)


def _group(task: Task) -> tuple[int, float, str]:
    """What tasks that run side by side have in common."""
    return task.phase, task.num_gpus, task.model if task.num_gpus else ""


def _map_on_ray(tasks: list[Task], arguments: str, workers: int, num_gpus: float) -> Iterator[Marker]:
    import ray.data

    data = ray.data.DataContext.get_current()
    data.enable_progress_bars = data.print_on_execution_start = False
    data.target_max_block_size = None  # a unit is a block, whatever its size
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = [{"task": json.dumps(asdict(t))} for t in tasks]
    size = min(workers, len(tasks))
    how: dict[str, Any]
    if num_gpus:  # Ray ends the process of a task that had a GPU, and the model with it
        pool = ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1)  # those that do not fit wait
        reserved = num_gpus if num_gpus < 1 else math.ceil(num_gpus)  # Ray refuses one and a half
        how = {"fn": _Worker, "fn_constructor_args": (arguments,), "compute": pool, "num_gpus": reserved}
    else:  # its process, with what it imported, goes on to the next stage
        how = {"fn": _run_batch, "fn_args": (arguments,), "compute": ray.data.TaskPoolStrategy(size=size)}
    blocks = ray.data.from_items(rows, override_num_blocks=len(rows))
    units = blocks.map_batches(**how, batch_size=1, num_cpus=1)  # with GPUs, Ray refuses to choose the batch size
    for row in units.iter_rows():
        yield Marker(**json.loads(row["marker"]))


def _prune(stage: Stage, units: set[str], done: dict[str, Marker]) -> None:
    """Remove what units left behind that the plan no longer has; the marker goes first."""
    for unit, marker in done.items():
        if unit not in units and stage.is_superseded(marker):
            for name in (ledger.marker_path(stage.name, unit), *marker.outputs):
                stage.corpus.remove(name)


def connect(address: str | None, workers: int) -> None:
    """Start Ray on this machine, or join the cluster at `address`."""
    import ray

    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        ray.init(address=address, **quiet)
    else:
        os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # Ray gives a busy machine only 60 s
        ray.init(num_cpus=workers, include_dashboard=False, **quiet)
