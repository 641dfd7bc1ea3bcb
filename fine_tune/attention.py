"""Attention under the OmniGen mask: one key interval ``[lo, hi)`` per query row.

A text or time token sees everything before it and itself; an image token also sees the rest of its own image
(OmniGen, arXiv:2409.11340, section 2.2). Seen from a row of a packed batch, both are a single interval of keys that
starts at the row's own sequence, so a mask is two integers per row however many samples and images a pack holds. Where
several noisy targets share one condition, all but the first see it as a second interval, their prefix.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:  # importing it takes seconds, and only the flex backends need it
    from torch.nn.attention.flex_attention import BlockMask

Backend = Literal["auto", "sdpa", "sequential", "flex", "flex_flash"]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

BLOCK = 128  # rows and keys per mask block: FlexAttention's default, and what its kernels are tuned for


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """Compiled once per process: blocks of all layers and steps share it, and a new BlockMask does not recompile it."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)


@dataclass(frozen=True)
class IntervalMask:
    """Query row ``q`` attends to the keys ``lo[q] <= k < hi[q]``, and to those of its prefix.

    Attributes:
        lo, hi: int32 tensors of shape [T_q] with ``0 <= lo < hi <= kv_length``; no row is empty.
        kv_length: number of keys; equals T_q unless the queries are a subset of the rows.
        prefix: (lo, hi) of a second interval per row, empty (0, 0) or before the first one; None if all are empty.
    """

    lo: Tensor
    hi: Tensor
    kv_length: int
    prefix: tuple[Tensor, Tensor] | None = None

    @property
    def intervals(self) -> list[tuple[Tensor, Tensor]]:
        """(lo, hi) of the one or two intervals, in the order of their keys."""
        return [(self.lo, self.hi)] if self.prefix is None else [self.prefix, (self.lo, self.hi)]

    def map(self, function: Callable[[Tensor], Tensor], kv_length: int | None = None) -> IntervalMask:
        """The mask with `function` applied to all its bounds."""
        prefix = None if self.prefix is None else (function(self.prefix[0]), function(self.prefix[1]))
        return IntervalMask(function(self.lo), function(self.hi), kv_length or self.kv_length, prefix)

    def attended_pairs(self) -> int:
        """Number A of (query, key) pairs computed, for exact FLOPs. Waits for the device."""
        return sum(int((hi - lo).sum()) for lo, hi in self.intervals)

    def dense(self) -> Tensor:
        """The same mask as a bool tensor [T_q, kv_length], true where attention is allowed."""
        keys = torch.arange(self.kv_length, device=self.lo.device)
        parts = [(keys >= lo[:, None]) & (keys < hi[:, None]) for lo, hi in self.intervals]
        return parts[0] if len(parts) == 1 else parts[0] | parts[1]

    def rows(self, rows: Tensor) -> IntervalMask:
        """The mask of the queries ``rows`` (int64 [R]) against all keys."""
        return self.map(lambda bound: bound[rows])

    def compact(self, rows: Tensor) -> IntervalMask:
        """The mask among the sorted ``rows`` alone, keys outside of them dropped.

        Every row must attend to at least one of ``rows``; it keeps exactly those keys of its interval.
        """
        kept = torch.zeros(self.kv_length + 1, dtype=torch.int32, device=rows.device)
        kept[rows + 1] = 1
        kept_before = kept.cumsum(0, dtype=torch.int32)
        return self.map(lambda bound: kept_before[bound[rows]], len(rows))

    def block_mask(self, q_block: int = BLOCK, kv_block: int = BLOCK) -> BlockMask:
        """The FlexAttention block lists, counted from the intervals instead of evaluating all T_q x T_k pairs.

        Equals ``create_block_mask`` on the same mask. One list for all heads (``H=None``); no device wait.
        """
        touched, inside = torch.zeros((2, 1, 1), dtype=torch.int32, device=self.lo.device)
        for lo, hi in self.intervals:
            last = torch.where(hi > lo, (hi - 1) // kv_block, lo // kv_block - 1)
            touched = touched + self._rows_covering(lo // kv_block, last + 1, q_block, kv_block)
            inside = inside + self._rows_covering((lo - 1) // kv_block + 1, hi // kv_block, q_block, kv_block)
        full = inside == q_block
        from torch.nn.attention.flex_attention import BlockMask

        return BlockMask.from_kv_blocks(
            *_block_lists((touched > 0) & ~full),
            *_block_lists(full),
            BLOCK_SIZE=(q_block, kv_block),
            mask_mod=_interval_mask_mod(self.intervals),
            seq_lengths=(len(self.lo), self.kv_length),
        )

    def _rows_covering(self, first: Tensor, stop: Tensor, q_block: int, kv_block: int) -> Tensor:
        """Rows of each query block whose key blocks ``[first, stop)`` include each key block: int32 [n_q, n_kv]."""
        n_q, n_kv = -(-len(self.lo) // q_block), -(-self.kv_length // kv_block)
        row_of_block = torch.arange(len(self.lo), device=self.lo.device) // q_block * (n_kv + 1)
        steps = torch.zeros(n_q * (n_kv + 1), dtype=torch.int32, device=self.lo.device)
        one = torch.ones_like(self.lo)
        steps.index_add_(0, row_of_block + first, one)
        steps.index_add_(0, row_of_block + torch.maximum(first, stop), one, alpha=-1)
        return steps.view(n_q, n_kv + 1).cumsum(1, dtype=torch.int32)[:, :-1]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, backend: Backend = "auto") -> Tensor:
    """softmax(q kᵀ / √head_dim) v over each row's keys.

    Args:
        q: [T_q, H, K]; k, v: [T_k, H_kv, K] with H a multiple of H_kv; one floating dtype for all three.
        mask: the intervals of the T_q rows over the T_k keys.
        backend: see `prepare`.

    Returns:
        [T_q, H, K] in the dtype of q.
    """
    return prepare(mask, backend)(q, k, v)


def prepare(mask: IntervalMask, backend: Backend = "auto") -> Attend:
    """Build the backend's form of ``mask`` once, for use by all layers of a step.

    Args:
        mask: the intervals, on the device that computes.
        backend: ``sdpa`` (dense bool mask over the whole pack; any device; the reference), ``sequential`` (the same,
            one sequence of the pack after the other; reads the mask on the host), ``flex`` (FlexAttention; on CPU
            without gradients), ``flex_flash`` (FlexAttention on the FlashAttention-4 kernels; fp16/bf16, Hopper or
            newer), ``auto`` (``flex`` on CUDA, else ``sequential``).

    Returns:
        ``attend(q, k, v)`` with the shapes of `attention`.

    Raises:
        ValueError: unknown backend.
        RuntimeError: ``flex_flash`` without the package or device it needs.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"attention backend {backend!r} is unknown; choose one of {', '.join(get_args(Backend))}")
    device = mask.lo.device
    if backend == "auto":
        backend = "flex" if device.type == "cuda" else "sequential"
    if backend == "sdpa":
        return partial(_sdpa, attn_mask=mask.dense())
    if backend == "sequential":
        return partial(_sequential, segments=_segments(mask))
    if backend == "flex":
        return partial(_flex, block_mask=mask.block_mask(), kernel_options={})
    # The Blackwell forward kernel works on query tiles of 256 rows, the Hopper one on 128.
    q_block = 256 if _flash_device_generation(device) >= 10 else BLOCK
    return partial(_flex, block_mask=mask.block_mask(q_block), kernel_options={"BACKEND": "FLASH"})


def _sdpa(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


@dataclass(frozen=True)
class _Segment:
    """Neighbouring rows whose intervals begin at one key, the runs of keys they see, and which each row sees."""

    rows: slice
    keys: list[slice]
    visible: Tensor

    def pick(self, x: Tensor) -> Tensor:
        """The keys or values of this segment, without a copy if they lie in one run."""
        return x[self.keys[0]] if len(self.keys) == 1 else torch.cat([x[run] for run in self.keys])


def _segments(mask: IntervalMask) -> list[_Segment]:
    # Rows of one target have one prefix, so it changes with `lo` only.
    starts = (mask.lo.diff().nonzero()[:, 0] + 1).tolist()
    segments = []
    for first, stop in pairwise([0, *starts, len(mask.lo)]):
        rows = slice(first, stop)
        runs = [slice(int(lo[first]), int(hi[rows].max())) for lo, hi in mask.intervals]
        runs = [run for run in runs if run.start < run.stop]
        keys = torch.cat([torch.arange(run.start, run.stop, device=mask.hi.device) for run in runs])
        segments.append(_Segment(rows, runs, keys < mask.hi[rows][:, None]))
    return segments


def _sequential(q: Tensor, k: Tensor, v: Tensor, segments: list[_Segment]) -> Tensor:
    return torch.cat([_sdpa(q[s.rows], s.pick(k), s.pick(v), s.visible) for s in segments])


def _flex(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, kernel_options: Any) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    on_cpu = q.device.type == "cpu"
    if on_cpu and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise RuntimeError("FlexAttention has no backward on CPU; use attention backend 'sdpa' to train there")
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    # Inside of a compiled block it is compiled with it.
    run: Any = flex_attention if on_cpu or torch.compiler.is_compiling() else _compiled_flex_attention()
    out = run(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1], kernel_options=kernel_options)
    return out[0].transpose(0, 1)


def _interval_mask_mod(intervals: list[tuple[Tensor, Tensor]]) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    *_, (lo, hi) = intervals
    prefix_lo, prefix_hi = intervals[0]

    def in_one(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv >= lo[q]) & (kv < hi[q])

    def in_either(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return in_one(batch, head, q, kv) | ((kv >= prefix_lo[q]) & (kv < prefix_hi[q]))

    return in_one if len(intervals) == 1 else in_either


def _block_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Bool [n_q, n_kv] -> (counts int32 [1, 1, n_q], key block indices int32 [1, 1, n_q, n_kv], set ones first)."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


def _flash_device_generation(device: torch.device) -> int:
    """Compute capability (major) of a device that can run the FlashAttention-4 kernels, or an error."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9:
        raise RuntimeError(f"attention backend 'flex_flash' needs a Hopper or newer CUDA device, not {device}")
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
        raise RuntimeError("attention backend 'flex_flash' needs the package flash-attn-4 (module flash_attn.cute)")
    return torch.cuda.get_device_capability(device)[0]
