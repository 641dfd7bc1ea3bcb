"""GrabCut from a box: right where a thing stands out in colour, refused where it does not, always the same."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import skimage.data
from sklearn.datasets import load_sample_image

from builders.annotators.grabcut import GrabCut, overlap, refine

FLOWER = np.ascontiguousarray(load_sample_image("flower.jpg"))
BOX = (168.0, 84.0, 446.0, 360.0)
OUTLINE = cv2.ellipse(np.zeros(FLOWER.shape[:2], np.uint8), (307, 222), (139, 138), 0, 0, 360, 1, -1).astype(bool)


def test_a_flower_is_cut_out_of_its_box() -> None:
    mask, confidence = GrabCut(0.85).segment(FLOWER, BOX)
    assert mask.dtype == bool and mask.shape == FLOWER.shape[:2]
    assert overlap(mask, OUTLINE) > 0.9
    assert 0.85 <= confidence <= 1


def test_it_is_deterministic_whatever_opencv_drew_before() -> None:
    first = GrabCut(0.85).segment(FLOWER, BOX)
    cv2.setRNGSeed(99)
    second = GrabCut(0.85).segment(FLOWER, BOX)
    np.testing.assert_array_equal(first[0], second[0])
    assert first[1] == second[1]


@pytest.mark.parametrize("box", [(150, 60, 300, 200), (0, 0, 60, 60), (10, 10, 12, 12), (-50, -50, -5, -5)])
def test_a_box_without_a_thing_of_its_own_is_refused(box: tuple[float, float, float, float]) -> None:
    mask, confidence = GrabCut().segment(skimage.data.gravel()[..., None].repeat(3, axis=2), box)
    assert confidence == 0 and not mask.any()


def test_a_rough_outline_moves_onto_the_edge() -> None:
    rough = cv2.ellipse(np.zeros(FLOWER.shape[:2], np.uint8), (307, 222), (143, 142), 0, 0, 360, 1, -1).astype(bool)
    inside_out = overlap(refine(FLOWER, rough), OUTLINE), overlap(rough, OUTLINE)
    assert inside_out[0] > inside_out[1]


@pytest.mark.parametrize("mask", [np.zeros((427, 640), bool), np.ones((427, 640), bool)])
def test_nothing_to_refine(mask: np.ndarray) -> None:
    np.testing.assert_array_equal(refine(FLOWER, mask), mask)
