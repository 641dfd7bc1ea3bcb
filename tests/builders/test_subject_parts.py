"""The parts of subject_crops: rules for subjects, names, instructions, views, cut-outs and what stands behind them."""

from __future__ import annotations

import json
import re
from collections import Counter

import cv2
import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st

from builders.annotators.annotator import Artefact
from builders.base import Rejected, SourceImage
from builders.edit_pairs.things import MaskFinder
from builders.subject_crops.acceptance import Subject, SubjectRules, accept, borders, box_of, covered, fill_of
from builders.subject_crops.backgrounds import PLAIN, first_visible, plain, region, texture
from builders.subject_crops.forms import erode, extracted, may_flip, possible_forms
from builders.subject_crops.sentences import Mention, instruct
from builders.subject_crops.views import crop_of, cut_out_of, draw_changes, with_context
from builders.subject_crops.words import Name, name_of, pointers, without_looks
from schemas.instructions import lint_instruction, placeholder
from schemas.records import Entity
from tests.builders.subject_images import disc, entity, picture

NO_GRABCUT = MaskFinder(None)
BALL = entity(disc(100, 100, 45))


# --- acceptance ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thing", "reason"),
    [
        (entity(disc(100, 100, 45), "the left hand", "hand"), "body_part"),
        (entity(disc(100, 100, 45), "<|image_1|>", ""), "unusable_name"),
        (entity(disc(100, 100, 45), score=0.2), "score"),
        (entity(disc(100, 100, 10)), "area"),
        (entity(disc(100, 100, 45) & (np.arange(200) % 200 < 80)), "too_small"),
        (entity(disc(30, 30, 40)), "cut_off"),
        (entity(disc(60, 60, 30) | disc(140, 140, 30)), "split_mask"),
        (entity(disc(100, 100, 60) & ~disc(100, 100, 57)), "fill"),
        (entity(disc(60, 60, 40), box=(100.0, 100.0, 190.0, 190.0)), "mask_off_box"),
        (Entity(phrase="the cup", box=(0, 0, 200, 180)), "area"),
    ],
)
def test_every_rule_refuses_with_its_slug(thing: Entity, reason: str) -> None:
    refused = accept(picture(thing), 0, NO_GRABCUT, SubjectRules(min_side=60))
    assert isinstance(refused, Rejected)
    assert refused.reason == reason


def test_people_are_a_matter_of_policy() -> None:
    woman = entity(disc(100, 100, 45), "the smiling astronaut", "woman")
    hat = entity(disc(100, 100, 45), "the officer's hat", "hat")

    def reason(thing: Entity, persons: str, license: str) -> str:
        found = accept(picture(thing, license=license), 0, NO_GRABCUT, SubjectRules(persons=persons))
        return found.reason if isinstance(found, Rejected) else ""

    assert reason(woman, "licensed", "CC0-1.0") == reason(woman, "all", "") == reason(hat, "none", "") == ""
    assert reason(woman, "licensed", "") == "person_without_license"
    assert reason(woman, "none", "CC0-1.0") == "person"


@settings(max_examples=30)
@given(st.tuples(*[st.integers(20, 180)] * 2), st.tuples(*[st.integers(40, 160)] * 2), st.booleans())
def test_what_is_accepted_keeps_all_rules(middle: tuple[int, int], axes: tuple[int, int], has_mask: bool) -> None:
    mask = cv2.ellipse(np.zeros((200, 200), np.uint8), (middle, axes, 30), 1, -1).astype(bool)
    thing = entity(mask) if has_mask else entity(mask).model_copy(update={"mask": {}})
    rules = SubjectRules(min_side=48)
    found = accept(picture(thing), 0, NO_GRABCUT, rules)
    if isinstance(found, Rejected):
        return
    x0, y0, x1, y1 = found.box
    assert 0 <= x0 < x1 <= 200 and 0 <= y0 < y1 <= 200 and min(x1 - x0, y1 - y0) >= 48
    assert borders(found.box, (200, 200)) <= 1
    share = (x1 - x0) * (y1 - y0) / 200**2 if found.mask is None else found.mask.mean()
    assert rules.area[0] <= share <= rules.area[1]
    if found.mask is not None:
        assert box_of(found.mask) == found.box
        assert rules.fill[0] <= fill_of(found.mask, found.box) <= rules.fill[1]


def test_a_thing_before_another_takes_from_it() -> None:
    plate, cup = disc(100, 100, 60), disc(100, 60, 25)
    whole, bitten = entity(plate, "the plate", "plate"), entity(plate & ~cup, "the plate", "plate")
    for thing, low, high in ((whole, 0.0, 0.01), (bitten, 0.08, 0.25)):
        image = picture(thing, entity(cup, "the cup", "cup"))
        subject = Subject(0, thing, box_of(plate), np.asarray(plate if thing is whole else plate & ~cup))
        assert low <= covered(image, subject) <= high


