"""The interval mask against a dense mask written from the paper's rule, and the backends against each other."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from fine_tune.attention import IntervalMask, attention, prepare
from fine_tune.packing import Sequence, pack

sizes = st.tuples(st.integers(1, 6), st.integers(1, 6))


@st.composite
def sequences(draw: st.DrawFn) -> Sequence:
    """A condition of random runs of text and images, then a target."""
    ids, spans, inputs = [1] * draw(st.integers(1, 5)), [], []
    for h, w in draw(st.lists(sizes, max_size=3)):
        spans.append((len(ids), len(ids) + h * w))
        inputs.append((h, w))
        ids += [0] * (h * w) + [1] * draw(st.integers(0, 5))
    return Sequence(np.array(ids), spans, inputs, draw(sizes), draws=draw(st.integers(1, 3)))


packs = st.lists(sequences(), min_size=1, max_size=4)


def paper_mask(members: list[Sequence], total: int) -> torch.Tensor:
    """Causal in a sequence, bidirectional within each image, nothing between draws; a padding row sees itself."""
    document, image, noised = np.full(total, -1), np.full(total, -1), np.full(total, -1)
    row = image_count = 0
    for number, member in enumerate(members):
        document[row : row + len(member)] = number
        step = 1 + member.num_target_tokens
        time_rows = [len(member.token_ids) + step * draw for draw in range(member.draws)]
        for draw, time_row in enumerate(time_rows):
            noised[row + time_row : row + time_row + step] = draw
        for start, stop in [*member.image_spans, *((time_row + 1, time_row + step) for time_row in time_rows)]:
            image[row + start : row + stop] = image_count
            image_count += 1
        row += len(member)
    q, k = np.arange(total)[:, None], np.arange(total)[None]
    same_document = (document[:, None] == document) & (document[:, None] >= 0)
    same_image = (image[:, None] == image) & (image[:, None] >= 0)
    other_draw = (noised[:, None] != noised) & (noised >= 0)  # of the key; -1 is the condition
    return torch.from_numpy((same_document & ((q >= k) | same_image) & ~other_draw) | (q == k))


@given(packs, st.integers(0, 20))
def test_intervals_are_the_mask_of_the_paper(members: list[Sequence], padding: int) -> None:
    total = sum(map(len, members)) + padding
    layout = pack(members, pad_to=total)
    expected = paper_mask(members, total)
    assert torch.equal(layout.mask.dense(), expected)
    assert layout.attended_pairs == int(expected[: total - padding].sum())
    assert layout.mask.attended_pairs() == layout.attended_pairs + padding


@given(packs)
def test_row_subsets(members: list[Sequence]) -> None:
    """What the condition cache uses: the condition among itself, and the generated rows against everything."""
    layout = pack(members)
    dense = layout.mask.dense()
    condition = torch.cat([layout.text_rows, layout.input_rows]).sort().values
    generated = torch.cat([layout.time_rows, layout.target_rows]).sort().values
    assert torch.equal(layout.mask.compact(condition).dense(), dense[condition][:, condition])
    assert torch.equal(layout.mask.rows(generated).dense(), dense[generated])
    assert not dense[condition][:, generated].any()  # why the condition can be cached at all


def block_lists(mask: BlockMask) -> list[list[list[int]]]:
    """Partial and full key blocks of each query block."""
    return [
        [row[:count].tolist() for row, count in zip(indices[0, 0], counts[0, 0], strict=True)]
        for counts, indices in [
            (mask.kv_num_blocks, mask.kv_indices),
            (mask.full_kv_num_blocks, mask.full_kv_indices),
            (mask.q_num_blocks, mask.q_indices),
            (mask.full_q_num_blocks, mask.full_q_indices),
        ]
    ]


def assert_same_blocks(mask: IntervalMask) -> None:
    dense = mask.dense()

    def allowed(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return dense[q, kv]

    expected = create_block_mask(allowed, None, None, len(mask.lo), mask.kv_length, device="cpu")
    actual = mask.block_mask()
    assert actual.shape == expected.shape
    assert block_lists(actual) == block_lists(expected)


LARGE = [
    Sequence(np.ones(70, int), [], [], (16, 16)),
    Sequence(np.ones(640, int), [(20, 276), (300, 556)], [(16, 16), (16, 16)], (16, 20)),
    Sequence(np.ones(5, int), [], [], (3, 3)),
    Sequence(np.ones(300, int), [(3, 259)], [(16, 16)], (20, 16)),
]
SHARED = [LARGE[2], replace(LARGE[3], draws=3), replace(LARGE[1], draws=2)]


@pytest.mark.parametrize("pad_to", [None, 2688])
@pytest.mark.parametrize("members", [LARGE, SHARED])
def test_block_mask_equals_create_block_mask(members: list[Sequence], pad_to: int | None) -> None:
    layout = pack(members, pad_to)
    assert_same_blocks(layout.mask)
    generated = torch.cat([layout.time_rows, layout.target_rows]).sort().values
    condition = torch.cat([layout.text_rows, layout.input_rows]).sort().values
    assert_same_blocks(layout.mask.rows(generated))
    assert_same_blocks(layout.mask.compact(condition))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(0, 2**32 - 1))
def test_block_mask_of_any_intervals(q_length: int, kv_length: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lo = rng.integers(0, kv_length, q_length)
    hi = rng.integers(lo + 1, kv_length + 1)
    if rng.random() < 0.5:  # long runs of equal rows, so that full blocks occur
        lo, hi = np.full_like(lo, lo.min()), np.full_like(hi, hi.max())
    assert_same_blocks(IntervalMask(torch.from_numpy(lo).int(), torch.from_numpy(hi).int(), kv_length))


def qkv(rows: int, keys: int, heads: int, kv_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, heads, 24), (keys, kv_heads, 24), (keys, kv_heads, 24)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_backends_equal_softmax_over_the_interval(kv_heads: int) -> None:
    layout = pack([*LARGE[2:], replace(LARGE[2], draws=3)])
    generated = torch.cat([layout.time_rows, layout.target_rows]).sort().values
    for mask in (layout.mask, layout.mask.rows(generated)):
        q, k, v = qkv(len(mask.lo), mask.kv_length, 4, kv_heads)
        shared_k, shared_v = (x.repeat_interleave(4 // kv_heads, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, shared_k) / 24**0.5
        weights = scores.masked_fill(~mask.dense(), -torch.inf).softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", weights, shared_v)
        for backend in ("sdpa", "sequential", "flex", "auto"):
            torch.testing.assert_close(attention(q, k, v, mask, backend), expected, atol=1e-5, rtol=1e-5)


def test_unusable_backends_say_why() -> None:
    mask = pack(LARGE[2:3]).mask
    q, k, v = qkv(len(mask.lo), mask.kv_length, 2, 2)
    with pytest.raises(RuntimeError, match="use attention backend 'sdpa' to train"):
        attention(q.requires_grad_(), k, v, mask, "flex")
    with pytest.raises(RuntimeError, match="'flex_flash' needs a Hopper or newer CUDA device, not cpu"):
        prepare(mask, "flex_flash")
    with pytest.raises(ValueError, match="'flash' is unknown; choose one of auto, sdpa, sequential, flex, flex_flash"):
        prepare(mask, "flash")  # type: ignore[arg-type]


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
flash = pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn-4")


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("backend", ["flex", pytest.param("flex_flash", marks=flash)])
@pytest.mark.parametrize("pad_to", [None, 2688])
@pytest.mark.parametrize("members", [LARGE, SHARED])
def test_cuda_kernels_equal_sdpa(backend: str, members: list[Sequence], pad_to: int | None) -> None:
    mask = pack(members, pad_to).to("cuda").mask
    shape = (len(mask.lo), 8, 96)
    results = []
    for name in ("sdpa", backend):
        torch.manual_seed(0)
        leaves = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        out = attention(*leaves, mask, name)
        (out * torch.randn_like(out)).sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    for actual, expected in zip(*reversed(results), strict=True):
        assert ((actual - expected).float().norm() / expected.float().norm()) < 2e-2
