"""Weight-free condition maps on real photographs."""

import json
import random
from functools import cache

import cv2
import numpy as np
import pytest
import skimage.data
import sklearn.datasets
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from builders.annotators.layouts import Boxes, Referring, ReferringOutline, Segmentation, bare_name
from builders.annotators.maps import Canny, ConditionMap, Depth, Lineart, Lines, Luminance, Palette
from builders.base import Rejected
from builders.colours import COLOURS, draw_colours
from schemas.masks import encode_rle
from schemas.records import Entity

PHOTO_DETECTORS = [Canny(), Lineart(), Lines(), Luminance(), Palette()]
BLACK = (0, 0, 0)


@cache
def photo(name):
    china, flower = sklearn.datasets.load_sample_images().images
    pixels = {"china": china, "flower": flower}.get(name)
    return getattr(skimage.data, name)() if pixels is None else pixels


def rng(seed=0):
    return np.random.default_rng(seed)


def f1(found, expected):
    found, expected = found > 0, expected > 0
    return 2 * (found & expected).sum() / (found.sum() + expected.sum())


def colours_of(image):
    return {colour for _, colour in Image.fromarray(image).getcolors()}


def ellipse(height, width, centre, axes):
    canvas = np.zeros((height, width), np.uint8)
    cv2.ellipse(canvas, centre, axes, 0, 0, 360, 1, -1)
    return canvas.astype(bool)


def entity(phrase, mask, label=""):
    ys, xs = np.nonzero(mask)
    box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
    return Entity(phrase=phrase, label=label, box=box, mask=encode_rle(mask))


HEAD = ellipse(512, 512, (220, 90), (75, 85))
SUIT = ellipse(512, 512, (200, 380), (150, 130))
PATCH = ellipse(512, 512, (170, 400), (40, 40))  # lies on the suit
WOMAN = [entity("the head", HEAD), entity("a space suit", SUIT, "suit"), entity("a round patch", PATCH, "patch")]


@settings(max_examples=15, deadline=None)
@given(data=st.data(), detector=st.sampled_from(PHOTO_DETECTORS))
def test_map_has_exactly_the_size_of_the_photo(data, detector):
    whole = photo(data.draw(st.sampled_from(["astronaut", "chelsea", "coffee", "china"])))
    height, width = data.draw(st.tuples(st.integers(9, whole.shape[0]), st.integers(9, whole.shape[1])))
    pixels = whole[:height, :width]
    found = detector.render(pixels, detector.draw(rng(height)))
    assert found.image.dtype == np.uint8
    assert found.image.shape[:2] == (height, width)


@pytest.mark.parametrize("detector", PHOTO_DETECTORS, ids=lambda d: d.name)
def test_stored_parameters_give_the_map_again(detector):
    pixels = photo("coffee")[:, :401]
    found = detector(pixels, rng(4))
    assert isinstance(found, ConditionMap)
    again = detector.render(pixels, json.loads(json.dumps(found.params)))
    np.testing.assert_array_equal(again.image, found.image)


def test_one_render_does_not_change_the_next():
    """Regression: controlnet_aux's Processor writes a caller's parameters into a table that all processors share."""
    pixels, usual = photo("coffee"), {"low_threshold": 100, "high_threshold": 200}
    before = Canny().render(pixels, usual).image
    Canny().render(pixels, {"low_threshold": 10, "high_threshold": 20})
    np.testing.assert_array_equal(Canny().render(pixels, usual).image, before)
    assert usual == {"low_threshold": 100, "high_threshold": 200}


@pytest.mark.parametrize("detector", [Canny(), Lineart(), Lines(), Palette()], ids=lambda d: d.name)
def test_parameters_vary(detector):
    assert len({json.dumps(detector.draw(rng(seed))) for seed in range(20)}) >= 4


def test_maps_leave_the_global_generators_alone():
    def states():
        return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()  # noqa: NPY002

    before = states()
    for detector in PHOTO_DETECTORS:
        detector(photo("astronaut"), rng())
    assert states() == before


