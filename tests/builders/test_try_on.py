"""try_on: what is blank tells nothing of the garment, the rest is the photograph; and the way back."""

from __future__ import annotations

import json
import string

import cv2
import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from builders.annotators.annotator import Artefact
from builders.annotators.garments import HEAD, Garments
from builders.base import Outcome, Rejected, Sample, SourceImage
from builders.subject_crops.acceptance import box_of
from builders.templates import load_templates
from builders.try_on import TryOn, TryOnParams, blank, blank_region, border_contact, head_of, is_garment, wearer_of
from schemas.codec import decode_rgb, encode_mask
from schemas.identity import generator
from schemas.instructions import lint_instruction
from schemas.masks import decode_mask, encode_rle
from schemas.records import Entity
from schemas.vocabulary import STREAMS
from tests.builders.subject_images import demo_image, number_of

ASTRONAUT = demo_image("astronaut.png")
SUIT = number_of(ASTRONAUT, "space suit")
WOMAN = ASTRONAUT.record.entities[number_of(ASTRONAUT, "woman")]
SIZE = ASTRONAUT.pixels.shape[:2]
SUIT_MASK = decode_mask(ASTRONAUT.record.entities[SUIT].mask, *SIZE)


def attempt(name: str, image: SourceImage = ASTRONAUT, seed: int = 0, **params: object) -> Outcome:
    made = TryOn(TryOnParams(**params))
    return made.build(image, name, generator(seed, f"{image.record.uid}/{name}", made.name))


def build(name: str, seed: int = 0, **params: object) -> Sample:
    outcome = attempt(name, ASTRONAUT, seed, **params)
    assert not isinstance(outcome, Rejected), outcome
    (sample,) = outcome
    return sample


def with_entities(*entities: Entity, image: SourceImage = ASTRONAUT, **fields: object) -> SourceImage:
    return SourceImage(image.record.model_copy(update={"entities": entities, **fields}), image.jpeg)


def garment(mask: np.ndarray, label: str = "jacket") -> Entity:
    box = tuple(map(float, box_of(mask)))
    return Entity(phrase=f"the {label}", label=label, box=box, mask=encode_rle(mask))


def ellipse(x: int, y: int, w: int, h: int) -> np.ndarray:
    return cv2.ellipse(np.zeros(SIZE, np.uint8), ((x, y), (w, h), 0), 1, -1).astype(bool)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"fills": ["gray"]}, "did you mean 'grey'"),
        ({"per_image": {"on": 1}}, "'try_on' or 'try_off'"),
        ({"accept": {"fill": (0.9, 0.2)}}, "not a range inside"),
        ({"border": 2}, "less than or equal to 1"),
    ],
)
def test_wrong_parameters_name_the_culprit(params: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TryOnParams(**params)


def test_only_garments_with_a_mask_are_tried() -> None:
    made, rng = TryOn(TryOnParams()), np.random.default_rng(0)
    assert made.attempts(ASTRONAUT.record, rng) == [f"try_on-{SUIT}", f"try_off-{SUIT}"]
    assert made.attempts(demo_image("coffee.png").record, rng) == []
    bare = ASTRONAUT.record.entities[SUIT].model_copy(update={"mask": {}})
    assert made.attempts(with_entities(bare, WOMAN).record, rng) == []


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("space suit", True),
        ("T-shirt", True),
        ("red dress", True),
        ("suitcase", False),
        ("hatstand", False),
        ("", False),
    ],
)
def test_what_a_garment_is(label: str, expected: bool) -> None:
    assert is_garment(Entity(phrase=label or "thing", label=label, box=(0, 0, 1, 1))) is expected


@pytest.mark.parametrize("fill", ["grey", "smooth"])
def test_a_try_on_has_the_photograph_as_its_target(fill: str) -> None:
    sample = build(f"try_on-{SUIT}", fills=[fill])
    record = sample.record
    assert tuple(sample.members) == STREAMS["try_on"].members
    assert sample.images["output.jpg"] == ASTRONAUT.jpeg
    assert record.input_roles == ("person", "garment") and record.edit_source_index == 0 and record.aligned
    assert record.real_output and not record.real_input
    person, worn = json.loads(record.references)
    assert (person["form"], person["label"], person["augmentations"]) == ("agnostic", "woman", {"fill": fill})
    assert (worn["form"], worn["label"], worn["uid"]) == ("cutout", "space suit", ASTRONAUT.record.uid)
    for text in (record.instruction, *record.instruction_variants):
        assert lint_instruction(text, 2) == []


def test_a_try_off_is_the_way_back() -> None:
    sample = build(f"try_off-{SUIT}")
    record, pixels = sample.record, decode_rgb(sample.images["output.jpg"])
    assert (record.stream, record.subtask, record.direction, record.output_kind) == (
        *("extract", "garment", "inverse", "cutout"),
    )
    assert sample.images["input_1.jpg"] == ASTRONAUT.jpeg and not record.real_output
    assert np.median(pixels[:5].reshape(-1, 3), axis=0).min() > 250  # white, on which orange can be seen
    assert "space suit" in record.instruction or "garment" in record.instruction


@settings(max_examples=10)
@given(st.integers(0, 1000))
def test_the_blank_region_covers_the_garment_and_spares_the_head(seed: int) -> None:
    head = head_of(ASTRONAUT, SUIT_MASK, WOMAN)
    region = blank_region(SUIT_MASK, head, np.random.default_rng(seed))
    assert region[SUIT_MASK].all() and not region.all()
    assert (head & ~region).sum() > 0.85 * head.sum()
    face = np.zeros(SIZE, bool)
    face[round(0.17 * SIZE[0]) : round(0.3 * SIZE[0]), round(0.38 * SIZE[1]) : round(0.5 * SIZE[1])] = True
    assert not (region & face).any()


