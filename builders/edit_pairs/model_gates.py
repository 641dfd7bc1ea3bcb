"""Gates on edits that need a model: a detector, CLIP, and a vision-language model as judge. Each is optional.

They see a decoded pair that has passed the gates without a model, and answer with a `Finding` as claims do.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from pydantic import Field

from builders.annotators.captioners import ServerCaptioner, api_key
from builders.annotators.grounders import GROUNDERS, Box, Found, Grounder
from builders.annotators.hub import TOKENIZER, at_most
from builders.base import BuilderParams
from builders.edit_pairs.claims import Finding
from builders.edit_pairs.edit import Presence
from filters.models import CONFIG, PREPROCESSOR, WEIGHTS, Checkpoint, ModelMissing
from filters.openclip import ClipModel, ClipModelParams, ClipSource
from schemas.codec import encode_png
from schemas.models import ModelParams
from schemas.records import UNKNOWN

_CONTEXT = 0.25  # of a local edit's longer side: what CLIP sees around it
_GAP = 16  # white pixels between the two pictures that a judge sees
_LARGEST = 10.0
_JSON = re.compile(r"\{[^{}]*\}")
CRITERIA = ("follow", "consistency", "naturalness", "artifacts")
PROMPT = """\
The image shows two photos side by side: on the left the original, on the right the same photo after an edit.
The edit that was asked for: "{request}"

First say in one or two sentences what differs between the two photos. Then rate the edit, each from 0 to 10:
- follow: was what was asked for done, completely? 0: not at all.
- consistency: did everything else stay as it was? 0: the photo is another one.
- naturalness: do light, shadows, perspective and sizes fit? 0: it cannot be a photo.
- artifacts: are there no seams, smears, distortions or leftovers? 0: they are all over.
End with one line of JSON: {{"follow": _, "consistency": _, "naturalness": _, "artifacts": _}}"""


class RecheckParams(ModelParams):
    """A GroundingDINO or OWLv2 looks whether what was removed is gone, and what was put in is there."""

    min_score: float = Field(default=0.3, gt=0, lt=1, description="of a detection")
    there: float = Field(default=0.3, gt=0, le=1, description="least overlap (IoU) of its box with the thing's")
    gone: float = Field(default=0.2, ge=0, lt=1, description="largest overlap with what is not to be found (AnyEdit)")


class DirectionParams(ClipModelParams):
    """Directional CLIP similarity. Its scale differs between models: 0.2 is InstructPix2Pix's for OpenAI's ViT-L/14."""

    min: float = Field(default=0.2, ge=-1, le=1)


class JudgeParams(BuilderParams):
    """A vision-language model behind a server that speaks OpenAI's chat completions (vLLM, SGLang, llama.cpp, ...)."""

    model: str = Field(min_length=1, description="as the server calls it")
    base_url: str = Field(pattern=r"^https?://.+", description="e.g. http://gpu1:8000/v1")
    api_key_env: str = Field(default="", description="environment variable of the workers with the server's key")
    timeout_s: float = Field(default=300, gt=0)
    max_tokens: int = Field(default=300, ge=32)
    max_pixels: int = Field(default=1 << 20, ge=4096, description="of the two pictures together")
    min: float = Field(default=6.0, ge=0, le=_LARGEST, description="of the combined score, 0 to 10")


@dataclass(frozen=True)
class Pair:
    """A decoded pair with what was asked for.

    Args:
        source, target: uint8 RGB [H, W, 3].
        mask: boolean [H, W], True where they may differ.
        presences: things that came or went.
        captions: of the edited part before and after, if there are words for them.
        request: the instruction, in plain words.
    """

    source: np.ndarray
    target: np.ndarray
    mask: np.ndarray
    presences: Sequence[Presence] = ()
    captions: tuple[str, str] | None = None
    request: str = ""


class ModelGate(ABC):
    """One model's opinion on a pair."""

    @abstractmethod
    def preflight(self) -> None:
        """Raise `ModelMissing` if the model is not there; reads no weights."""

    @abstractmethod
    def check(self, pair: Pair) -> Finding:
        """What was measured, and the fault, if there is one."""


class Recheck(ModelGate):
    """Every thing that came or went is found where it was said to be in one picture, and not in the other.

    A thing that the detector does not find even where it is to be seen cannot be checked: the pair is refused too.
    """

    def __init__(self, params: RecheckParams) -> None:
        self.params = params

    def preflight(self) -> None:
        Checkpoint(self.params).check(CONFIG, WEIGHTS, TOKENIZER, PREPROCESSOR)
        _ = self._grounder

    def check(self, pair: Pair) -> Finding:
        if not pair.presences:
            return Finding({})
        names = [presence.name for presence in pair.presences]
        found = self._grounder.ground([pair.source, pair.target], [names, names], self.params.min_score)
        scores: dict[str, float] = {}
        faults = []
        for presence in pair.presences:
            before, after = (_overlap(presence, boxes) for boxes in found)
            prefix = "new" if presence.in_target else "old"
            scores |= {f"{prefix}_found_before": before, f"{prefix}_found_after": after}
            shown, elsewhere = (after, before) if presence.in_target else (before, after)
            if shown < self.params.there:
                faults.append(("not_found" if presence.in_target else "cannot_recheck", shown))
            if elsewhere > self.params.gone:
                faults.append(("found_before" if presence.in_target else "still_found", elsewhere))
        return Finding(scores, *faults[0]) if faults else Finding(scores)

    @cached_property
    def _grounder(self) -> Grounder:
        checkpoint = Checkpoint(self.params)
        kind = str(checkpoint.config().get("model_type", ""))
        if kind not in GROUNDERS:
            raise checkpoint.missing(
                f"a {kind or 'model without model_type'} is no detector; use {', '.join(GROUNDERS)}"
            )
        return GROUNDERS[kind](self.params)


