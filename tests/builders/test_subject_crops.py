"""subject_crops: what its samples say and hold, over a small corpus and for pairs of photographs."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from functools import cache

import cv2
import numpy as np
import pytest
import torch
from diffusers.pipelines.omnigen.processor_omnigen import OmniGenMultiModalProcessor
from pydantic import ValidationError
from transformers import AutoTokenizer

from builders.base import Outcome, Rejected, Sample, SourceImage
from builders.subject_crops import SubjectCrops, SubjectCropsParams
from builders.subject_crops.forms import CROP
from builders.subject_crops.sentences import VARIANTS
from builders.subject_crops.words import mentions_looks
from builders.templates import load_templates
from fine_tune.tiny import TOKENIZER_DIR
from schemas.codec import decode_rgb, encode_jpeg
from schemas.identity import generator
from schemas.instructions import lint_instruction
from schemas.records import Entity, Pair
from schemas.vocabulary import STREAMS
from tests.builders.subject_images import demo_image, demo_images, disc, entity, number_of, paired, picture

PHOTOS = (
    *("astronaut.png", "coffee.png", "flower.jpg", "grace_hopper.jpg", "faust_github.jpg", "kittens-4020199_640.jpg"),
    *("atomium-4179270_640.jpg", "pexels-36236147.jpg"),
    *("pexels-7303800.jpg", "pexels-7303992.jpg"),
)
JUGS = ("pexels-7303773.jpg", "pexels-7303842.jpg")
# Smaller than a recipe's: so are the photographs.
ACCEPT = {"min_side": 48, "area": (0.01, 0.6)}
SEEDS = range(2)


def builder(**params: object) -> SubjectCrops:
    return SubjectCrops(SubjectCropsParams(**{"accept": ACCEPT, "segment_boxes": False, **params}))


def build(image: SourceImage, attempt: str, seed: int = 0, **params: object) -> Outcome:
    made = builder(**params)
    return made.build(image, attempt, generator(seed, f"{image.record.uid}/{attempt}", made.name))


@cache
def corpus() -> tuple[tuple[SourceImage, Sample], ...]:
    """Every sample of all streams, with two seeds, and of pairs of photographs that show the same jug."""
    images = [*demo_images(PHOTOS), *(paired(*map(demo_image, names), "jug") for names in (JUGS, JUGS[::-1]))]
    samples = []
    made = builder(per_image={"subject_1": 4, "subject_2": 2, "subject_3": 2, "extract": 4})
    for image in images:
        for seed in SEEDS:
            for attempt in made.attempts(image.record, generator(seed, image.record.uid, made.name)):
                outcome = made.build(image, attempt, generator(seed, f"{image.record.uid}/{attempt}", made.name))
                samples += [] if isinstance(outcome, Rejected) else [(image, sample) for sample in outcome]
    return tuple(samples)


def references(sample: Sample) -> list[dict]:
    return json.loads(sample.record.references)


BALL = entity(disc(100, 100, 45))


# --- parameters and attempts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"forms": ["cut_out"]}, "did you mean 'cutout'"),
        ({"forms": ["crop", "photo"]}, "at most half"),
        ({"per_image": {"subject_4": 1}}, "subject_1"),
        ({"per_image": {"subject_1": 0}}, "greater than 0"),
        ({"accept": {"area": (0.5, 0.1)}}, "not a range inside"),
        ({"accept": {"persons": "some"}}, "'licensed', 'all' or 'none'"),
        ({"accept": {"max_border": 1}}, "Extra inputs"),
    ],
)
def test_wrong_parameters_name_the_culprit(params: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SubjectCropsParams(**params)


def test_attempts_are_what_the_record_allows() -> None:
    rng = np.random.default_rng(0)
    box_only = Entity(phrase="a cup", box=(10, 10, 90, 90))
    made = builder(per_image={"subject_1": 3, "subject_2": 1, "subject_3": 1, "extract": 3})
    assert made.attempts(picture().record, rng) == []
    assert made.attempts(picture(BALL).record, rng) == ["subject_1-0", "extract-0"]
    two = made.attempts(picture(box_only, BALL).record, rng)
    assert two == ["subject_1-1", "subject_1-0", "subject_2-0", "extract-1"]  # things with masks come first
    jug = paired(*map(demo_image, JUGS), "jug").record
    assert "pair-0" in made.attempts(jug, rng)
    assert "pair-0" not in builder(pairs=False).attempts(jug, rng)


# --- samples -------------------------------------------------------------------------------------------------------


def test_all_streams_and_forms_are_made() -> None:
    samples = [sample for _, sample in corpus()]
    assert {s.record.stream for s in samples} == {"subject_1", "subject_2", "subject_3", "extract"}
    forms = Counter(r["form"] for s in samples for r in references(s))
    assert set(forms) == {"crop", "augmented", "cutout", "scene", "group", "photo"}
    keys = Counter((sample.record.key, sample.record.instruction) for sample in samples)
    assert max(keys.values()) <= len(SEEDS)


def test_samples_are_complete_and_their_target_is_the_photograph() -> None:
    for image, sample in corpus():
        record, stream = sample.record, STREAMS[sample.record.stream]
        assert tuple(sample.members) == stream.members
        for text in (record.instruction, *record.instruction_variants):
            assert lint_instruction(text, len(stream.inputs)) == []
            assert "{" not in text and "  " not in text
            assert text[0] in string.ascii_uppercase + '<"'
        photograph = "input_1.jpg" if record.stream == "extract" else "output.jpg"
        assert sample.images[photograph] == image.jpeg
        assert record.real_output == (record.stream != "extract")
        assert all(min(decode_rgb(jpeg).shape[:2]) >= 16 for jpeg in sample.images.values())
        assert len(references(sample)) == (0 if record.stream == "extract" else len(stream.inputs))


def test_the_official_processor_takes_the_instructions() -> None:
    """OmniGen/processor.py asserts on the ids in the prompt and on the number of images."""
    processor = OmniGenMultiModalProcessor(AutoTokenizer.from_pretrained(TOKENIZER_DIR))
    for _, sample in corpus()[::7]:
        inputs = len(STREAMS[sample.record.stream].inputs)
        for text in (sample.record.instruction, *sample.record.instruction_variants):
            made = processor.process_multi_modal_prompt(text, [torch.zeros(3, 16, 16)] * inputs)
            assert len(made["pixel_values"]) >= inputs


def test_at_most_half_of_the_in_image_references_are_the_identical_crop() -> None:
    """IP-Adapter and GRIT train on crops of the target alone, and learn to paste them."""
    shares = []
    for _, sample in corpus():
        own = [r for r in references(sample) if r["pair"] == "in"]
        assert sum(r["form"] == CROP for r in own) <= len(own) / 2
        shares += [r["form"] == CROP for r in own]
    assert 0 < np.mean(shares) <= 0.5


def test_references_say_what_was_done() -> None:
    for image, sample in corpus():
        for number, reference in enumerate(references(sample), start=1):
            assert set(reference) == {
                *("phrase", "label", "form", "box", "area", "scene_id", "uid", "pair", "similarity", "evidence"),
                "augmentations",
            }
            assert reference["uid"] in sample.record.parents
            assert (reference["uid"] == image.record.uid) == (reference["pair"] == "in")
            pixels = decode_rgb(sample.images[f"input_{number}.jpg"])
            x0, y0, x1, y1 = reference["box"]
            if reference["form"] == CROP:
                assert reference["augmentations"] == {} and pixels.shape[0] >= y1 - y0 and pixels.shape[1] >= x1 - x0
            if reference["form"] == "augmented":
                assert {"flip", "rotate"} & reference["augmentations"].keys()
            if reference["form"] in ("cutout", "scene"):
                assert reference["augmentations"]["background"]


def test_an_identical_crop_is_found_in_the_target_and_a_changed_one_is_not() -> None:
    best: dict[str, list[float]] = {CROP: [], "augmented": []}
    for image, sample in corpus():
        for number, reference in enumerate(references(sample), start=1):
            if reference["pair"] == "in" and reference["form"] in best:
                crop = decode_rgb(sample.images[f"input_{number}.jpg"])
                if crop.shape[0] <= image.pixels.shape[0] and crop.shape[1] <= image.pixels.shape[1]:
                    scores = cv2.matchTemplate(image.pixels, crop, cv2.TM_SQDIFF) / crop.size
                    best[reference["form"]].append(float(scores.min()))
    assert max(best[CROP]) < 10  # JPEG
    assert np.mean(np.array(best["augmented"]) > 50) > 0.95


def test_references_are_numbered_in_another_order_than_they_are_named() -> None:
    ordered = [re.findall(r"image_(\d)", s.record.instruction) for _, s in corpus() if s.record.stream == "subject_2"]
    assert ["1", "2"] in ordered and ["2", "1"] in ordered


def test_what_an_extract_asks_for_is_unambiguous() -> None:
    kittens = demo_image("kittens-4020199_640.jpg")
    outcomes = [build(kittens, f"extract-{i}", seed) for i in (0, 2) for seed in range(3)]
    said = [o[0].record.instruction for o in outcomes if not isinstance(o, Rejected)]
    assert said and all(re.search(r"ginger kitten on the (left|right)", text) for text in said)


def test_builds_are_deterministic() -> None:
    image = demo_image("flower.jpg")
    for attempt in ("subject_1-0", "extract-0"):
        one, other = build(image, attempt), build(image, attempt)
        assert not isinstance(one, Rejected) and [s.members for s in one] == [s.members for s in other]


def test_half_of_the_instructions_withhold() -> None:
    firsts = []
    for _, sample in corpus():
        if sample.record.stream == "extract":
            continue
        texts = (sample.record.instruction, *sample.record.instruction_variants)
        assert len(texts) == len(set(texts)) == VARIANTS + 1
        withheld = json.loads(sample.record.ops[-1].params)["withheld"]
        firsts.append(withheld)
        for text in texts[not withheld :: 2]:
            assert not any(
                mentions_looks(name) for name in re.findall(r"the ([\w' -]+?) (?:in|from|shown) ?[^ ]*<img>", text)
            )
    assert 0.4 < np.mean(firsts) < 0.6


def test_the_reference_alone_tells_the_colour() -> None:
    image, number = demo_image("coffee.png"), number_of(demo_image("coffee.png"), "cup")
    said: dict[bool, set[bool]] = {True: set(), False: set()}
    for seed in range(20):
        outcome = build(image, f"subject_1-{number}", seed)
        if not isinstance(outcome, Rejected):
            record = outcome[0].record
            said[json.loads(record.ops[-1].params)["withheld"]].add("red cup" in record.instruction.lower())
    assert said[True] == {False} and True in said[False]


def test_what_stands_before_a_thing_keeps_it_from_being_extracted() -> None:
    plate, cup = disc(100, 100, 60), disc(100, 60, 25)
    outcome = build(picture(entity(plate & ~cup, "the plate", "plate"), entity(cup, "the cup", "cup")), "extract-0")
    assert isinstance(outcome, Rejected) and outcome.reason == "covered"
    assert json.loads(outcome.detail) == {"thing": "the plate"}


# --- two photographs -----------------------------------------------------------------------------------------------


def test_a_pair_takes_its_reference_from_the_other_photograph() -> None:
    target, other = map(demo_image, JUGS)
    forms = set()
    for seed in range(12):
        outcome = build(paired(target, other, "jug"), "pair-0", seed)
        assert not isinstance(outcome, Rejected)
        (sample,) = outcome
        (reference,) = references(sample)
        forms.add(reference["form"])
        assert reference["uid"] == other.record.uid and reference["pair"] == "cross"
        assert (reference["similarity"], reference["evidence"]) == (0.8, "features")
        assert sample.record.parents == (target.record.uid, other.record.uid)
        assert sample.record.subtask == "cross_image" and sample.images["output.jpg"] == target.jpeg
        if reference["form"] == "photo":
            assert sample.images["input_1.jpg"] == other.jpeg
    assert "photo" in forms and len(forms) > 1


def _changed(image: SourceImage, **fields: object) -> SourceImage:
    return SourceImage(image.record.model_copy(update=fields), image.jpeg)


def test_rights_are_those_of_both_photographs() -> None:
    target, other = map(demo_image, JUGS)
    unlike = _changed(other, license="CC-BY-4.0", author="B", optout=True)
    outcome = build(paired(_changed(target, license="CC0-1.0", author="A"), unlike, "jug"), "pair-0")
    assert not isinstance(outcome, Rejected)
    record = outcome[0].record
    assert (record.license, record.author, record.optout) == ("CC-BY-4.0 AND CC0-1.0", "A; B", True)


def test_photographs_of_two_splits_or_the_same_one_make_no_pair() -> None:
    target, other = map(demo_image, JUGS)
    refused = build(paired(target, _changed(other, split="val"), "jug"), "pair-0")
    assert isinstance(refused, Rejected) and refused.reason == "other_split"
    again = SourceImage(target.record.model_copy(update={"uid": "f" * 64}), encode_jpeg(target.pixels))
    refused = build(paired(target, again, "jug"), "pair-0")
    assert isinstance(refused, Rejected) and refused.reason == "copy"
    unlicensed = build(paired(_changed(target, license=""), other, "jug"), "pair-0")
    assert not isinstance(unlicensed, Rejected)  # a jug is no person


def test_a_whole_photograph_is_a_reference_too() -> None:
    """A folder of photographs of one subject: nothing is located, the entity is the photograph."""
    target, other = (
        _changed(
            image,
            entities=(
                Entity(phrase="red cartoon", label="cartoon", box=(0, 0, image.record.width, image.record.height)),
            ),
        )
        for image in map(demo_image, JUGS)
    )
    outcome = build(paired(target, other, "cartoon"), "pair-0")
    assert not isinstance(outcome, Rejected)
    assert references(outcome[0])[0]["form"] == "photo"
    refused = build(target, "subject_1-0")
    assert isinstance(refused, Rejected) and refused.reason == "area"


def test_a_pair_that_does_not_fit_is_an_error_that_names_it() -> None:
    image = paired(*map(demo_image, JUGS), "jug")
    with pytest.raises(ValueError, match="which was not read with it"):
        build(SourceImage(image.record, image.jpeg), "pair-0")
    pair = image.record.pairs[0].model_copy(update={"other_entity": 99})
    with pytest.raises(ValueError, match="names entity 99"):
        build(
            SourceImage(image.record.model_copy(update={"pairs": (pair,)}), image.jpeg, others=image.others), "pair-0"
        )


def test_several_subjects_prefer_the_other_photograph() -> None:
    target, other = demo_image("pexels-7303800.jpg"), demo_image("pexels-7303782.jpg")
    outcomes = [build(paired(target, other, "chair"), "subject_2-0", seed) for seed in range(4)]
    pairs = [{r["pair"] for r in references(o[0])} for o in outcomes if not isinstance(o, Rejected)]
    assert {"in", "cross"} in pairs


# --- templates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", load_templates("subject_crops"))
def test_templates(name: str) -> None:
    templates = load_templates("subject_crops")[name]
    assert len(set(templates)) == len(templates) >= 10
    for text in templates:
        fields = {field for _, field, _, _ in string.Formatter().parse(text) if field}
        if name == "extract":
            assert fields == {"thing", "image", "background"}
        elif name == "replaced":
            assert fields == {"caption"}
        else:
            assert fields & {"subjects", "Subjects", "definitions"} and ("caption" in fields) == name.startswith("cap")


def test_pairs_of_a_record_survive_its_json() -> None:
    pair = Pair(entity=0, other="a", other_entity=1, evidence="judge")
    assert Pair.model_validate_json(pair.model_dump_json()) == pair
