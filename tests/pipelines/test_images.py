import contextlib
import hashlib
import io
import struct
import subprocess
import sys
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile

from pipelines.images import (
    MAX_SIDE,
    BadImage,
    BadInput,
    Normalised,
    decode_mask_image,
    exif_orientation,
    normalise,
    transform_depth,
    transform_entity,
    transform_geometry,
)
from schemas.codec import decode_raw, decode_rgb, encode_jpeg, encode_png
from schemas.masks import decode_mask, encode_rle
from schemas.records import Entity
from tests.bad_images import PHOTOS, Case, cases, encode, icc_profile, jpeg, photo, rotated

BIG = 1 << 24
# ICC D50 XYZ of the primaries (columns red, green, blue), as published with Adobe RGB (1998) and sRGB.
ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def mean_difference(jpeg_bytes: bytes, expected: Image.Image) -> float:
    return float(np.abs(decode_rgb(jpeg_bytes).astype(int) - np.asarray(expected.convert("RGB"))).mean())


@pytest.mark.parametrize("case", cases().values(), ids=lambda case: case.name)
def test_every_kind_has_its_outcome(case: Case) -> None:
    if case.reason:
        with pytest.raises(BadImage) as caught:
            normalise(case.data, BIG, declared=case.extension)
        assert caught.value.reason == case.reason
        return
    result = normalise(case.data, BIG, declared=case.extension)
    assert result.changes == case.changes
    assert decode_rgb(result.data).shape == (result.height, result.width, 3)
    untouched = set(case.changes) <= {"mislabelled"}
    assert (result.data == case.data) == untouched
    assert normalise(result.data, BIG).changes == ()  # nothing is left to do


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_out_upright(orientation: int, kind: str) -> None:
    result = normalise(rotated(orientation, kind), BIG)
    assert (result.width, result.height) == (result.source_width, result.source_height) == (160, 112)
    assert mean_difference(result.data, photo()) < 2.5
    assert (f"orientation_{orientation}" in result.changes) == (orientation != 1)


@pytest.mark.parametrize("name", ["cmyk.jpg", "lab.tif", "rgb16.png", "plain.bmp", "plain.tif", "really_png.jpg"])
def test_colours_survive_conversion(name: str) -> None:
    assert mean_difference(normalise(cases()[name].data, BIG).data, photo()) < 2


@pytest.mark.parametrize("name", ["gray.jpg", "gray16.png"])
def test_gray_survives_conversion(name: str) -> None:
    assert mean_difference(normalise(cases()[name].data, BIG).data, photo().convert("L")) < 2


@pytest.mark.parametrize("name", ["alpha.png", "alpha.webp", "gray_alpha.png"])
def test_transparent_pixels_become_white(name: str) -> None:
    pixels = decode_rgb(normalise(cases()[name].data, BIG).data)
    assert pixels[:, :72].min() > 250
    assert pixels[:, 88:].mean() < 200


def test_transparent_palette_entries_become_white() -> None:
    image = photo().quantize(64)
    first = np.asarray(image) == 0
    pixels = decode_rgb(normalise(encode(image, "PNG", transparency=0), BIG).data)
    assert first.any()
    assert pixels[first].mean() > 225


def test_a_profile_is_converted_to_srgb_as_the_formulas_say() -> None:
    """Reference: linearise, Adobe RGB -> XYZ -> sRGB (IEC 61966-2-1), in floating point."""
    levels = np.array([40, 90, 140, 190])
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(8, 8, 3).astype(np.uint8)
    blocks = np.kron(colours, np.ones((16, 16, 1), np.uint8))
    gamma = 563 / 256
    linear = (colours / 255.0) ** gamma @ ADOBE_RGB.T @ np.linalg.inv(SRGB).T
    linear = linear.clip(0, 1)
    expected = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)

    data = encode(Image.fromarray(blocks), "PNG", icc_profile=icc_profile(gamma, ADOBE_RGB))
    result = normalise(data, BIG)
    assert result.changes == ("from_png", "icc_to_srgb")
    assert np.abs(decode_rgb(result.data)[8::16, 8::16] - expected).max() < 3


@pytest.mark.parametrize(
    "profile",
    [ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), Image.open(PHOTOS["cat"]).info["icc_profile"]],
    ids=["lcms", "embedded in a photograph"],
)
def test_an_srgb_profile_changes_nothing(profile: bytes) -> None:
    data = encode(photo(), "JPEG", icc_profile=profile)
    result = normalise(data, BIG)
    assert result.changes == ("metadata_removed",)
    assert np.array_equal(decode_rgb(result.data), decode_rgb(data))


def test_a_broken_or_foreign_profile_is_ignored_and_noted() -> None:
    cmyk_photo = encode(photo(), "JPEG", icc_profile=b"not a profile")
    gray_in_rgb = encode(photo().convert("L"), "PNG", icc_profile=icc_profile(2.2, ADOBE_RGB))
    for data, expected in ((cmyk_photo, photo()), (gray_in_rgb, photo().convert("L"))):
        result = normalise(data, BIG)
        assert "icc_ignored" in result.changes
        assert mean_difference(result.data, expected) < 4