def test_canny_is_opencv_canny():
    pixels = photo("astronaut")  # 512 x 512: nothing to pad
    found = Canny().render(pixels, {"low_threshold": 100, "high_threshold": 200}).image
    np.testing.assert_array_equal(found, cv2.Canny(pixels, 100, 200))


@pytest.mark.parametrize("size", [(427, 640), (301, 333), (129, 65), (63, 200)])
def test_canny_of_odd_sizes_is_aligned_to_the_pixel(size):
    pixels = np.ascontiguousarray(photo("china")[-size[0] :, : size[1]])
    found = Canny().render(pixels, {"low_threshold": 80, "high_threshold": 160}).image
    expected = cv2.Canny(pixels, 80, 160)
    assert f1(found, expected) >= 0.998
    np.testing.assert_array_equal(found[:-8, :-8], expected[:-8, :-8])  # only the padded border may differ


def test_controlnet_aux_alone_would_misalign():
    """Regression: it rounds both sides to multiples of 64, so its map has another size and another aspect."""
    import controlnet_aux

    pixels = photo("chelsea")  # 300 x 451
    careless = controlnet_aux.CannyDetector()(pixels, 100, 200)
    assert careless.shape[:2] == (512, 768)
    params = {"low_threshold": 100, "high_threshold": 200}
    resized = cv2.resize(careless[..., 0], (451, 300), interpolation=cv2.INTER_NEAREST)
    assert f1(resized, cv2.Canny(pixels, 100, 200)) < 0.6
    assert f1(Canny().render(pixels, params).image, cv2.Canny(pixels, 100, 200)) > 0.999


@pytest.mark.parametrize("size", [(427, 640), (301, 333), (100, 77)])
def test_lineart_is_aligned_to_the_pixel(size):
    pixels = np.ascontiguousarray(photo("china")[-size[0] :, : size[1]])
    found = Lineart().render(pixels, {"guassian_sigma": 6.0, "intensity_threshold": 8}).image
    darker = np.min(cv2.GaussianBlur(pixels.astype(np.float32), (0, 0), 6.0) - pixels, axis=2).clip(0)
    expected = (darker / max(16, np.median(darker[darker > 8])) * 127).clip(0, 255)
    gain = (found * expected).sum() / (expected * expected).sum()  # the median also sees the padding
    assert gain == pytest.approx(1, abs=0.1)
    assert np.abs(found - gain * expected).mean() < 1  # the map is cut to whole numbers
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999


def test_lines_are_white_on_black_and_lie_on_edges():
    found = Lines()(photo("china"), rng())
    assert isinstance(found, ConditionMap)
    assert set(np.unique(found.image)) == {0, 255}
    near_edges = cv2.dilate(cv2.Canny(photo("china"), 50, 100), np.ones((5, 5)))
    assert (near_edges[found.image > 0] > 0).mean() > 0.95


def test_luminance_is_bt601():
    pixels = photo("chelsea")
    np.testing.assert_allclose(Luminance()(pixels, rng()).image, pixels @ (0.299, 0.587, 0.114), atol=1)


