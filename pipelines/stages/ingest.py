"""ingest: source rows become normalised images, one tar per unit, with a row of columns each.

Content is read, hashed, decoded and checked exactly once here; every later stage trusts what it finds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import IO, Any

import pyarrow as pa

from filters.optout import embedded_optout
from pipelines.engine import Context, Dropped, Fate, Kept, Quarantined, RowStage, Task, describe
from pipelines.images import BadInput, Normalised, normalise, transform_geometry
from pipelines.ledger import Marker
from pipelines.plan import read_unit, slice_units, write_listing
from pipelines.sources.base import BadRow, Item, ReadySample, SourceRow, open_reader
from pipelines.tombstones import REASON, read_tombstones
from schemas.arrow import IMAGES
from schemas.identity import digest_of, uid_of
from schemas.recipe import Recipe
from schemas.records import Captions
from schemas.shards import BLOCK, END_OF_ARCHIVE, encode_member
from schemas.vocabulary import STREAMS


def tar_path(unit: str) -> str:
    return f"work/images/{unit}.tar"


def images_path(unit: str) -> str:
    return f"work/images/{unit}.parquet"


def scores_path(scorer: str, unit: str) -> str:
    """Columns of a unit's images, which stay when `work/` is deleted; `ingest` counts as a scorer too."""
    return f"meta/scores/{scorer}/{unit}.parquet"


def read_member(tar: IO[bytes], members: str, name: str) -> bytes:
    """One member of an image, by the `members` column of its row."""
    offset, size = json.loads(members)[name]
    tar.seek(offset)
    return tar.read(size)


def in_source_order(recipe: Recipe, markers: dict[str, Marker]) -> dict[str, Marker]:
    """Markers of units in the order of the recipe's sources, so that an appended source comes last."""
    place = {source.name: i for i, source in enumerate(recipe.sources)}
    return dict(sorted(markers.items(), key=lambda m: (place[source_of(m[0])], m[0])))


def source_of(unit: str) -> str:
    """The source that a unit is of."""
    return unit.rpartition("-")[0]


_PUBLISHED = ("unit", "row", "uid", "width", "height", "source_width", "source_height", "license", "optout_reason")


@dataclass(frozen=True)
class IngestRow:
    """A row of this stage, with the identity of its content ("" if it could not even be read).

    Of what is forgotten nothing is left, not even where it came from.
    """

    input: str
    uid: str
    row: SourceRow | ReadySample | BadRow | None

    @classmethod
    def of(cls, row: SourceRow | ReadySample | BadRow) -> IngestRow:
        match row:
            case SourceRow():
                uid = uid_of(row.image)
            case ReadySample():
                uid = digest_of([row.task, row.subtask, row.instruction, *map(uid_of, (*row.inputs, row.output))])
            case BadRow():
                uid = ""
        return cls(row.input, uid, row)

    @property
    def uids(self) -> set[str]:
        """Its own uid, and those of the images that a finished sample was made of."""
        images = (*self.row.inputs, self.row.output) if isinstance(self.row, ReadySample) else ()
        return {self.uid, *map(uid_of, images)}


@dataclass(frozen=True)
class Ingested:
    """What to store for a kept row: image members by name, and columns of `schemas.arrow.IMAGES`."""

    members: dict[str, bytes]
    columns: dict[str, Any]


