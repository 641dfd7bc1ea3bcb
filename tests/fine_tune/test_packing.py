"""Row bookkeeping of packs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fine_tune.packing import Sequence, pack, patches_of, tokens_of

TEXT = Sequence(np.array([5, 6, 7]), [], [], (1, 2))
EDIT = Sequence(np.array([8, 0, 0, 9, 0]), [(1, 3), (4, 5)], [(2, 1), (1, 1)], (2, 2))


def test_layout_of_two_sequences() -> None:
    layout = pack([TEXT, EDIT], pad_to=18)
    #                                t t t T x x | t i i t i T x x x x | pad pad
    assert layout.token_ids.tolist() == [5, 6, 7, 0, 0, 0, 8, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0]
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0]
    assert layout.text_rows.tolist() == [0, 1, 2, 6, 9, 16, 17]
    assert layout.input_rows.tolist() == [7, 8, 10]
    assert layout.time_rows.tolist() == [3, 11]
    assert layout.target_rows.tolist() == [4, 5, 12, 13, 14, 15]
    assert layout.target_draw.tolist() == [0, 0, 1, 1, 1, 1]
    assert layout.input_sizes == [(2, 1), (1, 1)]
    assert layout.target_sizes == [(1, 2), (2, 2)]
    assert layout.mask.lo.tolist() == [0] * 6 + [6] * 10 + [16, 17]
    assert layout.mask.hi.tolist() == [1, 2, 3, 4, 6, 6, 7, 9, 9, 10, 11, 12, 16, 16, 16, 16, 17, 18]
    assert layout.num_tokens == 16
    assert layout.attended_pairs == (1 + 2 + 3 + 4 + 6 + 6) + (1 + 3 + 3 + 4 + 5 + 6 + 10 * 4)


def test_rope_table_is_chosen_by_each_sequence() -> None:
    layout = pack([TEXT, EDIT, TEXT], pad_to=30, short_rope_length=9)
    assert layout.use_long_rope.tolist() == [False] * 6 + [True] * 10 + [False] * 14
    assert not pack([EDIT], short_rope_length=10).use_long_rope.any()


def test_lengths_without_tensors() -> None:
    assert len(EDIT) == tokens_of(2, EDIT.input_sizes, EDIT.target_size) == 10
    size = patches_of(1024, 512)
    assert size == (64, 32)
    assert tokens_of(60, [size, size], (64, 64)) == 60 + 2 * 2048 + 1 + 4096
    with pytest.raises(ValueError, match="1000x512 pixels: both sides must be multiples of 16"):
        patches_of(1000, 512)


def test_moves_between_devices() -> None:
    layout = pack([TEXT, EDIT]).to("meta")
    assert {t.device.type for t in (layout.token_ids, layout.mask.lo, layout.target_draw)} == {"meta"}
    assert layout.num_tokens == 16


def test_token_ids_may_be_a_tensor() -> None:
    as_tensor = Sequence(torch.tensor([5, 6, 7]), [], [], (1, 2))
    assert torch.equal(pack([as_tensor]).token_ids, pack([TEXT]).token_ids)


@pytest.mark.parametrize(
    ("spans", "sizes", "message"),
    [
        ([(1, 3)], [], "1 image spans but 0 input sizes"),
        ([(1, 3)], [(3, 1)], r"span \[1, 3\) cannot hold 3 x 1 patches"),
        ([(1, 3), (2, 3)], [(2, 1), (1, 1)], "overlaps its predecessor"),
        ([(2, 6)], [(2, 2)], "exceeds the condition of 5 tokens"),
        ([(2, 2)], [(0, 0)], "is empty"),
    ],
)
def test_wrong_spans(spans: list[tuple[int, int]], sizes: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sequence(np.zeros(5, int), spans, sizes, (2, 2))


def test_wrong_packs() -> None:
    with pytest.raises(ValueError, match=r"sequences of \[6, 10\] tokens do not fit into a pack of 15 rows"):
        pack([TEXT, EDIT], pad_to=15)
    with pytest.raises(ValueError, match="zero sequences"):
        pack([])
    with pytest.raises(ValueError, match="target size"):
        Sequence(np.array([1]), [], [], (0, 4))
