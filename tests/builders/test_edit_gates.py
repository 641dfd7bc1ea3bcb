"""The gates find planted faults on a pair that is right, and pass the pair itself."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import cv2
import numpy as np
import pytest
import skimage.data
from hypothesis import given
from hypothesis import strategies as st

from builders.edit_pairs.claims import Coloured, Mirrored, Moved, Placed, Seamless, Shifted, Visible
from builders.edit_pairs.colour import paint
from builders.edit_pairs.edit import fade_in, grow, matte, paste, shrink
from builders.edit_pairs.gates import EditGates, blocks, judge, leak
from schemas.codec import decode_rgb, encode_jpeg

SIZE = (300, 420)


@cache
def photograph() -> np.ndarray:
    return cv2.resize(skimage.data.coffee(), SIZE[::-1], interpolation=cv2.INTER_AREA)


@cache
def cup() -> np.ndarray:
    return cv2.ellipse(np.zeros(SIZE, np.uint8), (196, 115), (68, 75), 0, 0, 360, 1, -1).astype(bool)


@cache
def pair() -> tuple[np.ndarray, np.ndarray, np.ndarray, Coloured]:
    """The cup of the photograph in green, decoded, with its mask and its claim."""
    painted = photograph().copy()
    painted[cup()] = paint(photograph()[cup()], "green")
    target, mask = paste(photograph(), painted, matte(cup()))
    both = [decode_rgb(encode_jpeg(image)) for image in (photograph(), target)]
    return both[0], both[1], mask, Coloured(cup(), "green")


def fault_of(source: np.ndarray, target: np.ndarray, mask: np.ndarray, *claims: object) -> str:
    rejected = judge(source, target, mask, claims).rejected  # type: ignore[arg-type]
    return rejected.reason if rejected else ""


def test_the_true_pair_passes() -> None:
    source, target, mask, claim = pair()
    verdict = judge(source, target, mask, [claim])
    assert verdict.rejected is None
    assert verdict.scores["leak"] == 0 and verdict.scores["colour_after"] > 0.5 > verdict.scores["colour_before"]


def test_planted_faults_are_found() -> None:
    source, target, mask, claim = pair()
    assert fault_of(source, source, mask, claim) == "no_op"
    assert fault_of(source, target, mask, replace(claim, colour="blue")) == "wrong_colour"
    assert fault_of(target, source, mask, claim) == "wrong_colour"
    half = np.where((np.arange(SIZE[1]) < 196)[None, :, None], target, source)
    assert fault_of(source, half, mask, claim) in ("no_op", "wrong_colour")
    drift = np.where(mask[..., None], target, np.clip(target.astype(int) + 3, 0, 255)).astype(np.uint8)
    assert fault_of(source, drift, mask, claim) == "leak"
    assert fault_of(source, target[:-8], mask, claim) == "size_change"


@pytest.mark.parametrize("pixels", [1, 2, 3])
def test_a_shifted_target_is_misaligned(pixels: int) -> None:
    source, target, mask, claim = pair()
    assert fault_of(source, np.roll(target, pixels, axis=1), mask, claim) in ("misaligned", "leak")


@given(st.integers(0, SIZE[0] - 1), st.integers(0, SIZE[1] - 1), st.sampled_from([1, 5, 100]))
def test_one_changed_pixel_outside_is_a_leak_unless_its_block_has_mask(y: int, x: int, by: int) -> None:
    source, _, mask, _ = pair()
    target = source.copy()
    target[y, x, 0] ^= by
    free = ~blocks(mask)
    expected = 1 / free.sum() if free[y // 8, x // 8] else 0.0
    assert leak(source, target, mask) == pytest.approx(expected)


def test_the_opposite_polarity_of_a_mask_is_a_leak() -> None:
    source, target, mask, claim = pair()
    assert fault_of(source, target, ~mask, claim) != ""
    assert leak(source, target, ~mask) > 0.5


def test_gates_can_be_loosened() -> None:
    source, target, mask, claim = pair()
    noisy = target.copy()
    noisy[0, 0] ^= 1
    assert judge(source, noisy, mask, [claim]).rejected is not None
    assert judge(source, noisy, mask, [claim], EditGates(leak=0.01)).rejected is None


# --- claims that are not part of the pair above -------------------------------------------------------------------


@cache
def ground() -> np.ndarray:
    """The evening sky of a photograph."""
    return cv2.resize(skimage.data.rocket()[10:150, 120:300], SIZE[::-1], interpolation=cv2.INTER_CUBIC)


def with_cup(dx: int = 0, flip: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The cup in the sky, at an offset, and its mask."""
    solid = shrink(cup(), 3)
    mask, cut = solid, photograph()
    if flip:
        mask, cut = mask[:, ::-1], cut[:, ::-1]
    matrix = np.array([[1.0, 0, dx], [0, 1, 0]])
    alpha = cv2.warpAffine(mask.astype(np.float32), matrix, SIZE[::-1])
    pasted, _ = paste(ground(), cv2.warpAffine(np.ascontiguousarray(cut), matrix, SIZE[::-1]), alpha)
    return pasted, alpha > 0.5


