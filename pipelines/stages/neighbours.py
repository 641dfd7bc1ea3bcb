"""neighbours: which images are nearly the same, as pairs. `decide` makes a choice of them.

A part of the work is a range of query hashes, or a set of clusters of embeddings. Every part needs the score columns
of all units; a worker reads them once for all its parts. Pairs depend on scores, radius and threshold only: no other
rule of `decide` finds them anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from filters.clusters import SAMPLES_PER_CLUSTER, assign, cluster_count, fit, unit_vectors
from filters.columns import matrix
from filters.dedup import PAIRS, PerceptualPairs, first_of_equal, semantic_pairs
from filters.scorers.registry import SCORERS
from pipelines import ledger
from pipelines.engine import Context, Stage, Task, describe
from pipelines.ledger import Marker
from pipelines.stages.ingest import scores_path
from pipelines.stages.score import ScoreStage
from schemas.decide import SemanticDedup
from schemas.identity import digest_of
from schemas.recipe import Recipe

_ROWS_PER_PART = {"perceptual": 100_000, "semantic": 50_000}
_ROW_GROUP = 100_000
_TABLES = 1000


def pairs_path(kind: str, part: int) -> str:
    return f"meta/neighbours/{kind}/{part:05d}.parquet"


def scorer_of(recipe: Recipe, column: str) -> str | None:
    """The scorer of the recipe that writes a column; None for the columns of the image itself."""
    sections = recipe.scorers()
    return next((name for name, params in sections.items() if column in SCORERS[name](params).columns), None)


class NeighboursStage(Stage):
    """Writes tables of `filters.dedup.PAIRS`. Its markers count pairs."""

    name = "neighbours"
    version = "1"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._loaded: tuple[str, Any] = ("", None)

    def tasks(self) -> list[Task]:
        perceptual, semantic = self.recipe.decide.dedup.perceptual, self.recipe.decide.dedup.semantic
        tasks = self._tasks_of("perceptual", "phash", perceptual.model_dump()) if perceptual else []
        return tasks + (self._tasks_of("semantic", semantic.column, semantic.model_dump()) if semantic else [])

    def _tasks_of(self, kind: str, column: str, rule: dict[str, Any]) -> list[Task]:
        scorer = scorer_of(self.recipe, column)
        markers = self._score_markers(scorer)
        rows = ledger.totals(m.counts for m in markers)["kept"]
        parts = -(-rows // _ROWS_PER_PART[kind])
        work = digest_of([self.version, kind, rule, [(m.unit, m.content) for m in markers]])
        payload = {"kind": kind, "scorer": scorer, "column": column, "rule": rule, "work": work, "parts": parts}
        return [Task(f"{kind}-{i:05d}", digest_of([work, i, parts]), payload | {"part": i}) for i in range(parts)]

    def run(self, task: Task) -> Marker:
        pairs = {"perceptual": self._perceptual, "semantic": self._semantic}[task.payload["kind"]]
        path = pairs_path(task.payload["kind"], task.payload["part"])
        count = self._write(path, pairs(task))
        counts = ledger.totals([{"inputs": count, "kept": count}])
        return Marker(self.name, task.unit, task.digest, counts, {path: describe(self.corpus, path)})

    def _perceptual(self, task: Task) -> Iterator[pa.Table]:
        def load() -> PerceptualPairs:
            scores = pa.concat_tables(self._tables(task, ["uid", "phash"]))
            return PerceptualPairs(scores["uid"], scores["phash"], task.payload["rule"]["radius"])

        return self._once(task, load).part(task.payload["part"], task.payload["parts"])

    def _semantic(self, task: Task) -> Iterator[pa.Table]:
        rule = SemanticDedup.model_validate(task.payload["rule"])
        clusters = self._once(task, lambda: self._clusters(task, rule))
        mine = (clusters >= 0) & (clusters % task.payload["parts"] == task.payload["part"])
        uids, vectors = self._vectors(task, mine)
        order, of = pc.sort_indices(uids).to_numpy(), clusters[mine]
        for cluster in np.unique(of):
            members = order[of[order] == cluster]
            yield from semantic_pairs(uids.take(pa.array(members)), vectors[members], rule.threshold)

    def _clusters(self, task: Task, rule: SemanticDedup) -> np.ndarray:
        """The cluster of each row of all units, int64; -1 without an embedding, and for all but one of equal files."""
        uids = pa.concat_tables(self._tables(task, ["uid"]))["uid"]
        count = cluster_count(len(uids), rule)
        sampled = np.zeros(len(uids), bool)
        sampled[pc.sort_indices(uids).to_numpy()[: SAMPLES_PER_CLUSTER * count]] = True
        sample_uids, sample = self._vectors(task, sampled)
        centroids = fit(sample[pc.sort_indices(sample_uids).to_numpy()], min(count, len(sample)))
        clusters = []
        for table in self._tables(task, [task.payload["column"]]):
            vectors, known = matrix(table.column(0))
            clusters.append(np.full(len(known), -1))
            clusters[-1][known] = assign(unit_vectors(vectors), centroids)
        only = first_of_equal(uids) == np.arange(len(uids))
        return np.where(only, np.concatenate(clusters), -1)

    def _vectors(self, task: Task, wanted: np.ndarray) -> tuple[pa.Array, np.ndarray]:
        """uids and unit vectors of the wanted rows that have an embedding."""
        uids, vectors, start = [], [], 0
        for table in self._tables(task, ["uid", task.payload["column"]]):
            chosen = table.filter(pa.array(wanted[start : start + len(table)])).drop_null()
            start += len(table)
            if len(chosen):
                uids.append(chosen["uid"].combine_chunks())
                vectors.append(unit_vectors(matrix(chosen[task.payload["column"]])[0]))
        if not uids:
            return pa.array([], pa.string()), np.zeros((0, 1), np.float32)
        return pa.concat_arrays(uids), np.concatenate(vectors)

    def _score_markers(self, scorer: str | None) -> list[Marker]:
        markers = ledger.read_markers(self.corpus, ScoreStage.name)
        return [m for unit, m in markers.items() if unit.rpartition(".")[2] == scorer]

    def _tables(self, task: Task, columns: list[str]) -> Iterator[pa.Table]:
        scorer = task.payload["scorer"]
        for marker in self._score_markers(scorer):
            yield self.corpus.read_table(scores_path(scorer, marker.unit.rpartition(".")[0]), columns)

    def _once(self, task: Task, load: Callable[[], Any]) -> Any:
        """What all parts of this work share."""
        if self._loaded[0] != task.payload["work"]:
            self._loaded = (task.payload["work"], load())
        return self._loaded[1]

    def _write(self, path: str, tables: Iterable[pa.Table]) -> int:
        """Write tables of any size in row groups of some size; the number of rows."""
        count, waiting = 0, list[pa.Table]()
        with self.corpus.writing(path) as local, pq.ParquetWriter(local, PAIRS, compression="zstd") as out:
            for table in tables:
                waiting.append(table)
                count += len(table)
                if sum(map(len, waiting)) >= _ROW_GROUP or len(waiting) == _TABLES:
                    out.write_table(_joined(waiting))
                    waiting = []
            out.write_table(_joined(waiting))
        return count


def _joined(tables: list[pa.Table]) -> pa.Table:
    return pa.concat_tables([PAIRS.empty_table(), *tables]).unify_dictionaries().combine_chunks()
