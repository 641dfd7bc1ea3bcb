"""The garments annotator: a tiny SegFormer with the published label set, loaded as a real one is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage.data

from builders.annotators.annotator import Artefact
from builders.annotators.garments import HEAD, Garments, GarmentsParams
from builders.base import SourceImage
from filters.models import ModelMissing
from schemas.codec import decode_raw, encode_jpeg, encode_png
from schemas.identity import uid_of
from schemas.masks import decode_mask
from schemas.records import Entity, ImageRecord
from tests.builders.tiny_annotators import save_human_parser


def annotator(folder: Path, **params: float) -> Garments:
    return Garments(GarmentsParams(model=str(folder), device="cpu", **params))


def parsed(**regions: tuple[slice, slice]) -> Artefact:
    """What the parser finds, with a class (by its label, `_` for `-`) in each region of 100 x 80 pixels."""
    ids = np.zeros((100, 80), np.uint8)
    segments = [{"id": 1, "label": "Background", "class_id": 0}]
    for number, (name, where) in enumerate(regions.items(), start=2):
        ids[where] = number
        segments.append({"id": number, "label": name.replace("_", "-").capitalize(), "class_id": number})
    return Artefact({"segments": segments}, {"semantic.png": encode_png(ids)})


BODY = {"face": np.s_[5:20, 30:50], "hair": np.s_[0:5, 30:50]}
CLOTHES = {"upper_clothes": np.s_[20:60, 20:60], "left_shoe": np.s_[90:100, 20:35], "right_shoe": np.s_[90:100, 45:60]}


@pytest.fixture
def stand_in(tmp_path: Path) -> Garments:
    """Its configuration is enough: the parser's maps are given."""
    return annotator(save_human_parser(tmp_path))


def test_it_runs_a_real_network(tmp_path: Path) -> None:
    made = annotator(save_human_parser(tmp_path), min_area=0.0, min_body=0.0)
    made.preflight()
    pixels = skimage.data.astronaut()[:200, 100:260]
    jpeg = encode_jpeg(np.ascontiguousarray(pixels))
    image = SourceImage(ImageRecord(uid=uid_of(jpeg), width=160, height=200), jpeg)
    (artefact,) = made.annotate([image])
    assert made.annotate([image]) == [artefact]
    record = made.enrich(image.record, artefact)
    assert len(record.entities) >= 2 and record.entities[-1].label == "person"
    for entity in record.entities:
        mask = decode_mask(entity.mask, 200, 160)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert entity.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    assert decode_raw(artefact.members[HEAD]).shape == (200, 160)
    assert made.op().name == "annotate:garments" and made.op().revision.startswith("sha256:")


def test_classes_become_garments(stand_in: Garments) -> None:
    artefact = stand_in._describe(parsed(**BODY, **CLOTHES))
    found = {entity["label"]: entity for entity in artefact.data["found"]}
    assert set(found) == {"top", "shoes"}
    assert found["top"]["box"] == [20, 20, 60, 60] and found["shoes"]["box"] == [20, 90, 60, 100]
    assert decode_mask(found["shoes"]["mask"], 100, 80).sum() == 300
    assert artefact.data["person"]["box"] == [20, 0, 60, 100]
    head = decode_raw(artefact.members[HEAD]) > 0
    assert head[:20, 30:50].all() and head.sum() == 400


@pytest.mark.parametrize("regions", [CLOTHES, BODY, {**BODY, "bag": np.s_[50:80, 0:20]}])
def test_clothes_without_a_person_are_none(stand_in: Garments, regions: dict) -> None:
    artefact = stand_in._describe(parsed(**regions))
    assert artefact.data["found"] == [] and artefact.members == {}
    record = ImageRecord(uid="0" * 64, width=80, height=100)
    assert stand_in.enrich(record, artefact) is record


def test_a_person_who_is_there_is_not_added_again(stand_in: Garments) -> None:
    artefact = stand_in._describe(parsed(**BODY, **CLOTHES))
    woman = Entity(phrase="the woman", label="woman", box=(18, 0, 62, 98))
    chair = Entity(phrase="the chair", label="chair", box=(18, 0, 62, 98))
    for there, labels in ((woman, ["woman", "shoes", "top"]), (chair, ["chair", "shoes", "top", "person"])):
        record = ImageRecord(uid="0" * 64, width=80, height=100, entities=(there,))
        assert [entity.label for entity in stand_in.enrich(record, artefact).entities] == labels


def test_a_model_of_other_things_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelMissing, match="none of its classes is a garment: wall, sky"):
        annotator(save_human_parser(tmp_path, ("wall", "sky"))).preflight()