def test_a_real_photograph_with_a_wide_profile_is_converted() -> None:
    data = PHOTOS["rocket"].read_bytes()
    result = normalise(data, BIG, declared="jpg")
    assert result.changes == ("icc_to_srgb",)
    assert 0 < mean_difference(result.data, Image.open(PHOTOS["rocket"])) < 10


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 40_000))
@example(1, 400, 3)
@example(400, 1, 1)
@settings(max_examples=40, deadline=None)
def test_the_cap_holds_and_the_aspect_stays(width: int, height: int, cap: int) -> None:
    result = normalise(encode(Image.new("RGB", (width, height), "teal"), "PNG"), cap)
    assert (result.source_width, result.source_height) == (width, height)
    assert result.width * result.height <= cap
    assert ("scaled" in result.changes) == (width * height > cap)
    if min(result.width, result.height) > 20:
        assert result.width / result.height == pytest.approx(width / height, rel=0.06)


def test_a_side_that_jpeg_cannot_hold_is_shortened() -> None:
    result = normalise(encode(Image.new("L", (1, 70_000)), "PNG"), BIG)
    assert (result.width, result.height) == (1, MAX_SIDE)


def test_scaling_keeps_the_picture() -> None:
    result = normalise(PHOTOS["china"].read_bytes(), 160 * 107)
    small = Image.open(PHOTOS["china"]).resize((result.width, result.height), Image.Resampling.BOX)
    assert result.changes == ("scaled",)
    assert mean_difference(result.data, small) < 8


@pytest.mark.parametrize("name", ["bomb.png", "bomb.jpg"])
def test_a_bomb_is_refused_by_its_header(name: str) -> None:
    tracemalloc.start()
    with pytest.raises(BadImage, match="60000x60000"):
        normalise(cases()[name].data, BIG)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_the_limit_on_source_pixels_is_exact() -> None:
    data = jpeg()
    assert normalise(data, BIG, max_source_pixels=160 * 112).data == data
    with pytest.raises(BadImage, match="too_many_pixels"):
        normalise(data, BIG, max_source_pixels=160 * 112 - 1)


@pytest.mark.parametrize("name", ["plain.jpg", "progressive.jpg", "palette_alpha.png", "alpha.webp", "plain.bmp"])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_file_cut_anywhere_is_never_taken_for_whole(name: str, data: st.DataObject) -> None:
    whole = cases()[name].data
    cut = whole[: data.draw(st.integers(0, len(whole) - 3))]
    try:
        result = normalise(cut, BIG)
    except BadImage as error:
        assert error.reason in ("truncated", "empty_file", "not_an_image")
    else:  # only the end mark was missing: every pixel is there
        assert np.array_equal(decode_rgb(result.data), decode_rgb(normalise(whole, BIG).data))


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(st.binary(max_size=300), st.sampled_from(["plain.jpg", "alpha.png", "plain.tif", "plain.gif", "alpha.webp"]))
@settings(max_examples=60, deadline=None)
def test_hostile_bytes_end_as_an_image_or_a_reason(noise: bytes, name: str) -> None:
    data = bytearray(cases()[name].data)
    start = len(noise) * 7 % 64
    data[start : start + len(noise)] = noise
    try:
        assert isinstance(normalise(bytes(data), BIG), Normalised)
    except BadImage as error:
        assert error.reason


def test_a_call_leaves_process_wide_state_alone() -> None:
    def state() -> tuple[object, ...]:
        return Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)

    before = state()
    for case in cases().values():
        with contextlib.suppress(BadImage):
            normalise(case.data, 9000)
    assert state() == before


def test_damaged_metadata_is_no_reason_to_warn_or_to_fail() -> None:
    """In a process of its own, with every warning an error: pytest resets the filters for each test."""
    damaged = encode(photo(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09" + bytes(20))
    code = "import sys; from pipelines.images import normalise; d = sys.stdin.buffer.read(); "
    code += "assert normalise(d, 1 << 20).changes == ('metadata_removed',)"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], check=False, input=damaged, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_threads_give_the_same_bytes() -> None:
    def digest(case: Case) -> str:
        try:
            return hashlib.sha256(normalise(case.data, 9000).data).hexdigest()
        except BadImage as error:
            return error.reason

    alone = [digest(case) for case in cases().values()]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(digest, [*cases().values()] * 3)) == alone * 3


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_is_read_in_both_byte_orders(order: str) -> None:
    mark = {"<": b"II", ">": b"MM"}[order]
    entry = struct.pack(f"{order}HHLHH", 0x0112, 3, 1, 6, 0)
    exif = mark + struct.pack(f"{order}HLH", 42, 8, 1) + entry
    assert exif_orientation(b"Exif\0\0" + exif) == exif_orientation(exif) == 6
    assert exif_orientation(exif[:-4]) == exif_orientation(b"") == 1


