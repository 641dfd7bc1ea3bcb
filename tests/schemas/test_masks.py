import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from schemas.masks import decode_mask, encode_rle


@given(arrays(bool, st.tuples(st.integers(1, 30), st.integers(1, 30))))
def test_round_trip_keeps_polarity(mask):
    rle = encode_rle(mask)
    assert (decode_mask(rle, *mask.shape) == mask).all()
    assert sum(rle["counts"][1::2]) == mask.sum()


def test_coco_order_is_column_major_and_starts_with_zeros():
    assert encode_rle(np.array([[True, False], [True, True]])) == {"size": [2, 2], "counts": [0, 2, 1, 1]}


def test_masks_and_polygons_scale_to_the_image():
    half = np.zeros((10, 10), bool)
    half[:, 5:] = True
    assert (decode_mask(encode_rle(half), 40, 20) == np.repeat(half, 2, 1).repeat(4, 0)).all()
    square = decode_mask([[2, 2, 7, 2, 7, 7, 2, 7]], 10, 10)
    assert square[2:8, 2:8].all() and square.sum() == 36


@pytest.mark.parametrize(
    "bad",
    [
        {"size": [2, 2], "counts": [3]},
        {"size": [2, 2], "counts": [5, -1]},
        [[0, 0, 1, 1]],
        {"size": [10**6, 10**6], "counts": [10**12]},
    ],
)
def test_broken_masks_are_refused(bad):
    with pytest.raises(ValueError, match=r"run lengths|three x, y|pixels"):
        decode_mask(bad, 2, 2)
