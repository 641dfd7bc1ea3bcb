"""build: every kept image of a unit through every builder; samples go to one part per stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import BaseModel

from builders.base import Builder, Rejected, Sample, SourceImage
from builders.ready import ReadyImage, build_ready
from builders.registry import BUILDERS
from filters.models import content_revision
from pipelines import ledger
from pipelines.engine import Context, Dropped, Fate, Kept, RowStage, Task, describe
from pipelines.stages.annotate import AnnotateStage, annotators_of
from pipelines.stages.decide import DecideStage
from pipelines.stages.ingest import IngestStage, in_source_order
from pipelines.stages.kept import kept_images
from schemas.arrow import SAMPLES
from schemas.identity import digest_of, generator
from schemas.models import ModelName, ModelParams
from schemas.shards import encode_sample, iter_bytes
from schemas.vocabulary import STREAMS


def part_path(stream: str, unit: str) -> str:
    """Samples of one unit and stream as they will stand in a shard, without the end of an archive."""
    return f"work/parts/{stream}/{unit}.tar"


def part_index_path(stream: str, unit: str) -> str:
    return f"work/parts/{stream}/{unit}.parquet"


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
        num_gpus = max((builder.num_gpus for builder in self.builders.values()), default=0.0)
        tasks = []
        for unit, marker in in_source_order(self.recipe, ledger.read_markers(self.corpus, IngestStage.name)).items():
            artefacts = [(name, found[part].content) for name in self.annotators if (part := f"{unit}.{name}") in found]
            kept = verdicts[ledger.ledger_path(DecideStage.name, unit)]["kept"]
            tasks.append(Task(unit, digest_of([same_for_all, marker.content, kept, artefacts]), {}, num_gpus))
        return tasks

    def rows(self, task: Task) -> Iterator[Attempt]:
        for _, image in kept_images(self.corpus, task.unit, self.recipe.decide.splits, self.annotators):
            uid = image.record.uid
            if isinstance(image, ReadyImage):
                yield Attempt(f"{uid}/ready/sample", uid, image, "ready", "sample")
                continue
            for name, builder in self.builders.items():
                for attempt in builder.attempts(image.record, generator(self.recipe.seed, uid, name)):
                    yield Attempt(f"{uid}/{name}/{attempt}", uid, image, name, attempt)

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
        return PartWriter(self, task.unit)


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


class PartWriter:
    """Appends samples to one tar part per stream, and writes the index of each when the unit is complete."""

    def __init__(self, stage: BuildStage, unit: str) -> None:
        self.corpus, self.unit = stage.corpus, unit
        self.outputs: dict[str, dict[str, Any]] = {}
        self._files: dict[str, Any] = {}
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._keys: set[str] = set()
        self._stack = ExitStack()

    def __enter__(self) -> PartWriter:
        return self

    def add(self, index: int, row: Attempt, samples: list[Sample]) -> None:
        for sample in samples:
            key, stream = sample.record.key, sample.record.stream
            if key in self._keys:
                raise ValueError(f"builder {row.builder} made key {key} twice in unit {self.unit}")
            self._keys.add(key)
            data = encode_sample(key, sample.members, STREAMS[stream])
            self._file(stream).write(data)
            self._append_row(sample, data)

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
        if error[0] is not None:
            return
        for stream, rows in self._rows.items():
            self.corpus.write_table(part_index_path(stream, self.unit), pa.Table.from_pylist(rows, SAMPLES))
            for name in (part_path(stream, self.unit), part_index_path(stream, self.unit)):
                self.outputs[name] = describe(self.corpus, name)

    def _file(self, stream: str) -> Any:
        if stream not in self._files:
            path = self._stack.enter_context(self.corpus.writing(part_path(stream, self.unit)))
            self._files[stream] = self._stack.enter_context(path.open("wb"))
            self._rows[stream] = []
        return self._files[stream]

    def _append_row(self, sample: Sample, data: bytes) -> None:
        rows = self._rows[sample.record.stream]
        start = rows[-1]["offset"] + rows[-1]["size"] if rows else 0
        sizes = sample.image_sizes
        members = [
            {"name": name, "offset": start + m.offset, "size": m.size, **sizes.get(name, {"width": -1, "height": -1})}
            for span in iter_bytes(data)
            for name, m in span.members.items()
        ]
        place = {"shard": "", "index": len(rows), "offset": start, "size": len(data), "members": members}
        rows.append({**sample.record.model_dump(mode="json"), **place})
