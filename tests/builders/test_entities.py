"""Grounding and masks: real transformers code on tiny random checkpoints, and the rules on what they find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
from sklearn.datasets import load_sample_image

from builders.annotators.annotator import Artefact
from builders.annotators.entities import Entities, EntitiesParams, SegmenterName
from builders.annotators.grounders import Found, GroundingDino
from builders.annotators.sam import Sam
from builders.base import SourceImage
from filters.models import ModelMissing, content_revision
from schemas.codec import encode_jpeg
from schemas.identity import uid_of
from schemas.masks import decode_mask, encode_rle
from schemas.models import ModelParams
from schemas.records import Captions, Entity, ImageRecord
from tests.builders.tiny_annotators import save_grounding_dino, save_owlv2, save_qwen_vl, save_sam2
from tests.conftest import CAPTIONS

ANYTHING: dict[str, Any] = {"min_mask_score": 0.0, "fill": (0.0, 1.0), "area": (0.0, 1.0), "max_borders": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_owlv2(folder / "owlv2")
    save_grounding_dino(folder / "grounding_dino")
    save_sam2(folder / "sam2")
    return folder


def _image(pixels: np.ndarray, caption: str = "", entities: tuple[Entity, ...] = ()) -> SourceImage:
    jpeg = encode_jpeg(pixels)
    record = ImageRecord(
        uid=uid_of(jpeg),
        width=pixels.shape[1],
        height=pixels.shape[0],
        captions=Captions(short=caption),
        entities=entities,
    )
    return SourceImage(record, jpeg)


@pytest.mark.parametrize("grounder", ["owlv2", "grounding_dino"])
def test_phrases_of_the_caption_are_grounded_and_segmented(
    grounder: str, models: Path, photographs: dict[str, np.ndarray]
) -> None:
    params = EntitiesParams(
        model=str(models / grounder), segmenter=SegmenterName(model=str(models / "sam2")), min_score=0.3, **ANYTHING
    )
    entities = Entities(params)
    entities.preflight()
    images = [_image(photographs[name], CAPTIONS[name]) for name in ("astronaut", "coffee", "cat")]
    found = entities.annotate([*images, _image(photographs["china"])])
    assert found == entities.annotate([*images, _image(photographs["china"])])
    assert found[3].data == {"found": [], "rejected": [], "source": []}  # no caption, no phrase
    named = [{e["phrase"] for e in f.data["found"]} for f in found[:3]]
    assert all(named) and named[0] <= {"smiling astronaut", "orange space suit", "flag", "model", "space shuttle"}
    for image, artefact in zip(images, found, strict=False):
        record = entities.enrich(image.record, artefact)
        for entity in record.entities:
            x0, y0, x1, y1 = entity.box
            assert 0 <= x0 < x1 <= record.width and 0 <= y0 < y1 <= record.height and 0.3 < entity.score <= 1
            if entity.mask:
                assert decode_mask(entity.mask, record.height, record.width).any()
        assert any(entity.mask for entity in record.entities)
    op = entities.op()
    assert (op.model, op.revision) == (str(models / grounder), content_revision(models / grounder))
    assert content_revision(models / "sam2") in op.params


def test_a_fixed_vocabulary_of_any_length_replaces_captions(models: Path, photographs: dict[str, np.ndarray]) -> None:
    words = tuple(sorted({word.strip(".").lower() for text in CAPTIONS.values() for word in text.split()}))
    params = EntitiesParams(model=str(models / "grounding_dino"), segmenter=None, vocabulary=words, **ANYTHING)
    (artefact,) = Entities(params).annotate([_image(photographs["cat"], CAPTIONS["cat"])])
    assert len(words) > 48  # more than two questions
    assert {e["phrase"] for e in artefact.data["found"]} <= set(words)
    assert {e["mask_problem"] for e in artefact.data["found"]} == {"no_segmenter"}


def test_every_token_of_a_phrase_and_none_of_another_counts_for_it(models: Path) -> None:
    grounder = GroundingDino(ModelParams(model=str(models / "grounding_dino")))
    phrases = ["white cup", "saucer", "wooden table"]
    text = "white cup. saucer. wooden table."
    tokens = grounder._processor.tokenizer(text)["input_ids"]
    spans = grounder._token_spans(text, phrases)
    words = [grounder._processor.tokenizer.decode([tokens[i] for i in span]) for span in spans]
    assert words == phrases


def _judge(found: list[Found], image: SourceImage, **params: Any) -> dict[str, Any]:
    return Entities(EntitiesParams(segmenter=None, **params))._describe(image, found)


def test_rules_reject_with_reason_and_value(photographs: dict[str, np.ndarray]) -> None:
    height, width = photographs["cat"].shape[:2]
    image = _image(photographs["cat"], entities=(Entity(phrase="ear", box=(150, 20, 200, 80)),))
    good = Found("tabby cat", (20, 20, 120, 120), 0.9)
    found = [
        Found("cat", (22, 20, 122, 121), 0.8),  # the same box under another name
        Found("whiskers", (130, 90, 140, 95), 0.7),
        Found("wall", (0, 0, width, height), 0.6),
        Found("tail", (-5, 100, 60, height + 9), 0.5),  # reaches two edges
        Found("the ear", (151, 21, 201, 82), 0.4),  # the source has it
        good,
    ]
    data = _judge(found, image)
    assert [e["phrase"] for e in data["found"]] == ["tabby cat"]
    reasons = {e["phrase"]: e["reason"] for e in data["rejected"]}
    assert reasons == {
        "cat": "duplicate",
        "whiskers": "area",
        "wall": "area",
        "tail": "cut_off",
        "the ear": "source_has_it",
    }
    assert data["found"] == _judge(found[::-1], image)["found"]  # whatever the order


def test_without_models_the_source_s_boxes_get_masks_by_grabcut(photographs: dict[str, np.ndarray]) -> None:
    pixels = np.full((200, 240, 3), (90, 140, 60), np.uint8)
    yy, xx = np.mgrid[:200, :240]
    disk = (yy - 100) ** 2 + (xx - 120) ** 2 <= 60**2
    pixels[disk] = (200, 40, 40)
    pixels = np.clip(pixels + np.random.default_rng(0).normal(0, 5, pixels.shape), 0, 255).astype(np.uint8)
    own = {"size": [200, 240], "counts": encode_rle(disk)["counts"]}
    boxed = Entity(phrase="a red ball", box=(58, 38, 182, 162))
    image = _image(pixels, CAPTIONS["cat"], (boxed, boxed.model_copy(update={"mask": own})))
    entities = Entities(EntitiesParams())
    entities.preflight()
    (artefact,) = entities.annotate([image])
    assert artefact.data["found"] == [] and artefact.data["source"][1] == {"mask": {}, "box": []}
    first, second = entities.enrich(image.record, artefact).entities
    mask = decode_mask(first.mask, 200, 240)
    assert (mask & disk).sum() / (mask | disk).sum() > 0.95
    assert second == image.record.entities[1]  # the source's own mask stays


def test_sam_gives_each_box_its_own_mask_and_confidence(models: Path, photographs: dict[str, np.ndarray]) -> None:
    sam = Sam(ModelParams(model=str(models / "sam2")))
    boxes = [(10.0, 10.0, 90.0, 90.0), (100.0, 40.0, 220.0, 150.0)]
    made = sam.segment_boxes(photographs["cat"], boxes)
    assert [mask.shape for mask, _ in made] == [photographs["cat"].shape[:2]] * 2
    assert all(mask.dtype == bool and 0 <= score <= 1 for mask, score in made)
    alone, score = sam.segment(photographs["cat"], boxes[1])
    assert (alone == made[1][0]).mean() > 0.99 and score == pytest.approx(made[1][1], abs=1e-4)
    assert sam.segment_boxes(photographs["cat"], []) == []


def test_models_of_another_kind_are_refused_by_their_key(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelMissing, match=r"model: .*finds no phrases; known are owlvit"):
        Entities(EntitiesParams(model=str(save_qwen_vl(tmp_path / "qwen")))).preflight()
    with pytest.raises(ModelMissing, match=r"segmenter.model: .*cannot be the segmenter"):
        Entities(
            EntitiesParams(model=str(models / "owlv2"), segmenter=SegmenterName(model=str(models / "grounding_dino")))
        ).preflight()
    with pytest.raises(ModelMissing, match=r"segmenter.model: .*there is no"):
        Entities(EntitiesParams(segmenter=SegmenterName(model=str(tmp_path / "none")))).preflight()


@pytest.mark.parametrize("subject_id", ["", "toys/ball"])
def test_a_subject_that_is_only_named_is_found_in_the_middle(subject_id: str) -> None:
    flower = load_sample_image("flower.jpg")
    whole = Entity(phrase="pink dahlia", label="pink dahlia", box=(0, 0, 640, 427), subject_id=subject_id)
    image = _image(flower, entities=(whole,))
    entities = Entities(EntitiesParams())
    (artefact,) = entities.annotate([image])
    (entity,) = entities.enrich(image.record, artefact).entities
    if not subject_id:  # something that fills the photograph is where it was said to be
        assert entity == whole
        return
    mask = decode_mask(entity.mask, 427, 640)
    outline = cv2.ellipse(np.zeros((427, 640), np.uint8), (307, 222), (139, 138), 0, 0, 360, 1, -1).astype(bool)
    assert (mask & outline).sum() / (mask | outline).sum() > 0.9
    assert np.allclose(entity.box, (168, 84, 446, 360), atol=12) and entity.subject_id == subject_id


def test_a_subject_that_does_not_stand_out_stays_the_whole_photograph() -> None:
    gravel = skimage.data.gravel()[:256, :256, None].repeat(3, axis=2)
    whole = Entity(phrase="gravel", box=(0, 0, 256, 256), subject_id="stones/gravel")
    image = _image(gravel, entities=(whole,))
    entities = Entities(EntitiesParams())
    assert entities.enrich(image.record, entities.annotate([image])[0]).entities == (whole,)


def test_a_grounder_locates_a_subject_by_its_name(photographs: dict[str, np.ndarray]) -> None:
    height, width = photographs["cat"].shape[:2]
    whole = Entity(phrase="cat", label="cat", box=(0, 0, width, height), subject_id="pets/cat")
    image = _image(photographs["cat"], CAPTIONS["cat"], (whole,))
    found = [Found("whiskers", (60, 60, 120, 120), 0.9), Found("tabby cat", (20, 20, 150, 130), 0.8)]
    entities = Entities(EntitiesParams(segmenter=None))
    data = entities._describe(image, found)
    assert [one["phrase"] for one in data["found"]] == ["whiskers"]
    first, second = entities.enrich(image.record, Artefact(data)).entities
    assert (first.box, first.subject_id, second.phrase) == ((20, 20, 150, 130), "pets/cat", "whiskers")
