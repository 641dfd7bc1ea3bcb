"""The text_render builder: its text can be read back, boxes hold the ink, contrast and fonts are what they say."""

from __future__ import annotations

import json
import string
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from builders.base import Outcome, Rejected, Sample, SourceImage
from builders.templates import load_templates
from builders.text_render import TextRender, TextRenderParams
from builders.text_render.fonts import Font, shipped_fonts
from builders.text_render.layout import (
    Align,
    Block,
    draw,
    entities,
    least_contrast,
    luminance_behind,
    place,
    relative_luminance,
    wrap,
)
from builders.text_render.reading import character_error_rate, read_text
from builders.text_render.scenes import COLOURS, ON_PHOTO, PLAIN, SCENES
from builders.text_render.texts import compose
from filters.models import ModelMissing
from schemas.codec import decode_rgb, encode_jpeg
from schemas.identity import generator, uid_of
from schemas.records import Captions, ImageRecord
from schemas.vocabulary import STREAMS

CAPTION = "A white cup of coffee with a spoon on a wooden table"


def _source(pixels: np.ndarray, **fields: object) -> SourceImage:
    jpeg = encode_jpeg(pixels)
    height, width = pixels.shape[:2]
    return SourceImage(ImageRecord(uid=uid_of(jpeg), width=width, height=height, **fields), jpeg)


COFFEE = _source(
    cv2.resize(skimage.data.coffee(), (512, 342), interpolation=cv2.INTER_AREA), captions=Captions(short=CAPTION)
)
BUILDER = TextRender(TextRenderParams())
FONTS = shipped_fonts()


def attempt(scene: str, seed: int = 0, image: SourceImage = COFFEE, builder: TextRender = BUILDER) -> Outcome:
    return builder.build(image, scene, generator(seed, f"{image.record.uid}/{scene}", builder.name))


def build(scene: str, seed: int = 0, image: SourceImage = COFFEE, builder: TextRender = BUILDER) -> Sample:
    outcome = attempt(scene, seed, image, builder)
    assert not isinstance(outcome, Rejected), outcome
    return outcome[0]


def params_of(sample: Sample) -> dict:
    return json.loads(sample.record.ops[-1].params)


# --- the whole -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scene", SCENES)
def test_what_is_written_can_be_read_back(scene: str) -> None:
    rates = []
    for seed in range(2):
        sample = build(scene, seed)
        rates.append(
            character_error_rate(read_text(decode_rgb(sample.images["output.jpg"])), params_of(sample)["text"])
        )
    assert max(rates) <= 0.05, rates


@pytest.mark.parametrize("scene", SCENES)
def test_the_instruction_spells_out_the_text(scene: str) -> None:
    for seed in range(8):
        record = build(scene, seed).record
        blocks = params_of(build(scene, seed))["text"].split("\n")
        for text in (record.instruction, *record.instruction_variants):
            assert all(block in text for block in blocks)
            assert (CAPTION in text) >= (scene in ON_PHOTO)


@pytest.mark.parametrize("scene", SCENES)
def test_records(scene: str) -> None:
    sample = build(scene)
    record, params = sample.record, params_of(sample)
    assert tuple(sample.members) == STREAMS["text_render"].members
    assert (record.stream, record.subtask, record.edit_source_index, record.real_output) == (
        "text_render",
        scene,
        -1,
        False,
    )
    assert decode_rgb(sample.images["output.jpg"]).shape == COFFEE.pixels.shape
    assert params["font"]["license"] in ("OFL-1.1", "Bitstream-Vera (DejaVu)")
    scores = json.loads(record.scores)
    assert scores["contrast"] >= 4.5
    assert scores["font_size"] >= 20
    found = json.loads(record.entities)
    written = params["text"].split()
    assert [e["phrase"] for e in found if e["label"] == "word"] == written
    assert " ".join(e["phrase"] for e in found if e["label"] == "line").split() == written
    assert sample.images == build(scene).images


def test_without_a_caption_only_plain_scenes_are_tried() -> None:
    bare = _source(COFFEE.pixels)
    builder = TextRender(TextRenderParams(per_image=7))
    assert set(builder.attempts(bare.record, np.random.default_rng(0))) == set(PLAIN)
    assert set(builder.attempts(COFFEE.record, np.random.default_rng(0))) == set(SCENES)
    photo_only = TextRender(TextRenderParams(scenes=["poster"]))
    assert photo_only.attempts(bare.record, np.random.default_rng(0)) == []


def test_gates_tell_their_value() -> None:
    small = TextRender(TextRenderParams(min_side=400))
    outcome = attempt("word", builder=small)
    assert isinstance(outcome, Rejected) and (outcome.reason, outcome.value) == ("too_small", 342)
    contrast = attempt("word", builder=TextRender(TextRenderParams(contrast=21)))
    assert isinstance(contrast, Rejected) and contrast.reason == "contrast" and 4.5 <= contrast.value < 21
    crowded = attempt("page", builder=TextRender(TextRenderParams(min_size=80)))
    assert isinstance(crowded, Rejected) and crowded.reason == "does_not_fit" and crowded.value > 40
    chinese = _source(COFFEE.pixels, captions=Captions(short="一只 猫 在 桌子 上 睡觉"))
    outcomes = [attempt("sentence", seed, chinese) for seed in range(8)]
    assert "no_glyphs" in {outcome.reason for outcome in outcomes if isinstance(outcome, Rejected)}


