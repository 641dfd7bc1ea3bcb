"""Edit pairs: every operation makes true, aligned, exactly masked pairs of real photographs, or says why not."""

from __future__ import annotations

import json
import re
import string
from functools import cache
from itertools import islice

import cv2
import numpy as np
import pytest
import skimage.data
from pydantic import ValidationError
from sklearn.datasets import load_sample_image

from builders.base import Rejected, Sample, SourceImage
from builders.edit_pairs import EditPairs, EditPairsParams
from builders.edit_pairs.builder import COMPOSE, OBJECT_OPERATIONS, PARTS, PICTURE_OPERATIONS, TEXT_OPERATIONS, WEIGHTS
from builders.edit_pairs.colour import PAINTS, dominant_colour, name_pixels, nameable_colour, paint, to_lab
from builders.edit_pairs.gates import blocks
from builders.edit_pairs.looks import BACKDROPS, backdrop
from builders.edit_pairs.things import MaskFinder, iter_things, place_of, with_article
from builders.edit_pairs.wording import all_instructions
from builders.templates import load_templates
from schemas.codec import decode_raw, decode_rgb, encode_jpeg
from schemas.identity import generator, uid_of
from schemas.instructions import lint_instruction
from schemas.masks import encode_rle
from schemas.records import Entity, ImageRecord
from schemas.vocabulary import STREAMS

LOCAL = (*OBJECT_OPERATIONS, *TEXT_OPERATIONS, COMPOSE)


def source(pixels: np.ndarray, *entities: Entity) -> SourceImage:
    jpeg = encode_jpeg(pixels)
    height, width = pixels.shape[:2]
    return SourceImage(ImageRecord(uid=uid_of(jpeg), width=width, height=height, entities=entities), jpeg)


def entity(phrase: str, mask: np.ndarray, label: str = "") -> Entity:
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    return Entity(phrase=phrase, label=label, box=(x, y, x + w, y + h), mask=encode_rle(mask))


def disc(size: tuple[int, int], x: int, y: int, radius: int) -> np.ndarray:
    return cv2.circle(np.zeros(size, np.uint8), (x, y), radius, 1, -1).astype(bool)


@cache
def ball_in_the_sky() -> SourceImage:
    """The evening sky of a photograph with a photographed dahlia cut out into it: an even ground, and a clear thing."""
    sky = cv2.resize(skimage.data.rocket()[10:210, 120:300], (384, 320), interpolation=cv2.INTER_CUBIC)
    flower = cv2.resize(load_sample_image("flower.jpg")[84:360, 168:446], (96, 96), interpolation=cv2.INTER_AREA)
    mask = disc((320, 384), 150, 160, 42)
    pixels = sky.copy()
    pixels[112:208, 102:198] = np.where(mask[112:208, 102:198, None], flower, pixels[112:208, 102:198])
    return source(pixels, entity("the orange dahlia", mask, "flower"))


@cache
def two_flowers() -> SourceImage:
    pixels = load_sample_image("flower.jpg")[60:410, 100:520]
    size = pixels.shape[:2]
    return source(
        np.ascontiguousarray(pixels),
        entity("the dahlia", disc(size, 206, 163, 128), "flower"),
        Entity(phrase="the leaf", label="leaf", box=(10, 10, 40, 60)),
    )


BUILDER = EditPairs(EditPairsParams())


def build(name: str, image: SourceImage, seed: int = 0, builder: EditPairs = BUILDER) -> list[Sample] | Rejected:
    return builder.build(image, name, generator(seed, f"{image.record.uid}/{name}", builder.name))


@cache
def made(name: str) -> list[list[Sample]]:
    """Up to two outcomes of an operation on the photographs."""
    tries = (build(name, image, seed) for seed in range(12) for image in (ball_in_the_sky(), two_flowers()))
    return list(islice((outcome for outcome in tries if not isinstance(outcome, Rejected)), 2))


