"""Both directions of condition maps, from one photo to finished samples."""

import json
import re
from functools import cache

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image
from pydantic import ValidationError

from builders.annotators.annotator import Artefact
from builders.annotators.maps import Palette
from builders.annotators.normals import encode_normals, normals_from_depth
from builders.base import Rejected, SourceImage
from builders.colours import COLOURS
from builders.condition_maps import (
    ANNOTATED_MAPS,
    ENTITY_MAPS,
    KINDS,
    MAPS,
    TARGET_ONLY,
    WEIGHT_FREE_MAPS,
    ConditionMaps,
    ConditionMapsParams,
)
from builders.templates import load_templates
from schemas.codec import decode_raw, decode_rgb, encode_jpeg, encode_png
from schemas.identity import generator, uid_of
from schemas.instructions import lint_instruction, placeholder
from schemas.masks import encode_rle
from schemas.records import Captions, Entity, ImageRecord, Op
from schemas.vocabulary import STREAMS

CUP = np.zeros((401, 599), bool)
CUP[20:300, 180:410] = True
SPOON = np.zeros((401, 599), bool)
SPOON[205:325, 330:415] = True
ENTITIES = (
    Entity(phrase="a cup of coffee", label="cup", box=(180, 20, 410, 300), mask=encode_rle(CUP)),
    Entity(phrase="a spoon", label="spoon", box=(330, 205, 415, 325), mask=encode_rle(SPOON)),
)
CAPTIONS = Captions(short="The image shows a cup of espresso", long="A cup of espresso stands on a saucer.")
LEGEND = "red for dog, blue for traffic light and green for cup"
WORDS = {
    "caption": "A dog runs past. It is late.",
    "legend": LEGEND,
    "columns": "16",
    "rows": "9",
    "thing": "brown dog",
    "target": "every brown dog",
    "pronoun": "them",
    "colour": "translucent blue",
    "method": "PiDiNet",
    "conditions": f"the depth map {placeholder(1)} and the boxes {placeholder(2)} ({LEGEND})",
}
# The strings that OmniGen's paper, data and demo use, with its placeholder written {image}.
OFFICIAL = {
    "canny_control": "The canny edge of the generated picture should look like the one below: {image}",
    "depth_control_captioned": "{caption} Depth map: {image}",
    "depth_perceive": "Generate the depth map for this image: {image}",
    "segmentation_control_captioned": "{caption} The Segmentation map of image is: {image} ({legend})",
    "referring_perceive": "Find {thing} in the picture {image} and color {pronoun} {colour}.",
    "referring_outline_perceive": "{image} Find {target} in the photo and outline {pronoun} in {colour}.",
    "lineart_control_captioned": (
        "Generate a new photo using the following picture and text as conditions: {image}\n {caption}"
    ),
}


@cache
def artefacts():
    """What the annotators of the maps store, for `source`."""
    pixels = np.pad(skimage.data.coffee(), ((0, 1), (0, 0), (0, 0)), mode="edge")[:, :599]
    drawing = encode_png(cv2.Canny(pixels, 100, 200))
    ids = np.zeros((401, 599), np.uint8)
    ids[200:], ids[CUP], ids[SPOON] = 1, 7, 3
    segments = [{"id": i, "label": label, "class_id": i} for i, label in ((1, "table"), (3, "spoon"), (7, "cup"))]
    ends = cv2.createLineSegmentDetector().detect(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0].reshape(-1, 4)
    person = [[20.0 + 29 * i, 40.0 + 300 * (i % 2), 0.9] for i in range(18)]
    normals = encode_normals(normals_from_depth(decode_raw(depth_png()), 55, 2))

    def artefact(name, members=None, params="{}", **data):
        op = Op(name=f"annotate:{name}", version="1", model=f"org/{name}", revision="a" * 40, params=params)
        return Artefact({**data, "op": op.model_dump(mode="json")}, members or {})

    drawings = {name: artefact(name, {f"{name}.png": drawing}) for name in ("lineart_realistic", "lineart_anime")}
    return drawings | {
        "edges": artefact("edges", {"edges.png": drawing}, '{"detector": "pidinet"}'),
        "mlsd": artefact("mlsd", lines=ends.tolist()),
        "normal": artefact("normal", {"normal.png": encode_png(normals)}),
        "semantic": artefact("semantic", {"semantic.png": encode_png(ids)}, segments=segments),
        "pose": artefact("pose", people=[{"keypoints": person}]),
    }