def test_a_removed_thing_must_have_been_there_and_must_be_gone_entirely() -> None:
    there, mask = with_cup()
    claim = Visible(mask, in_target=False)
    assert not claim.check(there, ground()).fault
    assert claim.check(ground(), there).fault == "not_visible"
    half = np.where((np.arange(SIZE[1]) < 196)[None, :, None], ground(), there)
    finding = claim.check(there, half)
    assert finding.fault == "still_there" and 0.3 < finding.scores["outline_left"] < 0.7
    assert not Visible(mask, in_target=True).check(ground(), there).fault


def test_a_visible_rim_of_a_filled_hole_is_found() -> None:
    _, mask = with_cup()
    hole = grow(mask, 5)
    patch, _ = paste(ground(), np.clip(ground().astype(int) + 25, 0, 255).astype(np.uint8), fade_in(hole))
    assert not Seamless(hole).check(ground(), ground()).fault
    assert Seamless(hole).check(ground(), patch).fault == "visible_seam"


@pytest.mark.parametrize(("dx", "word", "wrong"), [(-90, "left", "right"), (90, "right", "left")])
def test_the_direction_of_a_move_is_measured(dx: int, word: str, wrong: str) -> None:
    before, mask = with_cup()
    after, _ = with_cup(dx)
    assert not Moved(mask, word).check(before, after).fault
    assert Moved(mask, wrong).check(before, after).fault == "wrong_direction"
    assert Moved(mask, word).check(before, before).fault == "wrong_direction"


def test_a_mirror_image_is_told_from_the_original() -> None:
    image = photograph()
    everywhere = np.ones(SIZE, bool)
    assert not Mirrored(everywhere).check(image, np.ascontiguousarray(image[:, ::-1])).fault
    assert Mirrored(everywhere).check(image, image).fault == "not_mirrored"
    assert Mirrored(everywhere).check(image, np.ascontiguousarray(image[::-1])).fault == "not_mirrored"


def test_lighter_is_not_darker() -> None:
    image = photograph()
    brighter = np.clip(image * 1.4 + 10, 0, 255).astype(np.uint8)
    claim = Shifted(cup(), "lightness", 1, 5.0)
    assert not claim.check(image, brighter).fault
    assert claim.check(brighter, image).fault == "wrong_lightness"


def test_left_is_not_right_among_others_either() -> None:
    left, right = np.zeros((2, *SIZE), bool)
    left[100:150, 40:90] = right[100:150, 300:350] = True
    for mask, others in ((left, ()), (left, (right,))):
        assert not Placed(mask, "left", others).check(photograph(), photograph()).fault
        assert Placed(mask, "right", others).check(photograph(), photograph()).fault == "wrong_place"