def _roughness(one: np.ndarray, other: np.ndarray) -> float:
    """Standard deviation, in pixels, of the distance of one mask's outline from that of the other."""
    signed = cv2.distanceTransform(one.astype(np.uint8), cv2.DIST_L2, 5)
    signed -= cv2.distanceTransform((~one).astype(np.uint8), cv2.DIST_L2, 5)
    outline = other & ~cv2.erode(other.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    return float(signed[outline].std())


@settings(max_examples=10)
@given(st.integers(0, 1000))
def test_the_outline_of_a_garment_does_not_leak(seed: int) -> None:
    """Two garments that differ by buttons, seams and pockets along their outline leave much the same blank."""
    smooth, rng = ellipse(190, 190, 150, 200), np.random.default_rng(seed)
    jagged = smooth.copy()
    outline = np.argwhere(smooth & ~cv2.erode(smooth.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool))
    for y, x in outline[rng.integers(len(outline), size=40)]:
        jagged[y - 3 : y + 4, x - 3 : x + 4] = rng.random() < 0.5
    one, other = (blank_region(m, np.zeros(SIZE, bool), np.random.default_rng(seed)) for m in (smooth, jagged))
    assert _roughness(one, other) < 0.6 * _roughness(smooth, jagged)


@pytest.mark.parametrize("fill", ["grey", "smooth"])
def test_what_is_blank_holds_nothing_of_the_garment(fill: str) -> None:
    """Whatever the garment looks like, the picture of the person is the same to the last pixel."""
    region = blank_region(SUIT_MASK, np.zeros(SIZE, bool), np.random.default_rng(0))
    repainted = ASTRONAUT.pixels.copy()
    repainted[region] = skimage.data.coffee()[: SIZE[0], : SIZE[1]][region]
    one, other = (blank(pixels, region, fill) for pixels in (ASTRONAUT.pixels, repainted))
    assert (one == other).all()
    assert (one[~region] == ASTRONAUT.pixels[~region]).all()


def test_the_annotator_knows_the_head_better() -> None:
    head = ellipse(190, 80, 60, 80)
    found = {Garments.name: Artefact({}, {HEAD: encode_mask(head)})}
    image = SourceImage(ASTRONAUT.record, ASTRONAUT.jpeg, artefacts=found)
    assert (head_of(image, SUIT_MASK, WOMAN) == head).all()
    nothing = SourceImage(ASTRONAUT.record, ASTRONAUT.jpeg, artefacts={Garments.name: Artefact()})
    assert (head_of(nothing, SUIT_MASK, WOMAN) == head_of(ASTRONAUT, SUIT_MASK, WOMAN)).all()


def test_clothes_on_a_chair_are_not_tried_on() -> None:
    sweater = demo_image("pexels-5386834.jpg")
    number = number_of(sweater, "sweater")
    outcome = attempt(f"try_on-{number}", sweater, accept={"min_side": 48})
    assert isinstance(outcome, Rejected) and outcome.reason == "not_worn"
    assert wearer_of(sweater.record, sweater.record.entities[number]) is None
    assert wearer_of(ASTRONAUT.record, ASTRONAUT.record.entities[SUIT]) == WOMAN


def test_refusals() -> None:
    def reason(image: SourceImage, **params: object) -> str:
        outcome = attempt("try_on-0", image, **params)
        return outcome.reason if isinstance(outcome, Rejected) else ""

    suit = ASTRONAUT.record.entities[SUIT]
    unlicensed = with_entities(suit, WOMAN, license="")
    assert reason(unlicensed) == "person_without_license"
    assert reason(unlicensed, accept={"persons": "all"}) == ""
    assert reason(with_entities(suit, WOMAN)) == ""
    assert reason(with_entities(suit)) == "not_worn"
    assert reason(with_entities(suit, WOMAN), border=0.05) == "cut_off"
    two = garment(ellipse(100, 200, 90, 120) | ellipse(280, 200, 90, 120))
    assert reason(with_entities(two, WOMAN)) == "split_mask"


def test_an_off_ambiguous_name_is_refused() -> None:
    suit = ASTRONAUT.record.entities[SUIT]
    outcome = attempt("try_off-0", with_entities(suit, WOMAN, suit.model_copy(update={"phrase": "the other suit"})))
    assert isinstance(outcome, Rejected) and outcome.reason == "ambiguous_name"


def test_contact_with_the_border() -> None:
    assert border_contact(ellipse(190, 190, 80, 80)) == 0
    half = np.zeros(SIZE, bool)
    half[SIZE[0] // 2 :] = True
    assert border_contact(half) == pytest.approx(1 - SIZE[1] / (2 * SIZE[1] + SIZE[0]), abs=0.02)


def test_builds_are_deterministic() -> None:
    assert build(f"try_on-{SUIT}").members == build(f"try_on-{SUIT}").members


@pytest.mark.parametrize("name", load_templates("try_on"))
def test_templates(name: str) -> None:
    templates = load_templates("try_on")[name]
    assert len(set(templates)) == len(templates) >= 10
    known = {
        "try_on": {"image_1", "image_2", "person", "garment"},
        "try_off": {"image", "person", "garment", "background"},
    }
    needed = {"try_on": {"image_1", "image_2"}, "try_off": {"image", "garment", "background"}}
    for text in templates:
        fields = {field for _, field, _, _ in string.Formatter().parse(text) if field}
        assert needed[name] <= fields <= known[name]