@cache
def source(captions=CAPTIONS, entities=ENTITIES, depth_png=b""):
    pixels = np.pad(skimage.data.coffee(), ((0, 1), (0, 0), (0, 0)), mode="edge")[:, :599]
    jpeg = encode_jpeg(pixels)
    record = ImageRecord(uid=uid_of(jpeg), width=599, height=401, captions=captions, entities=entities, license="CC0")
    return SourceImage(record, jpeg, depth_png, artefacts())


@cache
def depth_png():
    ramp = np.linspace(2000, 60000, 599) + 1500 * np.sin(np.arange(401) / 20)[:, None]  # one plane has one normal
    return encode_png(ramp.astype(np.uint16))


def build(name, image=None, seed=0, **params):
    image = image or source(depth_png=depth_png())
    return ConditionMaps(ConditionMapsParams(**params)).build(image, name, generator(seed, name, "condition_maps"))


@pytest.mark.parametrize("name", MAPS)
def test_samples_fit_their_streams(name):
    image = source(depth_png=depth_png())
    samples = build(name, image)
    assert [s.record.stream for s in samples] == (["perceive"] if name in TARGET_ONLY else ["control", "perceive"])
    for sample in samples:
        assert tuple(sample.images) == STREAMS[sample.record.stream].image_members
        assert sample.record.subtask == name
        assert sample.record.parents == (image.record.uid,)
        assert sample.record.license == "CC0"


@pytest.mark.parametrize("name", MAPS)
def test_photos_pass_through_and_maps_are_lossless(name):
    """Regression: maps and masks stored as JPEG gave wrong scores in ControlNet++ and soft masks in X2Edit."""
    image = source(depth_png=depth_png())
    samples = {s.record.stream: s for s in build(name, image)}
    perceive = samples["perceive"]
    assert perceive.images["input_1.jpg"] == image.jpeg
    png = perceive.images["output.png"]
    assert png.startswith(b"\x89PNG")
    assert decode_raw(png).shape[:2] == image.pixels.shape[:2]
    assert encode_png(decode_raw(png)) == png
    if "control" in samples:
        assert samples["control"].images == {"input_1.png": png, "output.jpg": image.jpeg}


def test_flags_tell_what_is_real():
    control, perceive = (s.record for s in build("canny"))
    assert (control.direction, control.real_input, control.real_output) == ("forward", False, True)
    assert (control.input_roles, control.output_kind) == (("condition:canny",), "photo")
    assert (perceive.direction, perceive.real_input, perceive.real_output) == ("inverse", True, False)
    assert (perceive.input_roles, perceive.output_kind) == (("photo",), "map:canny")
    assert control.edit_source_index == perceive.edit_source_index == -1


def test_provenance_gives_the_map_again():
    sample = build("palette")[1]
    op = sample.record.ops[-1]
    assert op.name == "map:palette" and op.version.startswith("opencv ")
    again = Palette().render(source().pixels, json.loads(op.params)).image
    np.testing.assert_array_equal(decode_rgb(sample.images["output.png"]), again)


@pytest.mark.parametrize("name", MAPS)
def test_builds_are_deterministic(name):
    first, second, other = build(name, seed=1), build(name, seed=1), build(name, seed=2)
    assert [s.members for s in first] == [s.members for s in second]
    assert [s.record.instruction for s in first] != [s.record.instruction for s in other]