# --- parameters and attempts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"operations": ["recolour"]}, "did you mean 'recolor'"),
        ({"operations": {"remove": 0}}, "greater than 0"),
        ({"area": (0.5, 0.1)}, "not a range inside"),
        ({"directions": []}, "at least 1"),
        ({"gates": {"leaks": 1}}, "Extra inputs"),
    ],
)
def test_wrong_parameters_name_the_culprit(params: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EditPairsParams(**params)


def test_objects_are_edited_only_where_there_are_some() -> None:
    builder = EditPairs(EditPairsParams(per_image=len(WEIGHTS)))
    bare = source(load_sample_image("china.jpg")[:200, :200])
    rng = np.random.default_rng(0)
    assert set(builder.attempts(bare.record, rng)) == {*TEXT_OPERATIONS, *PICTURE_OPERATIONS}
    assert set(builder.attempts(two_flowers().record, rng)) == set(WEIGHTS)


# --- samples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_operation_makes_complete_samples(name: str) -> None:
    outcomes = made(name)
    assert outcomes, "no pair was made"
    for samples in outcomes:
        assert [s.record.direction for s in samples] in (["forward"], ["forward", "inverse"])
        for sample in samples:
            record = sample.record
            assert list(sample.members) == list(STREAMS["edit"].members)
            source_size, target_size, mask_size = (decode_raw(m).shape[:2] for m in sample.images.values())
            assert source_size == target_size == mask_size
            assert record.edit_source_index == (0 if name in LOCAL else -1)
            assert len({record.instruction, *record.instruction_variants}) == 3
            assert record.ops[-1].name == f"edit_{name}"
            json.loads(record.scores)
    first = outcomes[0][0]
    assert len({s.record.key for samples in outcomes[:1] for s in samples}) == len(outcomes[0])
    assert first.record.real_input == (name != "text_replace")


def test_builds_are_deterministic() -> None:
    for name in ("remove", "recolor", "text_add"):
        runs = [build(name, ball_in_the_sky(), 3, EditPairs(EditPairsParams())) for _ in range(2)]
        assert not isinstance(runs[0], Rejected) and not isinstance(runs[1], Rejected)
        assert [s.members for s in runs[0]] == [s.members for s in runs[1]]


@pytest.mark.parametrize("name", LOCAL)
def test_blocks_free_of_the_mask_decode_identically(name: str) -> None:
    for samples in made(name):
        before, after = (decode_rgb(samples[0].images[m]) for m in ("input_1.jpg", "output.jpg"))
        mask = decode_raw(samples[0].images["edit_mask.png"]) > 0
        changed = blocks((before != after).any(axis=2))
        assert blocks(mask).any() and not blocks(mask).all()
        assert not (changed & ~blocks(mask)).any()
        assert samples[0].record.aligned


@pytest.mark.parametrize("name", LOCAL)
def test_the_mask_is_lossless_and_white_where_the_change_is(name: str) -> None:
    """X2Edit and UltraEdit store masks as JPEG, and ImgEdit reads its own masks inverted."""
    for samples in made(name):
        data = samples[0].images["edit_mask.png"]
        assert data.startswith(b"\x89PNG")
        mask = decode_raw(data)
        assert set(np.unique(mask)) == {0, 255}
        before, after = (decode_rgb(samples[0].images[m]) for m in ("input_1.jpg", "output.jpg"))
        difference = cv2.absdiff(before, after).max(axis=2)
        assert difference[mask == 255].mean() > 5 and difference[mask == 0].mean() < 0.5
        assert samples[0].record.edit_area_ratio == pytest.approx((mask == 255).mean(), abs=1e-6)


def test_an_inverse_swaps_the_same_two_pictures() -> None:
    for name in ("remove", "text_add", "attribute"):
        forward, inverse = next(samples for samples in made(name) if len(samples) == 2)
        assert inverse.images["input_1.jpg"] == forward.images["output.jpg"]
        assert inverse.images["output.jpg"] == forward.images["input_1.jpg"]
        assert inverse.images["edit_mask.png"] == forward.images["edit_mask.png"]
        assert (forward.record.real_input, forward.record.real_output) == (True, False)
        assert (inverse.record.real_input, inverse.record.real_output) == (False, True)
    assert made("remove")[0][1].record.subtask == "add"


def test_only_one_direction_if_only_one_is_asked() -> None:
    builder = EditPairs(EditPairsParams(directions=("inverse",)))
    outcome = build("remove", ball_in_the_sky(), 0, builder)
    assert not isinstance(outcome, Rejected)
    assert [s.record.subtask for s in outcome] == ["add"] and outcome[0].record.real_output


def test_a_removed_thing_leaves_nothing_behind() -> None:
    samples = made("remove")[0]
    mask = disc((320, 384), 150, 160, 40)
    after = decode_rgb(samples[0].images["output.jpg"])
    assert dominant_colour(ball_in_the_sky().pixels[mask])[0] == "orange"
    assert "orange" not in {dominant_colour(after[mask])[0]}
    around = disc((320, 384), 150, 160, 70) & ~disc((320, 384), 150, 160, 55)
    assert np.abs(after[mask].mean(axis=0) - after[around].mean(axis=0)).max() < 6


def test_recolouring_keeps_lightness_and_names_what_is_there() -> None:
    sample = made("recolor")[0][0]
    colour = json.loads(sample.record.ops[-1].params)["colour"]
    mask = disc(two_flowers().pixels.shape[:2], 206, 163, 100)
    image = two_flowers() if sample.record.parents[0] == two_flowers().record.uid else ball_in_the_sky()
    if image is ball_in_the_sky():
        mask = disc((320, 384), 150, 160, 34)
    before, after = image.pixels[mask], decode_rgb(sample.images["output.jpg"])[mask]
    assert dominant_colour(after)[0] == colour and dominant_colour(before)[0] != colour
    assert colour in sample.record.instruction
    assert np.abs(to_lab(before)[:, 0] - to_lab(after)[:, 0]).mean() < 3


def test_composed_edits_share_no_block_and_name_both() -> None:
    for samples in made(COMPOSE):
        params = json.loads(samples[0].record.ops[-1].params)
        assert set(params) >= {"first", "second"}
        assert params["first"] != params["second"]


def test_four_equal_edits_are_all_masked() -> None:
    """UniWorld's mask drops every region below 30 % of the change: of four equal ones, all."""
    pixels = ball_in_the_sky().pixels
    masks = [disc(pixels.shape[:2], x, y, 20) for x in (80, 300) for y in (70, 250)]
    from builders.edit_pairs.builder import merge
    from builders.edit_pairs.edit import Edit, Wording, paste

    edits = []
    for mask in masks:
        edited, where = paste(pixels, 255 - pixels, mask.astype(np.float32))
        edits.append(Edit(edited, where, Wording("remove")))
    merged = merge(edits)
    assert cv2.connectedComponents(merged.mask.astype(np.uint8))[0] == 5
    np.testing.assert_array_equal(merged.mask, np.logical_or.reduce(masks))
    assert ((merged.pixels != pixels).any(axis=2) == merged.mask).all()


# --- rejects -------------------------------------------------------------------------------------------------------


def test_rejects_keep_all_their_scores() -> None:
    strict = EditPairs(EditPairsParams(gates={"change": 254.0}))
    outcome = build("recolor", two_flowers(), 0, strict)
    assert isinstance(outcome, Rejected) and outcome.reason == "no_op"
    detail = json.loads(outcome.detail)
    assert {"operation", "psnr_outside", "ssim_outside", "shift_px", "l1_inside", "leak", "colour_after"} <= set(detail)
    assert outcome.value == detail["l1_inside"]


def test_a_thing_before_structure_is_not_removed() -> None:
    china = np.ascontiguousarray(load_sample_image("china.jpg"))
    image = source(china, entity("the pagoda", disc(china.shape[:2], 215, 240, 60), "pagoda"))
    outcome = build("remove", image)
    assert isinstance(outcome, Rejected) and outcome.reason == "structured_surroundings" and outcome.value > 6


def test_small_pictures_are_rejected() -> None:
    outcome = build("text_add", source(load_sample_image("china.jpg")[:100, :200]))
    assert isinstance(outcome, Rejected) and (outcome.reason, outcome.value) == ("too_small", 100)


def test_a_name_that_an_instruction_cannot_hold_is_not_used() -> None:
    image = ball_in_the_sky()
    thing = image.record.entities[0].model_copy(update={"phrase": "<|image_1|>", "label": ""})
    outcome = build("remove", source(image.pixels, thing))
    assert isinstance(outcome, Rejected) and outcome.reason == "no_suitable_thing"


# --- names, places and colours -------------------------------------------------------------------------------------


def _names(*entities: Entity) -> set[str]:
    image = source(np.full((200, 300, 3), 128, np.uint8), *entities)
    return {thing.name for thing in iter_things(image, MaskFinder(None), np.random.default_rng(0))}


def test_things_of_one_label_are_told_apart_by_where_they_are() -> None:
    size = (200, 300)
    left, right = disc(size, 60, 100, 30), disc(size, 240, 100, 30)
    assert _names(entity("cup", left), entity("cup", right)) == {"left cup", "right cup"}
    upper, lower = disc(size, 150, 40, 30), disc(size, 150, 150, 30)
    assert _names(entity("cup", upper), entity("cup", lower)) == {"upper cup", "lower cup"}
    assert _names(entity("cup", left), entity("cup", left)) == set()


def test_a_word_for_a_place_in_a_phrase_is_verified() -> None:
    """Mirrored data sets say "left" of what is on the right."""
    size = (200, 300)
    left, right = disc(size, 60, 100, 30), disc(size, 240, 100, 30)
    true = (entity("the cup on the left", left, "cup"), entity("the cup on the right", right, "cup"))
    assert _names(*true) == {"cup on the left", "cup on the right"}
    swapped = (entity("the cup on the right", left, "cup"), entity("the cup on the left", right, "cup"))
    assert _names(*swapped) == set()


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [(30, 30, "at the top left"), (270, 100, "on the right"), (150, 180, "at the bottom"), (150, 100, "in the middle")],
)
def test_places_in_words(x: int, y: int, words: str) -> None:
    mask = disc((200, 300), x, y, 15)
    text, claims = place_of(mask)
    assert text == words
    nothing = np.zeros((200, 300, 3), np.uint8)
    assert all(not claim.check(nothing, nothing).fault for claim in claims)
    mirrored = [type(c)(c.region[:, ::-1], c.word) for c in claims if "left" in c.word or "right" in c.word]
    assert all(claim.check(nothing, nothing).fault == "wrong_place" for claim in mirrored)


