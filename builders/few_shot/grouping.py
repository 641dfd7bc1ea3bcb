"""Which samples of a window become examples for which.

A group has K examples and one query that show the same mapping, on photographs of different scenes that do not look
alike, of one split and of much the same aspect. A *contrast pair* is two groups with the same query input, whose
examples show two mappings and therefore ask for two outputs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from builders.few_shot.signatures import Signature
from schemas.groups import FewShot
from schemas.identity import sample_key, uid_of

Contents = tuple[str, str]  # digests of a sample's input and output image


@dataclass(frozen=True)
class Candidate:
    """A sample that shows a mapping.

    Attributes:
        key: of the sample.
        signature: of its mapping.
        complete: see `builders.few_shot.signatures.Shown`.
        uid: of the photograph it was made of.
        is_photo: whether its input is that photograph itself, unchanged.
        scene, split: of the photograph.
        phash, phash_mirror: 64-bit perceptual hashes of the photograph, and of its mirror image.
        size: (width, height) of its input.
    """

    key: str
    signature: Signature
    complete: bool
    uid: str
    is_photo: bool
    scene: str
    split: str
    phash: int
    phash_mirror: int
    size: tuple[int, int]

    @cached_property
    def pool(self) -> tuple[Signature, str, int]:
        """What all samples of a group have in common: the mapping, the split, and the aspect to half an octave."""
        return self.signature, self.split, round(2 * math.log2(self.size[0] / self.size[1]))


@dataclass(frozen=True)
class Group:
    """Examples and a query. `contrast` is the same, and not "", for both groups of a contrast pair."""

    supports: tuple[Candidate, ...]
    query: Candidate
    explicit: bool
    contrast: str = ""

    @property
    def stream(self) -> str:
        return f"few_shot_{len(self.supports)}"

    @property
    def key(self) -> str:
        """Of the sample that is made of it; it depends on the members and their order alone."""
        members = " ".join(member.key for member in (*self.supports, self.query))
        return sample_key(uid_of(members.encode()), self.stream, self.query.signature.stream)


class Window:
    """Draws the groups of one window.

    Args:
        candidates: in a fixed order, keys unique.
        settings: of the recipe.
        contents: of a candidate; only asked for candidates that are about to be drawn.
        rng: all randomness.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        settings: FewShot,
        contents: Callable[[Candidate], Contents],
        rng: np.random.Generator,
    ) -> None:
        self.candidates, self.settings, self.contents, self.rng = candidates, settings, contents, rng
        self.uses: dict[str, int] = defaultdict(int)
        self.asked: set[str] = set()
        self.pools: dict[tuple[Signature, str, int], list[Candidate]] = defaultdict(list)
        self.variants: dict[tuple[str, ...], set[Signature]] = defaultdict(set)
        self.photos: dict[str, list[Candidate]] = defaultdict(list)
        for candidate in candidates:
            self.pools[candidate.pool].append(candidate)
            self.variants[_kind(candidate)].add(candidate.signature)
            if candidate.is_photo:
                self.photos[candidate.uid].append(candidate)

    def groups(self) -> list[Group]:
        """All groups: contrast pairs first, then one query of every kind of task in turn, until there are enough."""
        wanted = math.floor(self.settings.share * len(self.candidates))
        groups = list(self._contrast_groups(round(self.settings.contrast * wanted / 2)))
        for query in self._in_turn():
            if len(groups) >= wanted:
                break
            if query.key not in self.asked and (supports := self._supports_of_any_number(query)):
                explicit = not self.is_readable(query) or bool(self.rng.random() >= self.settings.implicit)
                groups.append(self._taken(Group(supports, query, explicit)))
        return groups

    def is_readable(self, query: Candidate) -> bool:
        """Whether the examples are needed, and enough, to know what to do with the query: the ambiguity guard.

        Needed, because samples of the same task show other mappings in this window, or the same photograph has
        another target there; enough, because nothing has to be pointed at in words.
        """
        targets = {other.signature for other in self.photos[query.uid]} if query.is_photo else set()
        return query.complete and len(self.variants[_kind(query)] | targets) > 1

    def has_partner(self, candidate: Candidate) -> bool:
        """Whether its mapping is shown on another scene of the same split and aspect."""
        return any(other.scene != candidate.scene for other in self.pools[candidate.pool])

    def _contrast_groups(self, wanted: int) -> Iterator[Group]:
        """`wanted` pairs, as far as there are any, each of another photograph."""
        photos = sorted(self.photos)
        pairs = (self._contrast_pair(self.photos[photos[i]]) for i in self.rng.permutation(len(photos)))
        found = (pair for pair in pairs if pair)
        for _, pair in zip(range(wanted), found, strict=False):
            yield from pair

    def _contrast_pair(self, targets: list[Candidate]) -> list[Group]:
        """Two groups that differ in what is asked of one input, or nothing."""
        ready = [target for target in self._shuffled(targets) if target.complete and self.has_partner(target)]
        for first, second in combinations(ready, 2):
            if first.signature == second.signature or not self._is_contrast(first, second):
                continue
            for k in self.rng.permutation(self.settings.shots):
                both = [(query, self._supports(query, int(k))) for query in (first, second)]
                if all(supports for _, supports in both):
                    name = uid_of(f"{first.key} {second.key}".encode())[:20]
                    return [self._taken(Group(supports, query, False, name)) for query, supports in both]
        return []

    def _is_contrast(self, first: Candidate, second: Candidate) -> bool:
        (first_input, first_output), (second_input, second_output) = self.contents(first), self.contents(second)
        return first_input == second_input and first_output != second_output

    def _in_turn(self) -> list[Candidate]:
        """All candidates in random order, but the first of every kind of task before the second of any."""
        seen: dict[tuple[str, ...], int] = defaultdict(int)
        rounds: dict[int, list[Candidate]] = defaultdict(list)
        for candidate in self._shuffled(self.candidates):
            rounds[seen[_kind(candidate)]].append(candidate)
            seen[_kind(candidate)] += 1
        return [candidate for number in sorted(rounds) for candidate in rounds[number]]

    def _supports_of_any_number(self, query: Candidate) -> tuple[Candidate, ...]:
        for k in self.rng.permutation(self.settings.shots):
            if supports := self._supports(query, int(k)):
                return supports
        return ()

    def _supports(self, query: Candidate, k: int) -> tuple[Candidate, ...]:
        """`k` examples for a query in random order; none if there are not as many."""
        chosen: list[Candidate] = []
        for candidate in self._shuffled(self.pools[query.pool]):
            if self.uses[candidate.key] < self.settings.max_uses and all(
                self._are_apart(candidate, member) for member in (query, *chosen)
            ):
                chosen.append(candidate)
            if len(chosen) == k:
                return tuple(chosen)
        return ()

    def _are_apart(self, one: Candidate, other: Candidate) -> bool:
        """Neither gives away what the other shows: other scenes, other looks, and no image in common."""
        return (
            one.scene != other.scene
            and distance(one, other) > self.settings.phash_distance
            and not {*self.contents(one)} & {*self.contents(other)}
        )

    def _taken(self, group: Group) -> Group:
        self.asked.add(group.query.key)
        for support in group.supports:
            self.uses[support.key] += 1
        return group

    def _shuffled(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        return [candidates[i] for i in self.rng.permutation(len(candidates))]


def distance(one: Candidate, other: Candidate) -> int:
    """Hamming distance of the perceptual hashes of two photographs, either of which may be mirrored; 0 to 64."""
    hashes = ((one.phash, other.phash), (one.phash, other.phash_mirror), (one.phash_mirror, other.phash))
    return min((a ^ b).bit_count() for a, b in hashes)


def _kind(candidate: Candidate) -> tuple[str, ...]:
    """The kind of task, within which examples may show other mappings."""
    signature = candidate.signature
    return signature.stream, signature.subtask, signature.direction, candidate.split
