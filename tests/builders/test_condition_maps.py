"""Both directions of condition maps, from one photo to finished samples."""

import json
import re
from functools import cache

import numpy as np
import pytest
import skimage.data
from PIL import Image
from pydantic import ValidationError

from builders.annotators.maps import Palette
from builders.base import Rejected, SourceImage
from builders.colours import COLOURS
from builders.condition_maps import ENTITY_MAPS, MAPS, TARGET_ONLY, ConditionMaps, ConditionMapsParams
from builders.templates import load_templates
from schemas.codec import decode_raw, decode_rgb, encode_jpeg, encode_png
from schemas.identity import generator, uid_of
from schemas.instructions import lint_instruction, placeholder
from schemas.masks import encode_rle
from schemas.records import Captions, Entity, ImageRecord
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
def source(captions=CAPTIONS, entities=ENTITIES, depth_png=b""):
    pixels = np.pad(skimage.data.coffee(), ((0, 1), (0, 0), (0, 0)), mode="edge")[:, :599]
    jpeg = encode_jpeg(pixels)
    record = ImageRecord(uid=uid_of(jpeg), width=599, height=401, captions=captions, entities=entities, license="CC0")
    return SourceImage(record, jpeg, depth_png)


@cache
def depth_png():
    ramp = np.tile(np.linspace(100, 60000, 599).astype(np.uint16), (401, 1))
    return encode_png(ramp)


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
            assert ("{legend}" in text) == (name in ("boxes", "segmentation"))
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


@pytest.mark.parametrize("name", ["boxes", "segmentation"])
def test_the_instruction_names_the_colours_of_the_map(name):
    for seed in range(5):
        for sample in build(name, seed=seed):
            png = next(data for member, data in sample.images.items() if member.endswith("png"))
            painted = {colour for _, colour in Image.fromarray(decode_rgb(png)).getcolors()}
            named = re.findall(r"(\w+) for (?:cup|spoon)", sample.record.instruction)
            assert len(named) == 2
            assert painted == {(0, 0, 0), *(COLOURS[colour] for colour in named)}


def test_refusals_are_passed_on():
    blank = encode_jpeg(np.full((64, 64, 3), 200, np.uint8))
    image = SourceImage(ImageRecord(uid=uid_of(blank), width=64, height=64), blank)
    assert build("canny", image) == Rejected("contrast_too_low", 0.0)
    assert build("depth", source()) == Rejected("no_depth")


def test_attempts_are_maps_that_the_record_allows():
    builder = ConditionMaps(ConditionMapsParams(per_image=20))
    everything = builder.attempts(source().record, np.random.default_rng(0))
    assert sorted(everything) == sorted(set(MAPS) - {"depth"})
    without_entities = builder.attempts(source(entities=()).record, np.random.default_rng(0))
    assert not set(without_entities) & set(ENTITY_MAPS)


def test_attempts_follow_the_weights():
    builder = ConditionMaps(ConditionMapsParams(maps={"canny": 3, "lines": 1}, per_image=1))
    drawn = [builder.attempts(source().record, np.random.default_rng(seed)) for seed in range(400)]
    assert 0.68 < sum(names == ["canny"] for names in drawn) / 400 < 0.82
    only = ConditionMaps(ConditionMapsParams(maps=["referring"], directions=["control"]))
    assert only.attempts(source().record, np.random.default_rng(0)) == []


def test_directions_can_be_chosen():
    assert [s.record.stream for s in build("lines", directions=["perceive"])] == ["perceive"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"maps": ["canny", "sobel"]}, "unknown condition map 'sobel'; known are canny"),
        ({"maps": {"canny": 0}}, "greater than 0"),
        ({"maps": []}, "at least 1"),
        ({"map": ["canny"]}, "Extra inputs"),
    ],
)
def test_wrong_recipes_are_named(params, message):
    with pytest.raises(ValidationError, match=message):
        ConditionMapsParams(**params)
