"""Which samples are trained on when: a pure function of (index, mixture, seed, position), and so of nothing else.

Positions are handed out in blocks. A block holds a fixed number of samples of each stream, so the mixture is exact in
every one of them, and is packed on its own, so any pack can be computed without a run before it. Within a stream an
epoch is a permutation of chunks of consecutive samples, and a permutation of the samples in each group of chunks:
neighbours in a shard part company, and yet a shard is read piece by piece and not sample by sample.
"""

from __future__ import annotations

import bisect
import difflib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from fine_tune.index import CorpusError, Index, StreamIndex
from schemas.identity import digest_of, generator
from schemas.vocabulary import STREAMS, TASKS

OTHER = "other"
AUTHORS_MIXTURE: Mapping[str, float] = {"text_to_image": 0.5, "subject": 0.2, "control": 0.1, "edit": 0.1, OTHER: 0.1}
"""Shares of samples in the late training stages of OmniGen (VectorSpaceLab/OmniGen, issue 42)."""


def stream_shares(index: Index, mixture: Mapping[str, float]) -> dict[str, float]:
    """The share of samples drawn from each stream present; they add up to 1.

    Args:
        index: what there is.
        mixture: weights by task, by stream (`subject_2`: taken out of its task) or for `other`: all tasks not named.
            What several streams share is divided by their numbers of samples. Names of nothing in the index have no
            effect, the others are scaled up.

    Raises:
        CorpusError: an unknown name, a negative weight, or nothing of the mixture is in the index.
    """
    known = [*TASKS, *(stream for stream in STREAMS if stream not in TASKS), OTHER]
    for name, weight in mixture.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}"
            raise CorpusError(f"mixture names {name!r}, which is neither a task nor a stream; {hint}")
        if not 0 <= weight < float("inf"):
            raise CorpusError(f"mixture weight of {name} is {weight}, not a number of at least 0")
    members = defaultdict(list)
    for stream in index.streams:
        entry = next((name for name in (_own_name(stream), stream.task, OTHER) if name in mixture), None)
        if entry is not None and mixture[entry] > 0:
            members[entry].append(stream)
    total = sum(mixture[entry] for entry in members)
    if not total:
        have = ", ".join(stream.name for stream in index.streams)
        raise CorpusError(f"the mixture {dict(mixture)} takes nothing of what the corpus has: {have}")
    shares: dict[str, float] = {}
    for entry, streams in members.items():
        samples = sum(len(stream) for stream in streams)
        shares |= {stream.name: mixture[entry] / total * len(stream) / samples for stream in streams}
    return {stream.name: shares[stream.name] for stream in index.streams if stream.name in shares}


def _own_name(stream: StreamIndex) -> str | None:
    """The name by which a mixture can mean this stream alone; streams named like their task have none."""
    return None if stream.name in TASKS else stream.name


def block_counts(shares: Mapping[str, float], block: int) -> dict[str, int]:
    """Samples of each stream in a block, by largest remainder and at least one of each.

    Raises:
        ValueError: more streams than a block has places.
    """
    if len(shares) > block:
        raise ValueError(f"{len(shares)} streams do not fit into blocks of {block} samples")
    wanted = {name: share * block for name, share in shares.items()}
    counts = {name: max(1, int(want)) for name, want in wanted.items()}
    while (excess := sum(counts.values()) - block) != 0:
        step = -1 if excess > 0 else 1
        adjustable = [name for name in counts if counts[name] + step >= 1]
        furthest = max(adjustable, key=lambda name: step * (wanted[name] - counts[name]))
        counts[furthest] += step
    return counts


