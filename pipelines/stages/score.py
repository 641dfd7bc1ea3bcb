"""score: every image through every scorer. One task per scorer and unit, so a new scorer runs nothing but itself.

Scores are artefacts: they stay in `meta/scores` when a corpus is published, and later decisions only read them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from filters.scorers.base import Scorer, ScorerInput
from filters.scorers.registry import SCORERS
from pipelines import ledger
from pipelines.engine import BatchError, Context, Kept, Outcome, RowStage, Task, describe
from pipelines.stages.ingest import IngestStage, images_path, in_source_order, read_member, scores_path, tar_path
from pipelines.storage import Folder
from schemas.identity import digest_of
from schemas.models import ModelParams
from schemas.records import Captions

_ALL_FAILED = 10  # a unit with as many rows, none of which can be scored, has a broken scorer and not broken images


class ScorerError(RuntimeError):
    """A scorer fails for whatever it is given."""


@dataclass(frozen=True)
class ScoreRow:
    """A row of this stage: one image before one scorer."""

    input: str
    uid: str
    row: int
    scorer: Scorer
    image: ScorerInput


@dataclass(frozen=True)
class NoScore:
    """Why a row has none."""

    reason: str
    detail: str


class ScoreStage(RowStage):
    """Writes one row of columns per ingested image and scorer, in the order of the unit's images.

    An image that a scorer fails on is kept: its columns are null, and the ledger has the error. What a null means
    is a decision (`unknown: keep` or `drop`), not a measurement.
    """

    name = "score"
    version = "1"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        sections = self.recipe.scorers()
        self.scorers: dict[str, Scorer] = {n: s(sections[n]) for n, s in SCORERS.items() if n in sections}

    def tasks(self) -> list[Task]:
        units = in_source_order(self.recipe, ledger.read_markers(self.corpus, IngestStage.name))
        contents = {unit: marker.content for unit, marker in units.items()}
        return [task for name in self.scorers for task in self.scorer_tasks(name, contents)]

    def scorer_tasks(self, name: str, contents: Mapping[str, str]) -> list[Task]:
        """The tasks of one scorer over ingested units.

        Args:
            name: of the scorer.
            contents: of units, as their ingest markers have it.
        """
        scorer = self.scorers[name]
        params, made_by = scorer.params, {"scorer": name, "version": scorer.version, **scorer.provenance}
        work = [self.version, made_by, params.model_dump(mode="json", exclude=set(ModelParams.resources))]
        num_gpus = params.num_gpus if isinstance(params, ModelParams) else 0.0
        return [
            Task(f"{unit}.{name}", digest_of([work, content]), {"unit": unit, "made_by": made_by}, num_gpus, model=name)
            for unit, content in contents.items()
        ]

    def batch_size(self, task: Task) -> int:
        return self._scorer(task).batch_size

    def rows(self, task: Task) -> Iterator[ScoreRow]:
        unit = task.payload["unit"]
        columns = ("input", "uid", "row", "members", "captions", "ready")
        with self.corpus.open(tar_path(unit)) as tar:
            for row in self.corpus.read_table(images_path(unit), columns).to_pylist():
                member, captions = _judged_by(row)
                image = ScorerInput(row["uid"], read_member(tar, row["members"], member), captions)
                yield ScoreRow(row["input"], row["uid"], row["row"], self._scorer(task), image)

    def process(self, row: ScoreRow) -> Outcome:
        return self.process_batch([row])[0]

    def process_batch(self, rows: Sequence[ScoreRow]) -> list[Outcome]:
        scorer = rows[0].scorer
        scores = scorer.score([row.image for row in rows])
        if len(scores) != len(rows):
            raise BatchError(f"scorer {scorer.name} gave {len(scores)} rows for {len(rows)} images")
        return [(Kept(), _checked(scorer, score)) for score in scores]

    def failed(self, row: ScoreRow, reason: str, detail: str) -> Outcome:
        return Kept(reason=reason, detail=detail), NoScore(reason, detail)

    def writer(self, task: Task) -> ScoreWriter:
        return ScoreWriter(self.corpus, task.payload["unit"], self._scorer(task), task.payload["made_by"])

    def _scorer(self, task: Task) -> Scorer:
        return self.scorers[task.payload["made_by"]["scorer"]]


def _judged_by(row: Mapping[str, Any]) -> tuple[str, Captions]:
    """The member by which a row is judged, and its captions.

    A finished sample is judged by its photograph: its target, or its first input where the target is a map. Its
    instruction describes the photograph only if the task is text to image.
    """
    if not row["ready"]:
        return "jpg", Captions(**row["captions"])
    ready = json.loads(row["ready"])
    first, target = ready["images"][0]["member"], ready["images"][-1]["member"]
    caption = ready["instruction"] if ready["task"] == "text_to_image" else ""
    return first if target.endswith(".png") else target, Captions(long=caption)


def _checked(scorer: Scorer, score: dict[str, Any]) -> dict[str, Any]:
    """The score itself.

    Raises:
        ScorerError: columns are missing or unknown, or a value is not finite.
    """
    if score.keys() != scorer.columns.keys():
        raise ScorerError(f"scorer {scorer.name} gave {', '.join(score)} instead of {', '.join(scorer.columns)}")
    for name, value in score.items():
        values = np.asarray(value)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ScorerError(f"scorer {scorer.name}: {name} is not finite")
    return score


class ScoreWriter:
    """Writes the scores of one unit; every column says who measured it with what."""

    def __init__(self, corpus: Folder, unit: str, scorer: Scorer, made_by: dict[str, str]) -> None:
        self.corpus, self.unit, self.scorer, self.made_by = corpus, unit, scorer, made_by
        self.outputs: dict[str, dict[str, Any]] = {}
        self._rows: list[dict[str, Any]] = []
        self._failures: list[NoScore] = []

    def __enter__(self) -> ScoreWriter:
        return self

    def add(self, index: int, row: ScoreRow, score: dict[str, Any] | NoScore) -> None:
        if isinstance(score, NoScore):
            self._failures.append(score)
            score = {}
        self._rows.append({"unit": self.unit, "row": row.row, "uid": row.uid, **score})

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            return
        if len(self._failures) == len(self._rows) >= _ALL_FAILED:
            first = self._failures[0]
            raise ScorerError(
                f"scorer {self.scorer.name} fails for every image of {self.unit}: {first.reason}: {first.detail}"
            )
        path = scores_path(self.scorer.name, self.unit)
        self.corpus.write_table(path, pa.Table.from_pylist(self._rows, self._schema()))
        self.outputs[path] = describe(self.corpus, path)

    def _schema(self) -> pa.Schema:
        columns = [pa.field(name, kind, metadata=self.made_by) for name, kind in self.scorer.columns.items()]
        return pa.schema([("unit", pa.string()), ("row", pa.int64()), ("uid", pa.string()), *columns])