# --- words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phrase", "label", "full", "plain"),
    [
        ("the red cup of espresso", "cup", "red cup of espresso", "cup"),
        ("the ginger kitten on the left", "kitten", "ginger kitten", "kitten"),
        ("the left pendant lamp", "lamp", "pendant lamp", "lamp"),
        ("the laptop showing the time", "laptop", "laptop", "laptop"),
        ("the smiling astronaut in the orange space suit", "woman", "smiling astronaut", "woman"),
        ("a black and white cat", "", "black and white cat", "cat"),
        ("an orange", "", "orange", "orange"),
    ],
)
def test_names_with_and_without_looks(phrase: str, label: str, full: str, plain: str) -> None:
    assert name_of(Entity(phrase=phrase, label=label, box=(0, 0, 1, 1))) == Name(full, plain)


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("A red cup on a wide red saucer.", "A cup on a wide saucer."),
        ("A round, pale orange dahlia.", "A round dahlia."),
        ("an orange suit and a black and white officer's hat", "a suit and an officer's hat"),
        ("A dark navy uniform of a naval officer", "A uniform of a naval officer"),
        ("The wall is white and the light is warm.", "The wall is white and the light is warm."),
        ("painted in white, blue and red on a black ground", "painted in white, blue and red on a ground"),
        ("An almost entirely white interior", "An almost entirely white interior"),
        ("Dark lattice towers. White clouds.", "Dark lattice towers. Clouds."),
    ],
)
def test_looks_are_dropped_before_nouns(text: str, bare: str) -> None:
    assert without_looks(text) == bare
    assert without_looks(bare) == bare


def test_in_a_photograph_with_several_a_place_tells_them_apart() -> None:
    left, right = (entity(disc(x, 100, 30), f"the {c} chair", "chair") for x, c in ((50, "red"), (150, "blue")))
    assert pointers([left, right], (200, 200)) == Name("red chair", "left chair")
    same = [e.model_copy(update={"phrase": "the chair"}) for e in (right, left)]
    assert pointers(same, (200, 200)) == Name("right chair", "right chair")
    assert pointers([left, left.model_copy(update={"phrase": "a chair"})], (200, 200)) is None


def test_captions_are_used_where_they_speak_of_the_subject() -> None:
    cup = Entity(phrase="the red cup of espresso", label="cup", box=(0, 0, 1, 1))
    saucer = Entity(phrase="the red saucer", label="saucer", box=(0, 0, 1, 1))
    mentions = [Mention(name_of(cup), 2, cup, (saucer,)), Mention(name_of(saucer), 1, saucer, (cup,))]
    captions = {"long": "A red cup with a white rim stands on the red saucer, and a metal spoon leans on it."}
    seen: Counter[str] = Counter()
    for seed in range(60):
        wording, withheld = instruct(mentions, captions, np.random.default_rng(seed))
        for i, text in enumerate((wording.instruction, *wording.instruction_variants)):
            assert lint_instruction(text, 2) == []
            replaced = text.count("saucer") == 1 and "spoon" in text
            seen["replaced" if replaced else "other"] += 1
            if replaced and withheld ^ bool(i % 2):
                assert re.search(r"[Tt]he cup.* with a rim stands on the saucer.*, and a spoon leans on it\.", text)
                assert text.index(placeholder(2)) < text.index(placeholder(1))
    assert seen["replaced"] > 40 and seen["other"] > 40


# --- views and forms -----------------------------------------------------------------------------------------------


def test_a_crop_is_exact() -> None:
    pixels = skimage.data.coffee()[:200, :300]
    view = crop_of((40, 30, 140, 130), (200, 300), {})
    assert with_context((40, 30, 140, 130), (200, 300)) == (30, 20, 150, 140)
    assert (view.warp(pixels) == pixels[20:140, 30:150]).all()


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.booleans())
def test_all_of_a_subject_is_in_its_view_and_mirrored_only_if_it_may_be(seed: int, may_flip: bool) -> None:
    rng = np.random.default_rng(seed)
    changes = draw_changes(rng, may_flip)
    assert changes.keys() & {"flip", "rotate"} and (may_flip or "flip" not in changes)
    assert json.loads(json.dumps(changes)) == changes
    box = (60, 50, 60 + int(rng.integers(50, 120)), 50 + int(rng.integers(50, 120)))
    mask = np.zeros((240, 260), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    for view in (cut_out_of(box, 0.1, changes), crop_of(box, mask.shape, changes)):
        corners = view.corners(box)
        assert (corners > -0.03 * max(view.size)).all() and (corners < 1.03 * np.array(view.size[::-1])).all()
        seen = view.warp_alpha(mask.astype(np.float32))
        assert seen.shape == view.size and seen.min() >= 0 and seen.max() <= 1
        assert seen.sum() == pytest.approx(cv2.contourArea(corners.astype(np.float32)), rel=0.08)


def test_nothing_is_mirrored_beyond_the_border_of_a_photograph() -> None:
    mask = disc(100, 10, 60)
    view = cut_out_of(box_of(mask), 0.2, {})
    alpha = view.warp_alpha(mask.astype(np.float32))
    assert alpha[: view.size[0] // 10].max() == 0
    assert alpha.sum() == mask.sum()


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(30, 90))
def test_an_eroded_mask_lies_two_to_six_pixels_inside(seed: int, radius: int) -> None:
    mask = disc(100, 100, radius)
    eroded = erode(mask, np.random.default_rng(seed))
    depth = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5)
    assert not (eroded & ~mask).any()
    assert eroded[depth > 6.01].all() and not eroded[depth <= 2].any()
    lost = depth[mask & ~eroded].max()
    assert 2 <= lost <= 6.01