def test_a_reader_rejects_a_picture_that_says_more() -> None:
    """A photo with writing of its own, on which a sign is put."""
    shop = COFFEE.pixels.copy()
    cv2.putText(shop, "ANOTHER SIGN HERE", (10, 335), cv2.FONT_HERSHEY_SIMPLEX, 1.3, (255, 255, 255), 4)
    image = _source(shop, captions=Captions(short=CAPTION))
    reading = TextRender(TextRenderParams(verify="rapidocr"))
    outcomes = [attempt("sign", seed, image, reading) for seed in range(3)]
    misread = [outcome for outcome in outcomes if isinstance(outcome, Rejected)]
    assert misread and all(o.reason == "misread" and o.value > 0.1 for o in misread)
    accepted = build("sign", 1, COFFEE, reading)
    assert json.loads(accepted.record.scores)["cer"] <= 0.1


def test_wrong_parameters_and_missing_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="did you mean 'poster'"):
        TextRenderParams(scenes=["postr"])
    absent = {"path": tmp_path / "x.ttf", "family": "X", "license": "OFL-1.1", "look": "serif"}
    with pytest.raises(ModelMissing, match=r"fonts: there is no .*x\.ttf"):
        TextRender(TextRenderParams(fonts=[absent])).preflight()
    monkeypatch.setattr("filters.packaged.find_spec", lambda name: None)
    with pytest.raises(ModelMissing, match="matplotlib is not installed"):
        TextRender(TextRenderParams()).preflight()


def test_own_fonts_replace_the_shipped_ones() -> None:
    own = {"path": FONTS[0].path, "family": "Mine", "license": "OFL-1.1", "look": "hand-made"}
    sample = build("word", builder=TextRender(TextRenderParams(fonts=[own])))
    assert params_of(sample)["font"]["family"] == "Mine"
    assert "hand-made letters" in sample.record.instruction


# --- parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("font", FONTS, ids=lambda font: font.path.stem)
def test_shipped_fonts_write_latin_and_say_when_they_cannot(font: Font) -> None:
    assert font.path.is_file()
    assert font.covers(string.ascii_letters + string.digits + "éüß.,:;!?'-–")
    assert not font.covers("猫")


@given(st.lists(st.text(string.ascii_letters, min_size=1, max_size=9), min_size=1, max_size=40), st.sampled_from(FONTS))
def test_wrapping_keeps_every_word_inside_the_width(words: list[str], font: Font) -> None:
    sized = font.at(20)
    lines = wrap(" ".join(words), sized, 240)
    assert lines is not None
    assert " ".join(lines).split() == words
    assert all(sized.getlength(line) <= 240 for line in lines)


def test_a_word_that_is_too_wide_cannot_be_wrapped() -> None:
    assert wrap("a incomprehensibilities", FONTS[0].at(40), 200) is None


@settings(max_examples=30)
@given(st.sampled_from(FONTS), st.sampled_from(["left", "center", "right"]), st.integers(0, 2**32 - 1))
def test_boxes_hold_all_ink_and_lie_in_the_region(font: Font, align: Align, seed: int) -> None:
    text = compose("sentence", np.random.default_rng(seed))
    lines = place([Block(text, (20, 30, 380, 270), 40, align)], font, 12)
    assert lines is not None
    canvas = draw(np.full((300, 400, 3), 255, np.uint8), lines, font, (0, 0, 0))
    outside = canvas.copy()
    for entity in entities(lines, font):
        x0, y0, x1, y1 = entity.box
        assert 18 <= x0 < x1 <= 382 and 28 <= y0 < y1 <= 272
        if entity.label == "word":
            assert (canvas[int(y0) : int(y1) + 1, int(x0) : int(x1) + 1] < 128).any()
            outside[max(0, int(y0) - 1) : int(y1) + 2, max(0, int(x0) - 1) : int(x1) + 2] = 255
    assert (outside > 200).all()


def test_contrast_is_that_of_wcag() -> None:
    """Ratios from the definition: black on white 21:1; #767676 on white is the lightest gray that passes AA, 4.54:1."""
    white = relative_luminance(np.array([[255, 255, 255]], np.uint8))
    assert least_contrast((0, 0, 0), white) == 21
    assert least_contrast((0x76, 0x76, 0x76), white) == pytest.approx(4.54, abs=0.005)
    assert least_contrast((0x77, 0x77, 0x77), white) < 4.5


def test_contrast_is_judged_where_it_is_worst() -> None:
    canvas = np.full((40, 100, 3), 255, np.uint8)
    canvas[:, 90:] = 20
    behind = luminance_behind(canvas, [(0, 0, 100, 40)])
    assert least_contrast((0, 0, 0), behind) < 1.3
    assert least_contrast((0, 0, 0), luminance_behind(canvas, [(0, 0, 80, 40)])) == 21


@pytest.mark.parametrize(
    ("read", "written", "rate"),
    [
        ("Open", "Open", 0),
        ("0pen", "Open", 0.25),
        ("open", "Open", 0.25),
        ("", "Open", 1),
        ("O p\ne n", "Open", 0),
        ("Open now", "Open", 0.75),
        ("kitten", "sitting", 3 / 7),
    ],
)
def test_character_error_rate(read: str, written: str, rate: float) -> None:
    assert character_error_rate(read, written) == pytest.approx(rate, abs=1e-4)


def test_templates() -> None:
    templates = load_templates("text_render")
    assert set(templates) == set(SCENES)
    for scene, texts in templates.items():
        assert len(set(texts)) >= 10
        fields = [{name for _, name, _, _ in string.Formatter().parse(text) if name} for text in texts]
        for names in fields:
            assert "text" in names and names & {"letters", "letters_first"}
            assert ("caption" in names) == (scene in ON_PHOTO)


def test_colours_can_be_told_apart() -> None:
    values = list(COLOURS.values())
    distances = [np.linalg.norm(np.subtract(a, b, dtype=float)) for i, a in enumerate(values) for b in values[i + 1 :]]
    assert min(distances) > 15
