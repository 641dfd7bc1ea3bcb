"""Is it the same individual in both photographs? A vision-language model is shown the two side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import cv2
import numpy as np

from builders.annotators.captioners import Captioner, check_captioner, open_captioner
from builders.annotators.hub import at_most
from schemas.pairs import Judge

_SIDE, _GAP = 448, 16  # pixels of each crop, and of the white between them
_YES_OR_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Verdict:
    """What a judge said. `same` is None if it is neither yes nor no; `mean_logprob` as in `captioners.Answer`."""

    same: bool | None
    text: str
    mean_logprob: float = -1.0


class SameSubject:
    """Asks about pairs of crops. The model loads on first use."""

    version: ClassVar[str] = "1"

    def __init__(self, params: Judge) -> None:
        self.params = params

    def preflight(self) -> None:
        """Raise `filters.models.ModelMissing` if the model is not there; loads no weights."""
        check_captioner(self.params)

    def ask(self, noun: str, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Verdict]:
        """One verdict per pair of uint8 RGB [n, n, 3] crops, in order.

        An error that is a pair's own fault is an unreadable answer.
        """
        prompt, size = self.params.prompt.format(noun=noun), self.params.batch_size
        pictures = [at_most(side_by_side(*pair), self.params.max_pixels) for pair in pairs]
        batches = [pictures[i : i + size] for i in range(0, len(pictures), size)]
        return [verdict for batch in batches for verdict in self._answers(batch, prompt)]

    def _answers(self, pictures: list[np.ndarray], prompt: str) -> list[Verdict]:
        try:
            said = self._model.answer(pictures, prompt, self.params.max_tokens)
        except ValueError as error:
            if len(pictures) == 1:
                return [Verdict(None, f"error: {error}"[:500])]
            return [verdict for picture in pictures for verdict in self._answers([picture], prompt)]
        return [Verdict(read_yes(answer.text), answer.text, answer.mean_logprob) for answer in said]

    @cached_property
    def _model(self) -> Captioner:
        return open_captioner(self.params)


def read_yes(text: str) -> bool | None:
    """The first "yes" or "no" of an answer, None without one."""
    found = _YES_OR_NO.search(text)
    return found[1].lower() == "yes" if found else None


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two square uint8 RGB crops in one picture, at one size, with a white gap."""
    crops = [cv2.resize(crop, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA) for crop in (left, right)]
    return np.concatenate([crops[0], np.full((_SIDE, _GAP, 3), 255, np.uint8), crops[1]], axis=1)
