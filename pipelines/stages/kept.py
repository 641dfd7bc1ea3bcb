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


def kept_images(
    corpus: Folder, unit: str, splits: Splits, annotators: Mapping[str, Annotator]
) -> Iterator[tuple[int, SourceImage | ReadyImage]]:
    """Row and image of each kept one, in order. Finished samples are not annotated.

    Args:
        corpus: where.
        unit: of `ingest`.
        splits: shares of scenes held out.
        annotators: whose artefacts go with the images; they enrich the records in this order.
    """
    verdicts = corpus.read_table(ledger.ledger_path(DecideStage.name, unit), ["row", "status"]).to_pylist()
    kept = {v["row"] for v in verdicts if v["status"] == "kept"}
    images = corpus.read_table(images_path(unit)).to_pylist()
    with ExitStack() as stack:
        tar = stack.enter_context(corpus.open(tar_path(unit)))
        found = {name: stack.enter_context(Artefacts(corpus, name, unit)) for name in annotators}
        for row in images:
            if row["row"] not in kept:
                continue
            members = {name: read_member(tar, row["members"], name) for name in json.loads(row["members"])}
            image = _image(_record(row, splits), row["ready"], members)
            yield (
                row["row"],
                image if isinstance(image, ReadyImage) else annotated(image, row["row"], annotators, found),
            )


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