class StreamOrder:
    """The endless sequence of draws from one stream: epoch after epoch, each in another order."""

    def __init__(self, name: str, size: int, seed: int, chunk: int = 256, group: int = 32) -> None:
        self.name, self.size, self.seed, self.chunk, self.group = name, size, seed, chunk, group
        self._chunks = lru_cache(maxsize=2)(self._permute_chunks)
        self._items = lru_cache(maxsize=2)(self._permute_group)

    def draws(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and item of the draws [start, stop): two int64 arrays."""
        epochs, items = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while start < stop:
            epoch, position = divmod(start, self.size)
            _, bounds = self._chunks(epoch)
            group = int(np.searchsorted(bounds, position, side="right")) - 1
            offset = position - int(bounds[group])
            part = self._items(epoch, group)[offset : offset + stop - start]
            epochs.append(np.full(len(part), epoch))
            items.append(part)
            start += len(part)
        return np.concatenate(epochs), np.concatenate(items)

    def _permute_chunks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the chunks in an epoch, and the position at which each group of them begins."""
        order = generator(self.seed, f"{self.name}/{epoch}", "chunks").permutation(-(-self.size // self.chunk))
        lengths = np.minimum(self.chunk, self.size - order * self.chunk)
        return order, np.concatenate([[0], np.cumsum(lengths)])[:: self.group]

    def _permute_group(self, epoch: int, group: int) -> np.ndarray:
        chunks = self._chunks(epoch)[0][group * self.group : (group + 1) * self.group]
        ranges = [np.arange(c * self.chunk, min((c + 1) * self.chunk, self.size)) for c in chunks]
        return generator(self.seed, f"{self.name}/{epoch}/{group}", "items").permutation(np.concatenate(ranges))


@dataclass(frozen=True)
class Draw:
    """One sample to train on. It differs from other draws of the same sample by its epoch.

    `side` is the longest side in pixels to which its images are brought, 0 for the one that the index was made for.
    """

    stream: StreamIndex
    epoch: int
    item: int
    side: int = 0

    @property
    def tokens(self) -> int:
        tokens = self.stream.tokens_at[self.side] if self.side else self.stream.tokens
        return int(tokens[self.item])


def sides_in_turn(stream: StreamIndex, epochs: np.ndarray, items: np.ndarray) -> list[int]:
    """The side of each draw: a sample takes another one in every epoch, and all of them in as many epochs.

    Where it begins is scattered (Fibonacci hashing), as samples that follow each other may be of one kind.
    """
    sides = [0, *stream.tokens_at]
    scattered = (items.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
    turns = (scattered + epochs.astype(np.uint64)) % np.uint64(len(sides))
    return [sides[turn] for turn in turns]


class Plan:
    """Packs of at most `budget` tokens, numbered from 0 without end.

    Args:
        index: the samples; none takes more than `budget` tokens.
        shares: of the streams, see `stream_shares`.
        seed: of the order.
        budget: tokens a pack has room for.
        block: samples that are mixed, shuffled and packed together.
        after: the `cursor` of the plan that was followed before, to go on where it stopped.
    """

    def __init__(
        self,
        index: Index,
        shares: Mapping[str, float],
        seed: int,
        budget: int,
        block: int = 512,
        *,
        after: Mapping[str, Any] | None = None,
        **order: int,
    ) -> None:
        self.shares, self.seed, self.budget, self.size = dict(shares), seed, budget, block
        self.counts = block_counts(shares, block)
        self.streams = [stream for stream in index.streams if stream.name in shares]
        self._orders = [StreamOrder(stream.name, len(stream), seed, **order) for stream in self.streams]
        self._after = dict(after or {})
        self._starts = {stream.name: _start(stream, self._after.get(stream.name)) for stream in self.streams}
        self.identity = digest_of([index.digest, self.shares, seed, budget, block, order, self._starts])
        # The number of the first pack of every block from `_first_block` on, as far as they have been counted.
        self._first_block, self._first_packs = 0, [0]
        self.block = lru_cache(maxsize=2)(self._pack_block)

    def pack(self, number: int) -> list[Draw]:
        """The samples of a pack; never empty."""
        block, first = self._find(number)
        return self.block(block)[number - first]

    def place(self, number: int) -> dict[str, Any]:
        """Where a pack is. `go_to` it saves counting all packs before it, 50,000 samples a second."""
        block, first = self._find(number)
        return {"plan": self.identity, "block": block, "first_pack": first}

    def go_to(self, place: Mapping[str, Any]) -> None:
        """Forget the packs before a place of this plan; one of another plan is of no use and ignored."""
        if place["plan"] == self.identity:
            self._first_block, self._first_packs = place["block"], [place["first_pack"]]

    def cursor(self, number: int) -> dict[str, Any]:
        """How much of each stream was drawn before pack `number`: where a plan with other settings goes on `after`.

        The block that this pack belongs to counts as drawn unless the pack is its first, so that no sample comes
        again before its epoch is over; what is left of the block waits for the next epoch.
        """
        block, first = self._find(number)
        blocks = block + (number > first)
        own = {
            stream.name: {
                "members": stream.members,
                "samples": len(stream),
                "draws": self._starts[stream.name] + blocks * self.counts[stream.name],
            }
            for stream in self.streams
        }
        return {**self._after, **own}

    def _find(self, number: int) -> tuple[int, int]:
        """The block of a pack, and the first pack of that block."""
        if number < self._first_packs[0]:
            raise ValueError(f"pack {number} lies before pack {self._first_packs[0]}, where this plan was sent to")
        while number >= self._first_packs[-1]:
            last = self._first_block + len(self._first_packs) - 1
            self._first_packs.append(self._first_packs[-1] + len(self.block(last)))
        position = bisect.bisect_right(self._first_packs, number) - 1
        return self._first_block + position, self._first_packs[position]

    def draws(self, block: int) -> list[Draw]:
        """The samples of a block in the order in which they are packed."""
        draws = []
        for stream, order in zip(self.streams, self._orders, strict=True):
            count, start = self.counts[stream.name], self._starts[stream.name]
            epochs, items = order.draws(start + block * count, start + (block + 1) * count)
            sides = sides_in_turn(stream, epochs, items)
            draws += [Draw(stream, int(e), int(i), side) for e, i, side in zip(epochs, items, sides, strict=True)]
        return [draws[i] for i in generator(self.seed, str(block), "block").permutation(len(draws))]

    def _pack_block(self, block: int) -> list[list[Draw]]:
        draws = self.draws(block)
        packs = best_fit([draw.tokens for draw in draws], self.budget)
        # Best fit leaves the emptiest packs and the largest samples to the end.
        shuffled = generator(self.seed, str(block), "packs").permutation(len(packs))
        return [[draws[i] for i in packs[number]] for number in shuffled]

    def report(self, blocks: int = 1) -> dict[str, dict[str, Any]]:
        """Per stream: the share of samples requested, and the shares of samples and tokens in the first blocks."""
        samples = dict.fromkeys(self.shares, 0)
        tokens = dict.fromkeys(self.shares, 0)
        for draw in (draw for block in range(blocks) for pack in self.block(block) for draw in pack):
            samples[draw.stream.name] += 1
            tokens[draw.stream.name] += draw.tokens
        return {
            stream.name: {
                "task": stream.task,
                "samples": len(stream),
                "requested": self.shares[stream.name],
                "realised": samples[stream.name] / sum(samples.values()),
                "tokens": tokens[stream.name] / sum(tokens.values()),
            }
            for stream in self.streams
        }

    def fill(self, block: int = 0) -> float:
        """Share of the rows of a block's packs that hold a token; what is left would be padding."""
        packs = self.block(block)
        return sum(draw.tokens for pack in packs for draw in pack) / (len(packs) * self.budget)


def _start(stream: StreamIndex, before: Mapping[str, Any] | None) -> int:
    """The first draw from a stream. One that has other samples than before, in another order, begins a new epoch."""
    if before is None:
        return 0
    if before["members"] == stream.members:
        return int(before["draws"])
    return -(-before["draws"] // before["samples"]) * len(stream)


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Put each item, in the order given, into the fullest bin that has room for it.

    Returns:
        The items of each bin, as indices into `lengths`.

    Raises:
        ValueError: an item that is larger than a bin.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, bin), sorted
    for item, length in enumerate(lengths):
        if length > capacity:
            raise ValueError(f"item of {length} does not fit into bins of {capacity}")
        place = bisect.bisect_left(room, (length, -1))
        if place < len(room):
            left, number = room.pop(place)
        else:
            left, number = capacity, len(bins)
            bins.append([])
        bins[number].append(item)
        bisect.insort(room, (left - length, number))
    return bins