class IngestStage(RowStage):
    name = "ingest"
    version = "3"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.readers = {source.name: open_reader(source, self.base) for source in self.recipe.sources}

    @property
    def warnings(self) -> list[str]:
        """What the last listing left out, by source."""
        return [f"source {name}: {text}" for name, reader in self.readers.items() for text in reader.warnings]

    def tasks(self) -> list[Task]:
        return [task for source in self.readers for task in self._source_tasks(source)]

    def _source_tasks(self, source: str) -> Iterator[Task]:
        reader, limits = self.readers[source], self.recipe.ingest.model_dump(mode="json")
        same_for_all = [self.version, reader.config.model_dump(mode="json"), limits]
        units = write_listing(self.corpus, source, slice_units(reader.list(), self.recipe.ingest.unit_rows))
        for index, items in enumerate(units):
            work = digest_of([same_for_all, [asdict(item) for item in items]])
            yield Task(f"{source}-{index:06d}", work, {"source": source, "index": index, "items": len(items)})

    def rows(self, task: Task) -> Iterator[IngestRow]:
        items: list[Item] = read_unit(self.corpus, task.payload["source"], task.payload["index"])
        forgotten = read_tombstones(self.corpus).keys()
        for row in map(IngestRow.of, self.readers[task.payload["source"]].read(items)):
            yield row if not forgotten or forgotten.isdisjoint(row.uids) else IngestRow("", "", None)

    def process(self, row: IngestRow) -> tuple[Fate, Ingested | None]:
        try:
            match row.row:
                case None:
                    return Dropped(REASON), None
                case BadRow(_, reason, detail):
                    return Quarantined(reason, detail), None
                case SourceRow():
                    return Kept(row.uid), self._image(row.row)
                case ReadySample():
                    return Kept(row.uid), self._ready(row.row)
        except BadInput as error:
            return Quarantined(error.reason, error.detail), None

    def writer(self, task: Task) -> ImageWriter:
        return ImageWriter(self, task.unit)

    def _image(self, row: SourceRow) -> Ingested:
        image = self._normalise(row.image, row.declared)
        entities, depth = transform_geometry(row.entities, row.depth_png, image)
        columns = {
            "captions": row.captions.model_dump(),
            "entities": json.dumps([e.model_dump(mode="json") for e in entities]),
            "ready": "",
        }
        members = {"jpg": image.data} | ({"depth.png": depth} if depth else {})
        return Ingested(members, _inherited(row, row.image) | _geometry(image) | columns)

    def _ready(self, row: ReadySample) -> Ingested:
        kinds = STREAMS[row.stream].image_members
        sources = dict(zip(kinds, (*row.inputs, row.output), strict=False))
        images = {m: self._normalise(data, "", lossless=m.endswith("png")) for m, data in sources.items()}
        uids = {m: uid_of(data) for m, data in sources.items()}
        ready = {
            "task": row.task,
            "subtask": row.subtask,
            "instruction": row.instruction,
            "variants": row.variants,
            "images": [{"member": m, "uid": uid} for m, uid in uids.items()],
        }
        columns = {"captions": Captions().model_dump(), "entities": "[]", "ready": json.dumps(ready)}
        target = images[kinds[len(row.inputs)]]
        # Samples of one photograph never straddle splits.
        photograph = next((uid for m, uid in uids.items() if m.endswith("jpg")), uids[kinds[0]])
        inherited = _inherited(row, *row.inputs, row.output)
        inherited |= {"scene_id": row.scene_id or photograph}
        return Ingested({m: i.data for m, i in images.items()}, inherited | _geometry(target) | columns)

    def _normalise(self, data: bytes, declared: str, lossless: bool = False) -> Normalised:
        limits = self.recipe.ingest
        return normalise(
            data,
            limits.max_pixels,
            declared=declared,
            max_source_pixels=limits.max_source_pixels,
            lossless=lossless,
        )


def _inherited(row: SourceRow | ReadySample, *files: bytes) -> dict[str, Any]:
    """Provenance; files may opt out themselves."""
    reasons = filter(None, (row.optout_reason, *map(embedded_optout, files)))
    reason = next(reasons, "")
    text = {n: getattr(row, n) for n in ("scene_id", "license", "license_url", "author", "source_url")}
    return text | {"optout": bool(reason), "optout_reason": reason}


def _geometry(image: Normalised) -> dict[str, Any]:
    names = ("width", "height", "source_width", "source_height", "source_format")
    return {n: getattr(image, n) for n in names} | {"changes": list(image.changes)}


class ImageWriter:
    """Writes the unit's tar and its columns. Members are named by row, since a unit may hold one image twice."""

    def __init__(self, stage: IngestStage, unit: str) -> None:
        self.corpus, self.unit = stage.corpus, unit
        self.outputs: dict[str, dict[str, Any]] = {}
        self._rows: list[dict[str, Any]] = []
        self._stack = ExitStack()

    def __enter__(self) -> ImageWriter:
        path = self._stack.enter_context(self.corpus.writing(tar_path(self.unit)))
        self._tar = self._stack.enter_context(path.open("wb"))
        return self

    def add(self, index: int, row: IngestRow, image: Ingested) -> None:
        places = {name: self._write(f"{index:06d}.{name}", data) for name, data in image.members.items()}
        self._rows.append(
            {"uid": row.uid, "unit": self.unit, "row": index, "input": row.input, "members": json.dumps(places)}
            | image.columns
        )

    def _write(self, name: str, data: bytes) -> list[int]:
        start = self._tar.tell() + BLOCK
        self._tar.write(encode_member(name, data))
        return [start, len(data)]

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._tar.write(END_OF_ARCHIVE)
        self._stack.__exit__(*error)
        if error[0] is None:
            images = pa.Table.from_pylist(self._rows, IMAGES)
            self.corpus.write_table(images_path(self.unit), images)
            self.corpus.write_table(scores_path(IngestStage.name, self.unit), images.select(_PUBLISHED))
            for name in (tar_path(self.unit), images_path(self.unit), scores_path(IngestStage.name, self.unit)):
                self.outputs[name] = describe(self.corpus, name)