@pytest.mark.parametrize(
    ("name", "text"),
    [("red cup", "a red cup"), ("orange", "an orange"), ("two bowls", "two bowls"), ("glass", "a glass"),
     ("flowers", "flowers"), ("row of books", "a row of books")],
)  # fmt: skip
def test_articles(name: str, text: str) -> None:
    assert with_article(name) == text


@pytest.mark.parametrize(
    ("rgb", "name"),
    [((200, 30, 30), "red"), ((30, 60, 190), "blue"), ((40, 140, 60), "green"), ((240, 220, 60), "yellow"),
     ((245, 245, 245), "white"), ((15, 15, 15), "black"), ((128, 128, 128), "grey"), ((110, 70, 40), "brown"),
     ((240, 150, 180), "pink"), ((120, 60, 160), "purple"), ((220, 205, 175), "beige"), ((235, 130, 40), "orange")],
)  # fmt: skip
def test_colours_are_named_as_people_name_them(rgb: tuple[int, int, int], name: str) -> None:
    assert dominant_colour(np.array([rgb], np.uint8)) == (name, 1.0)


@pytest.mark.parametrize("colour", PAINTS)
def test_paint_bears_its_name_over_its_range_of_lightness(colour: str) -> None:
    low, high = PAINTS[colour].lightness
    light = np.linspace(low, high, 20)
    grey = np.repeat(np.rint(light * 2.55).astype(np.uint8)[:, None], 3, axis=1)
    painted = paint(grey, colour)
    assert (name_pixels(painted) == name_pixels(painted)[0]).mean() > 0.8
    assert dominant_colour(painted)[0] == colour