@pytest.mark.parametrize("name", MAPS)
def test_every_direction_has_ten_clean_templates(name):
    """Regression: missing commas merged prompts in VisualCloze; a merged one would hold two placeholders."""
    templates = load_templates("condition_maps")
    wanted = ["perceive"] if name in TARGET_ONLY else ["perceive", "control", "control_captioned"]
    for direction in wanted:
        texts = templates[f"{name}_{direction}"]
        assert len(set(texts)) == len(texts) >= 10
        for text in texts:
            assert text.count("{image}") == 1
            filled = text.format(image=placeholder(1), **WORDS)
            assert lint_instruction(filled, 1) == []
            assert not re.search(r"[{}]|  |\.\.|\s[.,:;?]", filled), filled
            assert ("{caption}" in text) == direction.endswith("captioned")
            assert ("{legend}" in text) == (name in ("boxes", "segmentation", "semantic"))
            assert ("{method}" in text) == (name == "edges")
            assert ("{colour}" in text) == (name in TARGET_ONLY)
    assert {key for key in templates if key.rsplit("_control")[0].rsplit("_perceive")[0] == name} == {
        f"{name}_{direction}" for direction in wanted
    }


def test_official_prompts_are_among_the_templates():
    templates = load_templates("condition_maps")
    for name, text in OFFICIAL.items():
        assert text in templates[name]


def test_a_caption_is_used_where_there_is_one():
    control = build("canny")[0].record
    assert re.search(r"espresso( stands on a saucer)?\.", control.instruction)
    assert "image shows" not in control.instruction
    assert "_captioned" in control.template_id
    for captions in (Captions(), Captions(short="I'm sorry, I cannot help"), Captions(alt="see <|image_1|> here")):
        bare = build("canny", source(captions))[0].record
        assert bare.template_id.startswith("condition_maps/canny_control/")


@pytest.mark.parametrize("name", ["boxes", "segmentation", "semantic"])
def test_the_instruction_names_the_colours_of_the_map(name):
    for seed in range(5):
        for sample in build(name, seed=seed):
            png = next(data for member, data in sample.images.items() if member.endswith("png"))
            painted = {colour for _, colour in Image.fromarray(decode_rgb(png)).getcolors()}
            named = re.findall(r"(\w+) for (?:cup|spoon|table)", sample.record.instruction)
            assert len(named) == (3 if name == "semantic" else 2)
            assert painted == {(0, 0, 0), *(COLOURS[colour] for colour in named)}


def test_refusals_are_passed_on():
    blank = encode_jpeg(np.full((64, 64, 3), 200, np.uint8))
    image = SourceImage(ImageRecord(uid=uid_of(blank), width=64, height=64), blank)
    assert build("canny", image) == Rejected("contrast_too_low", 0.0)
    assert build("depth", source()) == Rejected("no_depth")


def test_attempts_are_maps_that_the_record_allows():
    builder = ConditionMaps(ConditionMapsParams(per_image=20))
    everything = builder.attempts(source().record, np.random.default_rng(0))
    assert sorted(everything) == sorted({*WEIGHT_FREE_MAPS, *ENTITY_MAPS})
    without_entities = builder.attempts(source(entities=()).record, np.random.default_rng(0))
    assert not set(without_entities) & set(ENTITY_MAPS)


def test_attempts_follow_the_weights():
    builder = ConditionMaps(ConditionMapsParams(maps={"canny": 3, "lines": 1}, per_image=1))
    drawn = [builder.attempts(source().record, np.random.default_rng(seed)) for seed in range(400)]
    assert 0.68 < sum(names == ["canny"] for names in drawn) / 400 < 0.82
    only = ConditionMaps(ConditionMapsParams(maps=["referring"], directions=["control"]))
    assert only.attempts(source().record, np.random.default_rng(0)) == []


TOGETHER = ["canny+depth", "palette+normal+pose", "semantic+edges+palette", "boxes+luminance"]


