"""Lay several samples of any sizes out as one pack of rows, without padding between them.

One sample is the sequence ``[condition | time token | target patches]``. The condition is text with the patches of the
input images in place of their placeholder tokens. A pack is such sequences end to end; position ids, the RoPE table and
the attention mask of each follow from the sequence alone, so that packing never changes what a sample computes.

The condition sees neither time nor target, so it can serve several draws of both: ``[condition | time token | target |
time token | target | ...]``, where no draw sees another, computes exactly what as many sequences would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fine_tune.attention import IntervalMask

Size = tuple[int, int]
"""Height and width of an image in latent patches (1 patch = 2 x 2 latents = 16 x 16 pixels)."""


def patches_of(height: int, width: int, pixels_per_patch: int = 16) -> Size:
    """Size in patches of an image of ``height`` x ``width`` pixels; ValueError if a side is no multiple of 16."""
    if min(height, width) < pixels_per_patch or height % pixels_per_patch or width % pixels_per_patch:
        raise ValueError(f"image of {height}x{width} pixels: both sides must be multiples of {pixels_per_patch}")
    return height // pixels_per_patch, width // pixels_per_patch


def tokens_of(text_tokens: int, input_sizes: Iterable[Size], target_size: Size, draws: int = 1) -> int:
    """Rows of one sample in a pack.

    Args:
        text_tokens: condition tokens that are not image placeholders.
        input_sizes: one size per occurrence of an input image in the prompt, in patches.
        target_size: of the image to generate, in patches.
        draws: of time and noise that share the condition.
    """
    return text_tokens + sum(h * w for h, w in input_sizes) + draws * (1 + target_size[0] * target_size[1])


@dataclass(frozen=True)
class Sequence:
    """One sample: its condition and the size of the image to generate.

    Attributes:
        token_ids: int array [n] of the condition, any id (0 by convention) at image positions.
        image_spans: (start, stop) in token_ids per input image occurrence, in order and disjoint.
        input_sizes: (h, w) in patches per occurrence; h * w = stop - start.
        target_size: (h, w) in patches.
        draws: how many times the target is noised; they share the condition.

    Raises:
        ValueError: spans out of order, out of range, or not of the size of their image; no draw.
    """

    token_ids: np.ndarray | Tensor
    image_spans: list[tuple[int, int]]
    input_sizes: list[Size]
    target_size: Size
    draws: int = 1

    def __post_init__(self) -> None:
        if len(self.image_spans) != len(self.input_sizes):
            raise ValueError(f"{len(self.image_spans)} image spans but {len(self.input_sizes)} input sizes")
        previous_stop = 0
        for (start, stop), (h, w) in zip(self.image_spans, self.input_sizes, strict=True):
            if not previous_stop <= start < stop <= len(self.token_ids):
                raise ValueError(
                    f"image span [{start}, {stop}) is empty, overlaps its predecessor or exceeds the condition "
                    f"of {len(self.token_ids)} tokens"
                )
            if stop - start != h * w:
                raise ValueError(f"image span [{start}, {stop}) cannot hold {h} x {w} patches")
            previous_stop = stop
        if min(self.target_size) < 1:
            raise ValueError(f"target size {self.target_size} is empty")
        if self.draws < 1:
            raise ValueError(f"{self.draws} draws of the target; there must be at least one")

    @property
    def num_target_tokens(self) -> int:
        return self.target_size[0] * self.target_size[1]

    def __len__(self) -> int:
        return len(self.token_ids) + self.draws * (1 + self.num_target_tokens)


@dataclass(frozen=True)
class Pack:
    """T rows: sequences end to end, then optional padding rows. Row indices are int64 and ascending.

    S counts draws of a target: one per sequence unless conditions are shared.

    Attributes:
        token_ids: int64 [T]; 0 where the row is not a text token.
        position_ids: int64 [T], counted from 0 in each sequence, going on after the condition in each draw; 0 on
            padding.
        use_long_rope: bool [T]; the row's sequence, with one draw, is longer than the short RoPE table is for.
        mask: intervals of the T rows over the T rows; a padding row sees itself only.
        text_rows: rows that hold a text token, padding included.
        input_rows: rows that hold a patch of an input image, in the order of `input_sizes`.
        time_rows: [S], the time token of each draw.
        target_rows: rows that hold a target patch, in the order of `target_sizes`.
        target_draw: int64, the draw each target row belongs to.
        input_sizes: (h, w) in patches of all input images of all sequences, in row order.
        target_sizes: (h, w) in patches, one per draw.
        num_tokens: rows without padding.
        attended_pairs: (query, key) pairs without padding, for exact FLOPs.
    """

    token_ids: Tensor
    position_ids: Tensor
    use_long_rope: Tensor
    mask: IntervalMask
    text_rows: Tensor
    input_rows: Tensor
    time_rows: Tensor
    target_rows: Tensor
    target_draw: Tensor
    input_sizes: list[Size]
    target_sizes: list[Size]
    num_tokens: int
    attended_pairs: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Pack:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Pack:
        """A copy in page-locked memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Pack:
        def convert(value: Any) -> Any:
            if isinstance(value, IntervalMask):
                return value.map(function)
            return function(value) if isinstance(value, Tensor) else value

        return Pack(**{field.name: convert(getattr(self, field.name)) for field in fields(self)})