@pytest.mark.parametrize("colour", BACKDROPS)
def test_backdrops_bear_their_names(colour: str) -> None:
    name, share = dominant_colour(backdrop((60, 90), colour, np.random.default_rng(0)).reshape(-1, 3))
    assert name == colour and share > 0.7


def test_what_people_say_about_a_colour_counts_unless_the_pixels_contradict() -> None:
    grey = np.full((10, 3), 150, np.uint8)
    assert nameable_colour(grey, "white mug") == "white"
    assert nameable_colour(grey, "red mug") == ""
    assert nameable_colour(grey, "mug") == ""
    assert nameable_colour(np.tile(np.uint8([[30, 60, 190]]), (10, 1)), "mug") == "blue"


# --- instructions --------------------------------------------------------------------------------------------------

TEMPLATES = load_templates("edit_pairs")
FIELDS = {
    "thing": "the left cup", "place": "at the top left", "colour": "blue", "direction": "left", "text": "OPEN",
    "new": "CLOSED", "ink": "white", "material": "gold", "look": "at night",
}  # fmt: skip
ENTRIES = [name for name in TEMPLATES if not name.startswith("frames")]


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_many_and_distinct(name: str) -> None:
    texts = TEMPLATES[name]
    assert len({re.sub(r"\W", "", text).lower() for text in texts}) == len(texts) >= 10
    for text in texts:
        fields = [field for _, field, _, _ in string.Formatter().parse(text) if field]
        assert set(fields) <= {*FIELDS, "image", "clause", "Clause", "second"}
        assert not re.search(r"\s\s|\.\.|[.?!,:;][A-Za-z]", text), text


@pytest.mark.parametrize("name", ENTRIES)
def test_every_instruction_is_whole(name: str) -> None:
    texts = all_instructions(name, FIELDS)
    assert len(texts) >= 10
    for text in texts:
        assert lint_instruction(text, 1) == [], text
        assert text[-1] in ".?" and text.count("<img>") == 1, text
        assert text[0].isupper() or text.startswith("<img>"), text


def test_parts_of_a_composition_have_clauses() -> None:
    for name in PARTS:
        entries = [e for e in ENTRIES if e == name or e.startswith(f"{name}_")]
        assert all("{image}" not in text for entry in entries for text in TEMPLATES[entry][:10])