def test_thin_parts_survive_erosion() -> None:
    table = np.zeros((200, 200), bool)
    table[60:90, 20:180] = table[60:190, 30:36] = table[60:190, 160:166] = True
    eroded = erode(table, np.random.default_rng(0))
    assert eroded[100:180].any(axis=1).all() and cv2.connectedComponents(eroded.astype(np.uint8))[0] == 2


def test_text_is_not_mirrored() -> None:
    ball, sign = BALL, entity(disc(100, 100, 45), "the neon sign", "sign")
    assert may_flip(picture(ball), box_of(disc(100, 100, 45)))
    assert not may_flip(picture(sign), box_of(disc(100, 100, 45)))
    for corners, allowed in (
        ([[90, 90], [110, 90], [110, 99], [90, 99]], False),
        ([[1, 1], [9, 1], [9, 9], [1, 9]], True),
    ):
        read = {"ocr": Artefact({"lines": [{"text": "x", "confidence": 1.0, "corners": corners}]})}
        image = picture(sign)
        assert may_flip(SourceImage(image.record, image.jpeg, artefacts=read), box_of(disc(100, 100, 45))) is allowed


def test_forms_that_a_subject_can_take() -> None:
    image = picture(BALL)
    cut = accept(image, 0, NO_GRABCUT, SubjectRules())
    assert isinstance(cut, Subject)
    assert possible_forms(image, cut, is_cross=False) == ["cutout", "scene", "crop", "augmented"]
    assert possible_forms(image, cut, is_cross=True)[-1] == "photo"
    whole = Subject(0, BALL, (0, 0, 200, 200), None)
    assert possible_forms(image, whole, is_cross=False) == []
    assert possible_forms(image, whole, is_cross=True) == ["photo"]


def test_a_cut_out_is_seen_on_its_background() -> None:
    white = np.full((80, 80, 3), 250, np.uint8)
    alpha = disc(40, 40, 25, (80, 80)).astype(np.float32)
    backgrounds = [(name, plain((80, 80), PLAIN[name])) for name in ("white", "light blue")]
    found = first_visible(white, alpha, backgrounds)
    assert not isinstance(found, Rejected) and found[1] == "light blue"
    assert first_visible(white, alpha, backgrounds[:1]).reason == "hard_to_see"


def test_backgrounds_are_of_the_asked_size_and_free_of_the_subject() -> None:
    rng = np.random.default_rng(0)
    assert texture((50, 90), rng).shape == (50, 90, 3)
    pixels = np.zeros((120, 200, 3), np.uint8)
    pixels[:, :100] = 255
    for _ in range(10):
        part = region(pixels, (0, 0, 100, 120), (60, 40), rng)
        assert part is None or part.max() == 0
    assert region(pixels, (0, 0, 200, 120), (60, 40), rng) is None


def test_an_extract_keeps_the_things_own_pixels() -> None:
    image = picture(BALL)
    mask = disc(100, 100, 45)
    found = extracted(image.pixels, mask, ["white"])
    assert not isinstance(found, Rejected)
    pixels, name = found
    view = cut_out_of(box_of(mask), 0.1, {})
    core = view.warp(disc(100, 100, 40).astype(np.uint8)) > 0
    assert name == "white" and (pixels[core] == view.warp(image.pixels)[core]).all()
    assert (pixels[view.warp_alpha(disc(100, 100, 50).astype(np.float32)) == 0] == 255).all()


def test_a_replaced_noun_takes_its_own_adjectives_only() -> None:
    jug = entity(disc(100, 100, 45), "the beige jug", "jug")
    captions = {"short": "Branch in a bottle between a tap and a tall jug"}
    texts = []
    for seed in range(20):
        phrasing, _ = instruct([Mention(name_of(jug), 1, jug)], captions, np.random.default_rng(seed))
        texts += [phrasing.instruction, *phrasing.instruction_variants]
    assert any("between a tap and the" in text for text in texts)
    assert not any("between the" in text for text in texts)