# Geometry


boxes = st.tuples(st.floats(0, 90), st.floats(0, 50), st.floats(1, 60), st.floats(1, 40)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
sizes = st.tuples(st.integers(30, 300), st.integers(30, 300))


@given(boxes, sizes)
@settings(deadline=None)
def test_a_box_follows_the_image_and_stays_inside(
    box: tuple[float, float, float, float], size: tuple[int, int]
) -> None:
    moved = transform_entity(Entity(phrase="x", box=box), (100, 60), size).box
    assert 0 <= moved[0] < moved[2] <= size[0]
    assert 0 <= moved[1] < moved[3] <= size[1]
    clipped = (box[0], box[1], min(box[2], 100), min(box[3], 60))
    back = [value * s for value, s in zip(moved, (100 / size[0], 60 / size[1]) * 2, strict=True)]
    assert back == pytest.approx(clipped, abs=1e-9)


def test_a_box_outside_of_the_image_is_refused() -> None:
    with pytest.raises(BadInput, match="bad_entities"):
        transform_entity(Entity(phrase="x", box=(120, 5, 140, 20)), (100, 60), (50, 30))


def test_a_mask_that_lies_on_its_side_is_refused() -> None:
    entity = Entity(phrase="x", box=(10, 10, 40, 40), mask=encode_rle(np.ones((100, 60), bool)))
    with pytest.raises(BadInput, match="another aspect"):
        transform_entity(entity, (100, 60), (50, 30))


def test_boxes_and_masks_land_on_the_same_thing_after_turning_and_scaling() -> None:
    """A red block on gray, stored in orientation 6: its box, run lengths and polygon must still cover it."""
    pixels = np.full((120, 200, 3), 128, np.uint8)
    pixels[30:60, 140:180] = (255, 0, 0)
    stored = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    result = normalise(encode(stored, "PNG", exif=exif), 100 * 60)
    box = (140.0, 30.0, 180.0, 60.0)
    entities = (
        Entity(phrase="by runs", box=box, mask=encode_rle(pixels[..., 1] == 0)),
        Entity(phrase="by polygon", box=box, mask=[[140, 30, 180, 30, 180, 60, 140, 60]]),
    )
    moved, depth = transform_geometry(entities, b"", result)
    assert depth == b""
    assert (result.width, result.height) == (100, 60)
    red = decode_rgb(result.data)[..., 1] < 64
    for entity in moved:
        assert entity.box == (70, 15, 90, 30)
        mask = decode_mask(entity.mask, result.height, result.width)
        assert (mask & red).sum() / (mask | red).sum() > 0.88  # a filled polygon includes its border pixels


def test_depth_is_rescaled_without_new_values() -> None:
    near = np.add.outer(np.arange(112), 3 * np.arange(160)).astype(np.uint16) * 100
    png = encode_png(near)
    assert transform_depth(png, (160, 112)) == png
    small = decode_raw(transform_depth(png, (80, 56)))
    assert small.dtype == np.uint16
    assert small.shape == (56, 80)
    assert set(np.unique(small)) <= set(np.unique(near))
    assert np.abs(small.astype(int) - near[::2, ::2]).max() <= 400  # the neighbour at most


@pytest.mark.parametrize(
    "png",
    [encode_png(np.zeros((112, 160), np.uint8)), encode_png(np.zeros((160, 112), np.uint16)), jpeg(), b"", b"text"],
    ids=["8 bits", "on its side", "a photograph", "empty", "no image"],
)
def test_depth_that_does_not_fit_is_refused(png: bytes) -> None:
    with pytest.raises(BadInput) as caught:
        transform_depth(png, (80, 56))
    assert caught.value.reason == "bad_depth"


def test_mask_images_are_read_in_any_mode() -> None:
    mask = np.zeros((20, 30), bool)
    mask[5:9, 3:20] = True
    bright = Image.fromarray(mask.astype(np.uint8) * 255)
    for image in (bright, bright.convert("1"), bright.convert("RGB"), bright.convert("P")):
        assert np.array_equal(decode_mask_image(encode(image, "PNG")), mask)


@pytest.mark.parametrize("name", ["palette.png", "gray.jpg", "plain.tif", "really_png.jpg"])
def test_maps_stay_lossless(name: str) -> None:
    data = cases()[name].data
    result = normalise(data, BIG, lossless=True)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert result.data.startswith(b"\x89PNG")
    assert np.array_equal(decode_rgb(result.data), expected)
    assert normalise(result.data, BIG, lossless=True).data == result.data


def test_encoded_pixels_are_those_of_the_codec() -> None:
    data = encode(photo(), "PNG")
    assert normalise(data, BIG).data == encode_jpeg(np.asarray(Image.open(io.BytesIO(data))))