class Direction(ModelGate):
    """Cosine between what changed in the picture and what changed in its caption, as CLIP embeds them.

    cos(E_I(target) - E_I(source), E_T(caption after) - E_T(caption before)), of embeddings of length 1 (StyleGAN-NADA,
    arXiv:2108.00946, section 4; as a filter of pairs: InstructPix2Pix, arXiv:2211.09800, section 3.1).
    """

    def __init__(self, params: DirectionParams) -> None:
        self.params = params

    def preflight(self) -> None:
        ClipSource(self.params).check()

    def check(self, pair: Pair) -> Finding:
        if pair.captions is None:
            return Finding({})
        window = _window(pair.mask)
        images = self._model.images([_Picture(encode_png(image[window])) for image in (pair.source, pair.target)])
        value = direction(images, self._model.texts(pair.captions))
        return Finding({"clip_direction": value}, "wrong_direction_of_change" if value < self.params.min else "", value)

    @cached_property
    def _model(self) -> ClipModel:
        return ClipSource(self.params).load()


class Judge(ModelGate):
    """A vision-language model's scores, 0 to 10, combined as VIEScore does (arXiv:2312.14867):

    sqrt(min(follow, consistency) * min(naturalness, artifacts)). An answer without all four scores is a fault of its
    own and says nothing about the pair; its text is kept.
    """

    def __init__(self, params: JudgeParams) -> None:
        self.params = params

    def preflight(self) -> None:
        self._server.check()

    def check(self, pair: Pair) -> Finding:
        picture = at_most(side_by_side(pair.source, pair.target), self.params.max_pixels)
        prompt = PROMPT.format(request=pair.request)
        (answer,) = self._server.answer([picture], prompt, self.params.max_tokens)
        rated = read_scores(answer.text)
        if rated is None:
            return Finding({}, "judge_unreadable", UNKNOWN, said=answer.text)
        combined = combined_score(rated)
        scores = {"judge": combined} | {f"judge_{name}": value for name, value in rated.items()}
        return Finding(scores, "judge" if combined < self.params.min else "", combined, said=answer.text)

    @property
    def _server(self) -> ServerCaptioner:
        p = self.params
        return ServerCaptioner(p.base_url, p.model, api_key(p.api_key_env), p.timeout_s, 1)


def direction(images: np.ndarray, texts: np.ndarray) -> float:
    """Cosine between the differences of two rows each, float [2, d]; 0 if one of them is nothing."""
    image, text = images[1] - images[0], texts[1] - texts[0]
    norm = float(np.linalg.norm(image) * np.linalg.norm(text))
    return round(float(image @ text) / norm, 4) if norm else 0.0


def combined_score(scores: dict[str, float]) -> float:
    """Geometric mean of how well the instruction was followed and how good the picture is; the worse aspect counts."""
    semantics = min(scores["follow"], scores["consistency"])
    return round(math.sqrt(semantics * min(scores["naturalness"], scores["artifacts"])), 4)


def read_scores(text: str) -> dict[str, float] | None:
    """The scores in the last JSON object of an answer, or None if not all of them are there and from 0 to 10."""
    try:
        found: dict[str, Any] = json.loads(_JSON.findall(text)[-1])
        scores = {name: float(found[name]) for name in CRITERIA}
    except (IndexError, KeyError, TypeError, ValueError):
        return None
    return scores if all(0 <= value <= _LARGEST for value in scores.values()) else None


def side_by_side(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Two uint8 RGB images [H, W, 3] in one, with a white gap."""
    gap = np.full((len(source), _GAP, 3), 255, np.uint8)
    return np.concatenate([source, gap, target], axis=1)


def model_gates(
    recheck: RecheckParams | None, clip: DirectionParams | None, judge: JudgeParams | None
) -> dict[str, ModelGate]:
    """Those gates that the recipe has, the cheaper ones first."""
    gates: dict[str, ModelGate] = {}
    if recheck is not None:
        gates["recheck"] = Recheck(recheck)
    if clip is not None:
        gates["clip"] = Direction(clip)
    if judge is not None:
        gates["judge"] = Judge(judge)
    return gates


@contextmanager
def within(section: str) -> Iterator[None]:
    """A `ModelMissing` from inside names its parameter from the recipe section of the builder."""
    try:
        yield
    except ModelMissing as error:
        raise ModelMissing(f"{section}.{error.parameter}", error.message) from error


@dataclass(frozen=True)
class _Picture:
    data: bytes


def _overlap(presence: Presence, found: Iterable[Found]) -> float:
    x, y, w, h = cv2.boundingRect(presence.region.astype(np.uint8))
    overlaps = [_iou((x, y, x + w, y + h), one.box) for one in found if one.phrase == presence.name]
    return round(max(overlaps, default=0.0), 4)


def _iou(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    return shared / max(_area(a) + _area(b) - shared, 1e-9)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _window(mask: np.ndarray) -> tuple[slice, slice]:
    """The edited part as a square with some surroundings, as far as the picture goes: CLIP's crop loses the rest."""
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    half = math.ceil((0.5 + _CONTEXT) * max(w, h))
    cx, cy = x + w // 2, y + h // 2
    return slice(max(0, cy - half), cy + half), slice(max(0, cx - half), cx + half)
