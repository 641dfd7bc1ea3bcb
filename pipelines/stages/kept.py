"""Reading the images of a unit that are kept, with what annotators found in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from builders.annotators.annotator import Annotator
from builders.base import SourceImage
from builders.ready import ReadyImage
from filters.decide import split_of
from pipelines import ledger
from pipelines.artefacts import Artefacts
from pipelines.stages.decide import DecideStage
from pipelines.stages.ingest import IngestStage, images_path, read_member, tar_path
from pipelines.storage import Folder
from schemas.decide import Splits
from schemas.records import Captions, ImageRecord, Op


class UnitImages:
    """The ingested images of a unit by row, with what annotators found in them. A context manager.

    Args:
        corpus: where.
        unit: of `ingest`.
        splits: shares of scenes held out.
        annotators: whose artefacts go with the images; they enrich the records in this order.
    """

    def __init__(self, corpus: Folder, unit: str, splits: Splits, annotators: Mapping[str, Annotator]) -> None:
        self._rows = {row["row"]: row for row in corpus.read_table(images_path(unit)).to_pylist()}
        self._splits, self._annotators = splits, annotators
        self._stack = ExitStack()
        self._tar = self._stack.enter_context(corpus.open(tar_path(unit)))
        self._found = {name: self._stack.enter_context(Artefacts(corpus, name, unit)) for name in annotators}

    def __enter__(self) -> UnitImages:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def read(self, number: int) -> SourceImage | ReadyImage:
        """The image of a row. Finished samples are not annotated."""
        row = self._rows[number]
        members = {name: read_member(self._tar, row["members"], name) for name in json.loads(row["members"])}
        image = _image(_record(row, self._splits), row["ready"], members)
        return image if isinstance(image, ReadyImage) else annotated(image, number, self._annotators, self._found)


class AnyImages:
    """Ingested images of any unit, by offset. A context manager that keeps the files of a few units open.

    What an annotator found comes along only if it adds to the record.
    """

    open_units = 8

    def __init__(self, corpus: Folder, splits: Splits, annotators: Mapping[str, Annotator]) -> None:
        self._corpus, self._splits = corpus, splits
        self._annotators = enriching(annotators)
        self._open: dict[str, UnitImages] = {}

    def __enter__(self) -> AnyImages:
        return self

    def __exit__(self, *error: Any) -> None:
        for images in self._open.values():
            images.__exit__(*error)

    def read(self, unit: str, row: int) -> SourceImage:
        """An image that is no finished sample."""
        images = self._open.pop(unit, None) or UnitImages(self._corpus, unit, self._splits, self._annotators)
        self._open[unit] = images  # the last one read stands last
        if len(self._open) > self.open_units:
            self._open.pop(next(iter(self._open))).__exit__(None, None, None)
        image = images.read(row)
        assert isinstance(image, SourceImage)
        return image


def enriching(annotators: Mapping[str, Annotator]) -> dict[str, Annotator]:
    """Those of the annotators that add to records."""
    return {name: a for name, a in annotators.items() if type(a).enrich is not Annotator.enrich}


def kept_images(
    corpus: Folder, unit: str, splits: Splits, annotators: Mapping[str, Annotator]
) -> Iterator[tuple[int, SourceImage | ReadyImage]]:
    """Row and image of each kept one of a unit, in order; see `UnitImages`."""
    verdicts = corpus.read_table(ledger.ledger_path(DecideStage.name, unit), ["row", "status"]).to_pylist()
    with UnitImages(corpus, unit, splits, annotators) as images:
        for verdict in verdicts:
            if verdict["status"] == "kept":
                yield verdict["row"], images.read(verdict["row"])


def annotated(
    image: SourceImage, row: int, annotators: Mapping[str, Annotator], found: Mapping[str, Artefacts]
) -> SourceImage:
    """The image with its artefacts; an annotator that adds to the record stands in its operations."""
    record, artefacts = image.record, {}
    for name, annotator in annotators.items():
        artefact = found[name].get(row)
        if artefact is None:
            continue
        artefacts[name] = artefact
        enriched = annotator.enrich(record, artefact)
        if enriched != record:
            record = enriched.model_copy(update={"ops": (*enriched.ops, found[name].op)})
    return replace(image, record=record, artefacts=artefacts)


def _image(record: ImageRecord, ready: str, members: dict[str, bytes]) -> SourceImage | ReadyImage:
    if ready:
        return ReadyImage.of(record, json.loads(ready), members)
    return SourceImage(record, members["jpg"], members.get("depth.png", b""))


def _record(row: dict[str, Any], splits: Splits) -> ImageRecord:
    scene = row["scene_id"] or row["uid"]
    inherited = {k: row[k] for k in ("license", "license_url", "author", "source_url", "optout")}
    return ImageRecord(
        **inherited,
        uid=row["uid"],
        width=row["width"],
        height=row["height"],
        captions=Captions(**row["captions"]),
        entities=json.loads(row["entities"]),
        scene_id=scene,
        split=split_of(scene, splits),
        ops=(Op.of("ingest", IngestStage.version, changes=row["changes"], input=row["input"]),),
    )