def pack(sequences: list[Sequence], pad_to: int | None = None, short_rope_length: int = 4096) -> Pack:
    """Lay ``sequences`` out in the given order.

    Args:
        sequences: at least one.
        pad_to: fixed number of rows T, so that kernels see one shape; None for no padding.
        short_rope_length: sequences longer than this use the long RoPE table; the model's
            ``original_max_position_embeddings``. Decided for each sequence by its own length with one draw, as
            sampling it alone would, not by the length of the batch.

    Raises:
        ValueError: no sequence, or more rows than ``pad_to``.
    """
    if not sequences:
        raise ValueError("cannot pack zero sequences")
    lengths = np.array([len(sequence) for sequence in sequences])
    num_tokens = int(lengths.sum())
    total = num_tokens if pad_to is None else pad_to
    if total < num_tokens:
        raise ValueError(f"sequences of {lengths.tolist()} tokens do not fit into a pack of {pad_to} rows")

    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    rows = np.arange(total)
    token_ids = np.zeros(total, np.int64)
    position_ids = np.zeros(total, np.int64)
    use_long_rope = np.zeros(total, bool)
    lo, hi, prefix = rows.copy(), rows + 1, np.zeros((2, total), np.int64)
    is_input, is_target = np.zeros(total, bool), np.zeros(total, bool)
    time_rows = []
    for start, sequence in zip(starts, sequences, strict=True):
        condition = len(sequence.token_ids)
        length = condition + 1 + sequence.num_target_tokens  # of the sequence with one draw
        token_ids[start : start + condition] = sequence.token_ids
        position_ids[start : start + condition] = np.arange(condition)
        use_long_rope[start : start + len(sequence)] = length > short_rope_length
        lo[start : start + length] = start
        for image_start, image_stop in sequence.image_spans:
            is_input[start + image_start : start + image_stop] = True
            hi[start + image_start : start + image_stop] = start + image_stop
        for draw in range(sequence.draws):
            time_row = start + condition + draw * (length - condition)
            draw_rows = slice(time_row, time_row + length - condition)
            time_rows.append(time_row)
            position_ids[draw_rows] = np.arange(condition, length)
            is_target[time_row + 1 : draw_rows.stop] = True
            hi[time_row + 1 : draw_rows.stop] = draw_rows.stop
            if draw > 0:
                lo[draw_rows] = time_row
                prefix[:, draw_rows] = [[start], [start + condition]]
    token_ids[is_input] = 0
    is_text = ~(is_input | is_target)
    is_text[time_rows] = False
    target_sizes = [sequence.target_size for sequence in sequences for _ in range(sequence.draws)]

    def tensor(array: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)

    bounds = [tensor(bound, torch.int32) for bound in (lo, hi, *prefix)]
    return Pack(
        token_ids=tensor(token_ids),
        position_ids=tensor(position_ids),
        use_long_rope=tensor(use_long_rope, torch.bool),
        mask=IntervalMask(bounds[0], bounds[1], total, (bounds[2], bounds[3]) if prefix.any() else None),
        text_rows=tensor(np.flatnonzero(is_text)),
        input_rows=tensor(np.flatnonzero(is_input)),
        time_rows=tensor(np.array(time_rows)),
        target_rows=tensor(np.flatnonzero(is_target)),
        target_draw=tensor(np.repeat(np.arange(len(target_sizes)), [h * w for h, w in target_sizes])),
        input_sizes=[size for sequence in sequences for size in sequence.input_sizes],
        target_sizes=target_sizes,
        num_tokens=num_tokens,
        attended_pairs=int((hi - lo + prefix[1] - prefix[0])[:num_tokens].sum()),
    )