@pytest.mark.parametrize("attempt", TOGETHER)
def test_several_maps_go_into_one_sample(attempt):
    names = attempt.split("+")
    image = source(depth_png=depth_png())
    (sample,) = build(attempt, image, seed=3)
    record = sample.record
    assert record.stream == f"control_{len(names)}" and record.subtask == "together"
    assert tuple(sample.images) == STREAMS[record.stream].image_members
    assert sample.images["output.jpg"] == image.jpeg
    assert record.input_roles == tuple(f"condition:{name}" for name in names)
    assert [op.name for op in record.ops] == [f"map:{name}" for name in names]
    nouns = load_templates("condition_nouns")
    for i, name in enumerate(names, start=1):
        before = record.instruction.partition(placeholder(i))[0]
        assert any(before.endswith(noun.partition("{image}")[0].format(**WORDS)) for noun in nouns[name])
    for text in (record.instruction, *record.instruction_variants):
        assert lint_instruction(text, len(names)) == []
    assert build(attempt, image, seed=3)[0].members == sample.members


def test_together_templates_are_clean():
    templates = load_templates("condition_maps")
    for name in ("together_control", "together_control_captioned"):
        assert len(set(templates[name])) == len(templates[name]) >= 10
        for text in templates[name]:
            assert text.count("{conditions}") == 1 and "{image" not in text
            assert ("{caption}" in text) == name.endswith("captioned")
            filled = text.format(**WORDS)
            assert lint_instruction(filled, 2) == []
            assert not re.search(r"[{}]|  |\.\.|\s[.,:;?]", filled), filled
    nouns = load_templates("condition_nouns")
    assert set(nouns) == set(MAPS) - set(TARGET_ONLY)
    for name, phrases in nouns.items():
        assert len(set(phrases)) == len(phrases) >= 3
        assert all(noun.count("{image}") == 1 for noun in phrases)
        assert all(("{legend}" in noun) == (name in ("boxes", "segmentation", "semantic")) for noun in phrases)


def test_a_refused_map_refuses_the_sample_and_is_named():
    assert build("canny+depth", source()) == Rejected("no_depth", detail="depth")


def test_maps_of_one_sample_differ_in_kind():
    maps = [name for name in MAPS if name not in TARGET_ONLY]
    builder = ConditionMaps(ConditionMapsParams(maps=maps, per_image=1, together=[2, 3]))
    for seed in range(50):
        _, two, three = builder.attempts(source().record, np.random.default_rng(seed))
        for attempt, count in ((two, 2), (three, 3)):
            names = attempt.split("+")
            assert len({KINDS.get(name, name) for name in names}) == len(names) == count


def test_maps_from_artefacts_name_their_model():
    image = source(depth_png=depth_png())
    for name in ANNOTATED_MAPS:
        op = build(name, image)[0].record.ops[-1]
        assert (op.name, op.model, op.revision) == (f"map:{name}", f"org/{name}", "a" * 40)
        assert "annotator" in json.loads(op.params)


def test_annotators_that_a_recipe_needs():
    maps = ["canny", "depth", "normal", "pose", "edges"]
    assert ConditionMaps(ConditionMapsParams(maps=maps)).required_annotators() == {"pose", "edges"}
    assert ConditionMaps(ConditionMapsParams()).required_annotators() == frozenset()


@pytest.mark.parametrize("name", sorted(ANNOTATED_MAPS))
def test_without_its_artefact_there_is_no_map(name):
    bare = SourceImage(source().record, source().jpeg)
    assert build(name, bare) == Rejected(f"no_{name}")


def test_directions_can_be_chosen():
    assert [s.record.stream for s in build("lines", directions=["perceive"])] == ["perceive"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"maps": ["canny", "sobel"]}, "unknown condition map 'sobel'; known are canny"),
        ({"maps": {"canny": 0}}, "greater than 0"),
        ({"maps": []}, "at least 1"),
        ({"map": ["canny"]}, "Extra inputs"),
        ({"together": [4]}, "Input should be 2 or 3"),
        ({"together": [2, 2]}, "can be given once"),
        ({"maps": ["canny", "lines", "luminance"], "together": [2]}, "at most 1 differ in kind"),
        ({"together": [2], "directions": ["perceive"]}, "not among the directions"),
    ],
)
def test_wrong_recipes_are_named(params, message):
    with pytest.raises(ValidationError, match=message):
        ConditionMapsParams(**params)