def test_palette_blocks_are_the_mean_colours():
    pixels = photo("astronaut")
    found = Palette().render(pixels, {"cells": 16})
    blocks = found.image.reshape(16, 32, 16, 32, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    means = pixels.reshape(16, 32, 16, 32, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(blocks[:, 0, :, 0], means, atol=1)
    assert found.words == {"columns": "16", "rows": "16"}


def test_depth_is_white_where_the_scene_is_near():
    disparity = skimage.data.stereo_motorcycle()[2]
    raw = np.rint(np.where(np.isfinite(disparity), disparity, 0) * 256).astype(np.uint16)
    pixels = skimage.data.stereo_motorcycle()[0]
    found = Depth(raw)(pixels, rng())
    assert isinstance(found, ConditionMap)
    known = raw > 0
    near = known & (raw > np.median(raw[known]))
    assert found.image[near].mean() > found.image[known & ~near].mean() + 50
    assert (found.image[~known] == 0).all()
    assert Depth(None)(pixels, rng()) == Rejected("no_depth")
    flat = Depth(np.full(raw.shape, 4000, np.uint16))(pixels, rng())
    assert isinstance(flat, Rejected)


def test_a_map_of_another_size_is_an_error():
    with pytest.raises(ValueError, match=r"depth map is \(10, 10\), its photo \(300, 451\)"):
        Depth(np.arange(1, 101, dtype=np.uint16).reshape(10, 10))(photo("chelsea"), rng())


BLANK = np.full((200, 300, 3), 128, np.uint8)
NOISE = rng().integers(0, 256, (256, 256, 3)).astype(np.uint8)
CHECKERS = np.repeat(((np.indices((256, 256)) // 8).sum(0) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize(
    ("detector", "pixels", "reason"),
    [
        *((detector, BLANK, "contrast_too_low") for detector in PHOTO_DETECTORS),
        (Canny(), NOISE, "density_too_high"),
        (Lines(), NOISE, "contrast_too_low"),
        (Lines(), CHECKERS, "contrast_too_low"),
        (Lineart(), CHECKERS, "density_too_high"),
    ],
)
def test_gates_refuse_what_carries_no_information(detector, pixels, reason):
    refused = detector(pixels, rng())
    assert isinstance(refused, Rejected)
    assert refused.reason == reason


def test_canny_gate_compares_line_density_at_one_scale():
    """A smooth photo has few edge pixels; enlarging it thins them out but makes it no emptier."""
    params = {"low_threshold": 100, "high_threshold": 200}
    pixels = photo("astronaut")
    large = cv2.resize(pixels, (1024, 1024), interpolation=cv2.INTER_CUBIC)
    small_stats, large_stats = (Canny().render(p, params).stats for p in (pixels, large))
    assert large_stats["density"] < 0.75 * small_stats["density"]
    assert large_stats["density_at_512"] > 0.75 * small_stats["density_at_512"]


@pytest.mark.parametrize("kind", [Boxes, Segmentation])
def test_the_colours_of_a_layout_are_those_named(kind):
    found = kind(WOMAN)(photo("astronaut"), rng(1))
    assert isinstance(found, ConditionMap)
    legend = dict(found.params["legend"])
    assert set(legend) == {"head", "suit", "patch"}
    assert colours_of(found.image) == {BLACK, *(COLOURS[colour] for colour in legend.values())}
    assert all(f"{colour} for {name}" in found.words["legend"] for name, colour in legend.items())


def test_segmentation_paints_the_things_not_their_surroundings():
    found = Segmentation(WOMAN)(photo("astronaut"), rng(2))
    legend = {name: COLOURS[colour] for name, colour in found.params["legend"]}
    painted = {name: (found.image == colour).all(axis=-1) for name, colour in legend.items()}
    np.testing.assert_array_equal(painted["head"], HEAD)
    np.testing.assert_array_equal(painted["patch"], PATCH)  # the smaller one is on top
    np.testing.assert_array_equal(painted["suit"], SUIT & ~PATCH)


def test_boxes_are_hollow_rims_inside_the_boxes():
    found = Boxes(WOMAN[:1])(photo("astronaut"), rng())
    x0, y0, x1, y1 = (int(side) for side in WOMAN[0].box)
    drawn = found.image.any(axis=-1)
    assert drawn[y0, x0:x1].all() and drawn[y0:y1, x1 - 1].all()
    assert not drawn[y0 + 8 : y1 - 8, x0 + 8 : x1 - 8].any()
    drawn[y0:y1, x0:x1] = False
    assert not drawn.any()


def test_boxes_may_touch_or_cross_the_border():
    entities = [Entity(phrase="everything", box=(-3.0, -3.0, 600.4, 600.4)), Entity(phrase="dot", box=(0, 0, 6, 1))]
    found = Boxes(entities).render(photo("astronaut"), {"legend": [["everything", "red"], ["dot", "blue"]]})
    assert (found.image[0, 100] == COLOURS["red"]).all()
    assert found.words == {"legend": "red for everything"}  # six pixels cannot be seen, so they are not named


def test_a_hidden_name_is_not_named():
    hidden = entity("coin", ellipse(512, 512, (220, 90), (4, 4)))
    cover = Entity(phrase="hat", box=(219, 89, 221, 91), mask=encode_rle(HEAD))
    found = Segmentation([hidden, cover])(photo("astronaut"), rng())
    assert "coin" not in found.words["legend"]
    assert colours_of(found.image) == {BLACK, COLOURS[dict(found.params["legend"])["hat"]]}


def test_segmentation_is_never_half_a_segmentation():
    without_mask = Entity(phrase="another suit", label="suit", box=(0, 0, 50, 50))
    found = Segmentation([*WOMAN, without_mask])(photo("astronaut"), rng())
    assert "suit" not in dict(found.params["legend"])
    assert Segmentation([without_mask])(photo("astronaut"), rng()) == Rejected("no_masks")
    assert Boxes([])(photo("astronaut"), rng()) == Rejected("no_entities")


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_referring_paints_one_thing_and_nothing_else(alpha):
    pixels = photo("astronaut")
    found = Referring(WOMAN).render(pixels, {"phrase": "head", "colour": "blue", "alpha": alpha})
    expected = alpha * np.array(COLOURS["blue"]) + (1 - alpha) * pixels[HEAD]
    np.testing.assert_allclose(found.image[HEAD], expected, atol=0.5)
    np.testing.assert_array_equal(found.image[~HEAD], pixels[~HEAD])
    assert found.words["colour"] == ("blue" if alpha == 1 else "translucent blue")
    assert (found.words["target"], found.words["pronoun"]) == ("the head", "it")


def test_referring_paints_everything_that_the_phrase_means():
    small, brown = entity("dog", PATCH, "dog"), entity("a brown dog", HEAD, "")
    detector = Referring([small, brown])
    both = detector.render(photo("astronaut"), {"phrase": "dog", "colour": "red", "alpha": 1.0})
    assert both.words["target"] == "every dog" and both.words["pronoun"] == "them"
    np.testing.assert_array_equal((both.image == COLOURS["red"]).all(axis=-1), HEAD | PATCH)
    one = detector.render(photo("astronaut"), {"phrase": "brown dog", "colour": "red", "alpha": 1.0})
    np.testing.assert_array_equal((one.image == COLOURS["red"]).all(axis=-1), HEAD)


def test_referring_outline_is_the_rim_of_the_thing():
    found = ReferringOutline(WOMAN[:1]).render(photo("astronaut"), {"phrase": "head", "colour": "green", "alpha": 1.0})
    drawn = (found.image == COLOURS["green"]).all(axis=-1)
    assert drawn.any() and not (drawn & ~HEAD).any()
    assert not drawn[80:100, 200:240].any()  # the middle of the face
    inner = cv2.erode(HEAD.astype(np.uint8), np.ones((3, 3))).astype(bool)
    assert drawn[HEAD & ~inner].all()


def test_referring_refuses_paint_that_cannot_be_seen():
    snow = np.full((512, 512, 3), 250, np.uint8)
    snow[300:] = 90
    refused = [Referring(WOMAN[:1])(snow, rng(seed)) for seed in range(60)]
    assert "change_too_low" in {r.reason for r in refused if isinstance(r, Rejected)}
    assert "white" not in {r.params["colour"] for r in refused if isinstance(r, ConditionMap)}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("The traffic_light.", "traffic light"),
        ("an  apple", "apple"),
        ("antelope", "antelope"),
        ("<img><|image_2|></img>", ""),
        ("  ", ""),
    ],
)
def test_bare_names(text, name):
    assert bare_name(text) == name


def test_colours_are_told_apart():
    table = np.array(list(COLOURS.values()), dtype=float)
    distance = np.linalg.norm(table[:, None] - table[None], axis=-1)
    assert distance[~np.eye(len(table), dtype=bool)].min() > 90
    assert table.max(axis=1).min() > 100  # far from black, the background
    assert len(set(draw_colours(rng(), len(COLOURS)))) == len(COLOURS)
    with pytest.raises(ValueError, match="larger sample"):
        draw_colours(rng(), len(COLOURS) + 1)
