"""decide: one verdict per ingested image, over the columns of all units. Its ledger is the keep-set."""

from __future__ import annotations

import pyarrow as pa

from filters.decide import COLUMNS, decide
from pipelines import ledger
from pipelines.engine import Stage, Task, describe
from pipelines.ledger import LedgerRow, Marker, Status
from pipelines.stages.ingest import IngestStage, images_path, in_source_order
from schemas.identity import digest_of


class DecideStage(Stage):
    """Global: reads columns only, writes the ledger of every unit."""

    name = "decide"
    version = "1"
    whole_corpus = True

    def tasks(self) -> list[Task]:
        units = in_source_order(self.recipe, ledger.read_markers(self.corpus, IngestStage.name))
        work = [self.version, self.recipe.decide.model_dump(mode="json"), [(u, m.content) for u, m in units.items()]]
        return [Task("all", digest_of(work), {"units": list(units)})]

    def run(self, task: Task) -> Marker:
        units: list[str] = task.payload["units"]
        images = pa.concat_tables(self.corpus.read_table(images_path(u), COLUMNS) for u in units)
        verdicts = decide(images, self.recipe.decide)
        entries: dict[str, list[LedgerRow]] = {unit: [] for unit in units}
        for image, verdict in zip(images.to_pylist(), verdicts.to_pylist(), strict=True):
            status: Status = "dropped" if verdict["reason"] else "kept"
            place = (image["unit"], image["row"], image["input"], image["uid"])
            entries[image["unit"]].append(LedgerRow(*place, status, **verdict))
        outputs = {}
        for unit, rows in entries.items():
            path = ledger.ledger_path(self.name, unit)
            self.corpus.write_table(path, ledger.ledger_table(rows))
            outputs[path] = describe(self.corpus, path)
        counts = ledger.totals(ledger.count(rows) for rows in entries.values())
        return Marker(self.name, task.unit, task.digest, counts, outputs)
