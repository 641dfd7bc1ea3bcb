"""decide: one verdict per ingested image, over the columns of all units. Its ledger is the keep-set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from filters.blocklists import BlockListError, Matcher, ban, read_blocklist
from filters.decide import COLUMNS, decide, numeric_columns
from pipelines import ledger
from pipelines.engine import Stage, Task, describe
from pipelines.ledger import Marker
from pipelines.sources.files import resolve
from pipelines.stages.ingest import IngestStage, images_path, in_source_order, scores_path
from pipelines.stages.neighbours import NeighboursStage, scorer_of
from pipelines.stages.score import ScoreStage
from schemas.arrow import LEDGER
from schemas.identity import digest_of
from schemas.recipe import Recipe, RecipeError


def open_blocklists(recipe: Recipe, base: str) -> list[Matcher]:
    """The block lists of a recipe, read and checked.

    Args:
        recipe: whose lists.
        base: what relative paths start from.

    Raises:
        RecipeError: with the recipe's line of each list that is missing, and the list's own line of what is wrong.
    """
    lists, problems = list[Matcher](), []
    for i, rule in enumerate(recipe.decide.blocklists):
        try:
            with fsspec.open(resolve(rule.path, base), "rb") as file:
                lists.append(read_blocklist(rule, file.read()))
        except (OSError, BlockListError) as error:
            problems.append(str(recipe.error(("decide", "blocklists", i, "path"), str(error))))
    if problems:
        raise RecipeError("\n".join(problems))
    return lists


class DecideStage(Stage):
    """Global: reads columns only, writes the ledger of every unit.

    Of each ledger its marker also has `kept`, a digest of the rows that stay. A threshold that moves may change what
    is said of dropped rows in every unit, but the kept rows of few.
    """

    name = "decide"
    version = "2"
    whole_corpus = True

    def tasks(self) -> list[Task]:
        units = in_source_order(self.recipe, ledger.read_markers(self.corpus, IngestStage.name))
        scorers = set(self._scorers.values())
        scores = ledger.read_markers(self.corpus, ScoreStage.name)
        work = [
            self.version,
            self.recipe.decide.model_dump(mode="json", exclude={"splits"}),
            [matcher.digest for matcher in self._blocklists],
            [(unit, marker.content) for unit, marker in units.items()],
            [(unit, marker.content) for unit, marker in scores.items() if unit.rpartition(".")[2] in scorers],
            [(part, marker.content) for part, marker in self._neighbours().items()],
        ]
        return [Task("all", digest_of(work), {"units": list(units)})]

    def run(self, task: Task) -> Marker:
        tables = {unit: self._columns(unit) for unit in task.payload["units"]}
        images = pa.concat_tables(tables.values())
        entries = _ledger_rows(images, decide(images, self.recipe.decide, self._pairs()))
        outputs: dict[str, dict[str, Any]] = {}
        start = 0
        for unit, table in tables.items():
            path = ledger.ledger_path(self.name, unit)
            rows = entries.slice(start, len(table))
            self.corpus.write_table(path, rows)
            outputs[path] = describe(self.corpus, path) | {"kept": _kept_digest(rows)}
            start += len(table)
        return Marker(self.name, task.unit, task.digest, _count(entries), outputs)

    @cached_property
    def _blocklists(self) -> list[Matcher]:
        return open_blocklists(self.recipe, self.base)

    @cached_property
    def _scorers(self) -> dict[str, str]:
        """The scorer of each column that is needed and is not the image's own."""
        needed = {*numeric_columns(self.recipe.decide), *(c for m in self._blocklists for c in m.columns)}
        scorers = {column: scorer_of(self.recipe, column) for column in sorted(needed)}
        return {column: scorer for column, scorer in scorers.items() if scorer}

    def _columns(self, unit: str) -> pa.Table:
        """What `filters.decide.decide` needs to know of a unit. Vectors and captions stay behind."""
        numeric = numeric_columns(self.recipe.decide)
        needed = dict.fromkeys([*COLUMNS, *numeric, *(c for m in self._blocklists for c in m.columns)])
        images = self.corpus.read_table(images_path(unit), [c for c in needed if c not in self._scorers])
        for scorer in sorted(set(self._scorers.values())):
            path = scores_path(scorer, unit)
            columns = [column for column, by in self._scorers.items() if by == scorer]
            scores = self.corpus.read_table(path, ["uid", *columns])
            if not scores["uid"].equals(images["uid"]):
                raise ValueError(f"{path} has other rows than {images_path(unit)}: delete it, and it is made again")
            for column in columns:
                images = images.append_column(column, scores[column])
        chosen = images.select([*COLUMNS, *numeric])
        for name, column in _named(ban(images, self._blocklists)) if self._blocklists else ():
            chosen = chosen.append_column(name, column)
        return chosen

    def _neighbours(self) -> dict[str, Marker]:
        return ledger.read_markers(self.corpus, NeighboursStage.name)

    def _pairs(self) -> dict[str, list[pa.Table]]:
        """Tables of pairs by kind."""
        pairs: dict[str, list[pa.Table]] = {"perceptual": [], "semantic": []}
        for marker in self._neighbours().values():
            for path in marker.outputs:
                pairs[path.split("/")[2]].append(self.corpus.read_table(path))
        return pairs


def _named(table: pa.Table) -> Iterator[tuple[str, pa.ChunkedArray]]:
    return zip(table.column_names, table.columns, strict=True)


def _ledger_rows(images: pa.Table, verdicts: pa.Table) -> pa.Table:
    """Rows of `schemas.arrow.LEDGER`, in the order of the images."""
    columns = {name: images[name] for name in ("unit", "row", "input", "uid")}
    status = pc.if_else(pc.equal(verdicts["reason"], ""), "kept", "dropped")
    outputs = pa.ListArray.from_arrays(np.zeros(len(images) + 1, np.int32), pa.array([], pa.string()))
    return pa.table({**columns, "status": status, **dict(_named(verdicts)), "outputs": outputs}, schema=LEDGER)


def _kept_digest(rows: pa.Table) -> str:
    kept = rows["row"].filter(pc.equal(rows["status"], "kept"))
    return hashlib.sha256(kept.to_numpy().tobytes()).hexdigest()


def _count(entries: pa.Table) -> dict[str, int]:
    kept = pc.sum(pc.equal(entries["status"], "kept")).as_py() or 0
    return ledger.totals([{"inputs": len(entries), "kept": kept, "dropped": len(entries) - kept}])
