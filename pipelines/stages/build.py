"""build: every kept image of a unit through every builder; samples go to one part per stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from builders.base import Builder, Rejected, Sample, SourceImage
from builders.ready import ReadyImage, build_ready
from builders.registry import BUILDERS
from filters.models import content_revision
from pipelines import ledger
from pipelines.engine import Context, Dropped, Fate, Kept, RowStage, Task
from pipelines.parts import PartWriter
from pipelines.stages.annotate import AnnotateStage, annotators_of
from pipelines.stages.decide import DecideStage
from pipelines.stages.ingest import IngestStage, in_source_order
from pipelines.stages.kept import enriching, kept_images
from pipelines.stages.pair import CHOOSE, PairStage, paired, pairs_path
from schemas.identity import digest_of, generator
from schemas.models import ModelName, ModelParams


@dataclass(frozen=True)
class Attempt:
    """A row of this stage: one builder's attempt at one image."""

    input: str
    uid: str
    image: SourceImage | ReadyImage
    builder: str
    name: str


class BuildStage(RowStage):
    name = "build"
    version = "1"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        sections = self.recipe.builders()
        self.builders: dict[str, Builder] = {n: b(sections[n]) for n, b in BUILDERS.items() if n in sections}
        self.annotators = annotators_of(self.recipe)

    def tasks(self) -> list[Task]:
        found = ledger.read_markers(self.corpus, AnnotateStage.name)
        verdicts = ledger.read_markers(self.corpus, DecideStage.name)["all"].outputs
        params = {n: [b.version, _spec(b.params)] for n, b in self.builders.items()}
        same_for_all = [self.version, self.recipe.seed, self.recipe.decide.splits.model_dump(mode="json"), params]
        num_gpus = sum(builder.num_gpus for builder in self.builders.values())  # a worker holds all of them
        units = in_source_order(self.recipe, ledger.read_markers(self.corpus, IngestStage.name))
        pairs = ledger.read_markers(self.corpus, PairStage.name)[CHOOSE].outputs if self.recipe.pair else {}

        def artefacts(unit: str, annotators: Iterable[str]) -> list[tuple[str, str]]:
            return [(name, found[part].content) for name in annotators if (part := f"{unit}.{name}") in found]

        tasks = []
        for unit, marker in units.items():
            kept = verdicts[ledger.ledger_path(DecideStage.name, unit)]["kept"]
            work = [same_for_all, marker.content, kept, artefacts(unit, self.annotators)]
            if chosen := pairs.get(pairs_path(unit)):
                others = [[units[o].content, artefacts(o, enriching(self.annotators))] for o in chosen["others"]]
                work.append([chosen["sha256"], others])
            tasks.append(Task(unit, digest_of(work), {}, num_gpus))
        return tasks

    def rows(self, task: Task) -> Iterator[Attempt]:
        for _, image in self._images(task.unit):
            uid = image.record.uid
            if isinstance(image, ReadyImage):
                yield Attempt(f"{uid}/ready/sample", uid, image, "ready", "sample")
                continue
            for name, builder in self.builders.items():
                for attempt in builder.attempts(image.record, generator(self.recipe.seed, uid, name)):
                    yield Attempt(f"{uid}/{name}/{attempt}", uid, image, name, attempt)

    def _images(self, unit: str) -> Iterator[tuple[int, SourceImage | ReadyImage]]:
        splits = self.recipe.decide.splits
        images = kept_images(self.corpus, unit, splits, self.annotators)
        return paired(self.corpus, unit, splits, self.annotators, images) if self.recipe.pair else images

    def process(self, row: Attempt) -> tuple[Fate, list[Sample] | None]:
        if isinstance(row.image, ReadyImage):
            outcome = build_ready(row.image)
        else:
            rng = generator(self.recipe.seed, f"{row.uid}/{row.name}", row.builder)
            outcome = self.builders[row.builder].build(row.image, row.name, rng)
        if isinstance(outcome, Rejected):
            return Dropped(outcome.reason, outcome.value, outcome.detail), None
        return Kept(outputs=tuple(s.record.key for s in outcome)), outcome

    def writer(self, task: Task) -> PartWriter:
        return PartWriter(self.corpus, task.unit)


def _spec(value: Any) -> Any:
    """Parameters as a digest has them: without where a model runs, and with the content of files and model folders."""
    if isinstance(value, BaseModel):
        left_out = ModelParams.resources if isinstance(value, ModelParams) else frozenset()
        spec = {name: _spec(getattr(value, name)) for name in type(value).model_fields if name not in left_out}
        if isinstance(value, ModelName) and value.is_path:
            spec["content"] = content_revision(Path(value.model).expanduser())
        return spec
    if isinstance(value, Mapping):
        return {str(key): _spec(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_spec(entry) for entry in value]
    return [str(value), content_revision(value)] if isinstance(value, Path) else value
