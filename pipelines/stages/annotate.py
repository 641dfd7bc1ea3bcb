"""annotate: what models find in every kept image, stored once. One task per annotator and unit.

Artefacts stay when a corpus is published. When other images are kept than before, only those are annotated that were
not yet; when an annotator's parameters or model change, only it and those that read its artefacts run again. A model
whose arithmetic depends on what shares its batch may then differ from a build from scratch in the last digit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from builders.annotators.annotator import Annotator, Artefact
from builders.annotators.registry import ANNOTATORS
from builders.base import SourceImage
from pipelines import ledger
from pipelines.artefacts import Artefacts, ArtefactWriter, members_path, table_path
from pipelines.engine import BatchError, Context, Kept, Outcome, RowStage, Task, describe
from pipelines.stages.decide import DecideStage
from pipelines.stages.ingest import IngestStage, in_source_order
from pipelines.stages.kept import kept_images
from pipelines.storage import Folder
from schemas.identity import digest_of
from schemas.models import ModelParams
from schemas.recipe import Recipe
from schemas.records import Op

_ALL_FAILED = 10  # a unit with as many rows, none of which can be annotated, has a broken annotator


class AnnotatorError(RuntimeError):
    """An annotator fails for whatever it is given."""


@dataclass(frozen=True)
class AnnotateRow:
    """A row of this stage: one image before one annotator, and what that found in it earlier, if it did."""

    input: str
    uid: str
    row: int
    image: SourceImage
    annotator: Annotator
    seen: str
    known: Artefact | None


@dataclass(frozen=True)
class NoArtefact:
    """Why a row has none."""

    reason: str
    detail: str


def annotators_of(recipe: Recipe) -> dict[str, Annotator]:
    """The annotators of a recipe, each after those that it needs."""
    sections = recipe.annotators()
    annotators = {name: kind(sections[name]) for name, kind in ANNOTATORS.items() if name in sections}
    return dict(sorted(annotators.items(), key=lambda item: phase(item[0], annotators)))


def phase(name: str, annotators: Mapping[str, Annotator]) -> int:
    """0 for an annotator that needs none of the others, else one more than the last that it needs."""
    return 1 + max((phase(other, annotators) for other in needed_by(name, annotators)), default=-1)


def needed_by(name: str, annotators: Mapping[str, Annotator]) -> dict[str, Annotator]:
    """Those of the annotators whose artefacts this one reads, in the order in which they enrich a record."""
    return {other: a for other, a in annotators.items() if other in annotators[name].needs}


class AnnotateStage(RowStage):
    """An image that an annotator fails on has no artefact of it, and the ledger has the error."""

    name = "annotate"
    version = "1"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.annotators = annotators_of(self.recipe)

    def tasks(self) -> list[Task]:
        if not self.annotators:
            return []
        units = in_source_order(self.recipe, ledger.read_markers(self.corpus, IngestStage.name))
        verdicts = ledger.read_markers(self.corpus, DecideStage.name)["all"].outputs
        kept = {unit: verdicts[ledger.ledger_path(DecideStage.name, unit)]["kept"] for unit in units}
        return [
            Task(
                f"{unit}.{name}",
                digest_of([self.version, self.specs[name], marker.content, kept[unit]]),
                {"unit": unit, "annotator": name},
                annotator.num_gpus,
                phase(name, self.annotators),
                model=name,
            )
            for name, annotator in self.annotators.items()
            for unit, marker in units.items()
        ]

    @cached_property
    def specs(self) -> dict[str, str]:
        """Of each annotator, a digest of all that decides what it finds in an image."""
        specs: dict[str, str] = {}
        for name, annotator in self.annotators.items():  # those that it needs come first
            elsewhere = {"batch_size", *getattr(annotator.params, "resources", ModelParams.resources)}
            params = annotator.params.model_dump(mode="json", exclude=elsewhere)
            needs = [specs[other] for other in needed_by(name, self.annotators)]
            specs[name] = digest_of([annotator.op().model_dump(), params, needs])
        return specs

    def batch_size(self, task: Task) -> int:
        return self._annotator(task).batch_size

    def rows(self, task: Task) -> Iterator[AnnotateRow]:
        unit, annotator = task.payload["unit"], self._annotator(task)
        needs = needed_by(annotator.name, self.annotators)
        with ExitStack() as stack:
            earlier = self._earlier(task, stack)
            for row, image in kept_images(self.corpus, unit, self.recipe.decide.splits, needs):
                if isinstance(image, SourceImage):
                    uid, seen = image.record.uid, _seen(image)
                    known = earlier.get(row, seen) if earlier else None
                    yield AnnotateRow(f"{uid}/{annotator.name}", uid, row, image, annotator, seen, known)

    def process(self, row: AnnotateRow) -> Outcome:
        return self.process_batch([row])[0]

    def process_batch(self, rows: Sequence[AnnotateRow]) -> list[Outcome]:
        new = [row for row in rows if row.known is None]
        found = new[0].annotator.annotate([row.image for row in new]) if new else []
        if len(found) != len(new):
            raise BatchError(f"annotator {new[0].annotator.name} gave {len(found)} artefacts for {len(new)} images")
        made = iter(found)
        return [(Kept(), next(made) if row.known is None else row.known) for row in rows]

    def failed(self, row: AnnotateRow, reason: str, detail: str) -> Outcome:
        return Kept(reason=reason, detail=detail), NoArtefact(reason, detail)

    def writer(self, task: Task) -> AnnotateWriter:
        name, unit = task.payload["annotator"], task.payload["unit"]
        return AnnotateWriter(self.corpus, name, unit, self._annotator(task).op(), self.specs[name])

    def _annotator(self, task: Task) -> Annotator:
        return self.annotators[task.payload["annotator"]]

    def _earlier(self, task: Task, stack: ExitStack) -> Artefacts | None:
        """What the same annotator wrote for the unit when other images were kept, if its marker vouches for it."""
        name, unit = task.payload["annotator"], task.payload["unit"]
        if not self.corpus.exists(ledger.marker_path(self.name, task.unit)):
            return None
        marker = ledger.Marker(**self.corpus.read_json(ledger.marker_path(self.name, task.unit)))
        own = (table_path(name, unit), members_path(name, unit))
        files = {path: made for path, made in marker.outputs.items() if path in own}
        if any(not self.corpus.exists(path) or describe(self.corpus, path) != made for path, made in files.items()):
            return None
        earlier = stack.enter_context(Artefacts(self.corpus, name, unit))
        return earlier if earlier.spec == self.specs[name] else None


class AnnotateWriter(ArtefactWriter):
    """Writes what was found. A unit in which the annotator failed on every image is refused."""

    def __init__(self, corpus: Folder, annotator: str, unit: str, op: Op, spec: str) -> None:
        super().__init__(corpus, annotator, unit, op, spec)
        self._images = 0
        self._failures: list[NoArtefact] = []

    def __enter__(self) -> AnnotateWriter:
        return self

    def add(self, index: int, row: AnnotateRow, found: Artefact | NoArtefact) -> None:
        self._images += 1
        if isinstance(found, NoArtefact):
            self._failures.append(found)
        else:
            self.write(row.row, row.uid, row.seen, found)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None and len(self._failures) == self._images >= _ALL_FAILED:
            first = self._failures[0]
            raise AnnotatorError(
                f"annotator {self.annotator} fails for every image of {self.unit}: {first.reason}: {first.detail}"
            )
        super().__exit__(kind, error, trace)


def _seen(image: SourceImage) -> str:
    """Digest of what an annotator is shown: the pixels, what is known of them, and artefacts that it needs."""
    record = image.record.model_dump(mode="json", include={"uid", "width", "height", "captions", "entities"})
    artefacts = [[name, a.data, _hashes(a.members)] for name, a in image.artefacts.items()]
    return digest_of([record, _hashes({"jpg": image.jpeg, "depth.png": image.depth_png}), artefacts])


def _hashes(members: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
