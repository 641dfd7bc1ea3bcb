"""text_to_image: captions of several lengths, one chosen per image, the others kept beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveFloat

from builders.base import Builder, BuilderParams, Outcome, Rejected, Sample, SourceImage, draft
from builders.templates import Phrasing, phrase
from schemas.instructions import lint_instruction
from schemas.records import Captions as SourceCaptions
from schemas.records import ImageRecord, Op

Style = Literal["long", "short", "alt", "tags"]
MIN_WORDS, MIN_CHARACTERS = 3, 6  # DataComp's basic filter: more than 2 words and more than 5 characters
MAX_LOOP_WORDS = 40
MIN_REPEATS = 4

# "The image shows a cat." says nothing more than "A cat."; OmniGen2 strips this opening from half of its captions.
_META_TALK = re.compile(
    r"^(?:(?:the|this) (?:image|picture|photo|photograph) "
    r"(?:shows|portrays|depicts|captures|highlights|features|displays|presents)"
    r"|in (?:the|this) (?:image|picture|photo|photograph),)\s+(?!that\b|how\b|what\b|where\b)",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"^(?:i['’]m sorry|i am sorry|sorry,|i cannot|i can['’]t|i['’]m (?:unable|not able)|i am (?:unable|not able))\b"
    r"|\bas an ai\b|\bas a language model\b",
    re.IGNORECASE,
)


def normalise_caption(text: str) -> str:
    """Single spaces, no line breaks."""
    return " ".join(text.split())


def strip_meta_talk(text: str) -> str:
    """Without an opening such as "The image shows", and with a capital letter again."""
    rest = _META_TALK.sub("", text, count=1)
    return rest[:1].upper() + rest[1:]


def caption_problem(text: str) -> Rejected | None:
    """Why a normalised caption cannot be an instruction, or None."""
    words = text.split()
    if len(words) < MIN_WORDS or len(text) < MIN_CHARACTERS:
        return Rejected("too_short", len(words), text)
    if problems := lint_instruction(text, 0):
        return Rejected("reserved_token", len(problems), "; ".join(problems))
    if refusal := _REFUSAL.search(text):
        return Rejected("refusal", refusal.start(), refusal.group(0))
    if loop := loop_length(words):
        return Rejected("repetition_loop", loop, text)
    return None


def loop_length(words: list[str]) -> int:
    """Length of the shortest run of words that follows itself so often that a captioner must have looped, or 0."""
    lowered = [word.lower() for word in words]
    for length in range(1, min(MAX_LOOP_WORDS, len(words) // MIN_REPEATS) + 1):
        run = 0
        for here, there in zip(lowered, lowered[length:], strict=False):
            run = run + 1 if here == there else 0
            if run == length * (MIN_REPEATS - 1):
                return length
    return 0


def usable_captions(captions: SourceCaptions, styles: Iterable[Style]) -> dict[Style, str] | Rejected:
    """The normalised captions of these styles that can be instructions; if none can, why the first cannot."""
    texts = {style: text for style in styles if (text := normalise_caption(getattr(captions, style)))}
    problems = {style: caption_problem(text) for style, text in texts.items()}
    usable = {style: texts[style] for style, problem in problems.items() if problem is None}
    return usable or next(filter(None, problems.values()), Rejected("no_caption"))


def draw_style(captions: Mapping[Style, str], mix: Mapping[Style, float], rng: np.random.Generator) -> Style:
    """One of the styles that exist, with a probability in proportion to its weight."""
    weights = np.array([mix[style] for style in captions])
    return list(captions)[rng.choice(len(weights), p=weights / weights.sum())]


class CaptionsParams(BuilderParams):
    """`mix` weighs the caption styles that an image has; a style without a weight is not used."""

    mix: dict[Style, PositiveFloat] = Field({"long": 0.6, "short": 0.3, "alt": 0.1, "tags": 0.05}, min_length=1)
    strip_meta_talk: float = Field(0.5, ge=0, le=1, description="probability")


class Captions(Builder):
    """caption -> photo, whose bytes pass through unchanged. The other captions become instruction variants."""

    name: ClassVar[str] = "captions"
    version: ClassVar[str] = "1"
    Params: ClassVar[type[BuilderParams]] = CaptionsParams
    params: CaptionsParams

    def attempts(self, record: ImageRecord, rng: np.random.Generator) -> list[str]:
        return ["caption"]

    def build(self, image: SourceImage, attempt: str, rng: np.random.Generator) -> Outcome:
        captions = usable_captions(image.record.captions, self.params.mix)
        if isinstance(captions, Rejected):
            return captions
        style = draw_style(captions, self.params.mix, rng)
        strip = bool(rng.random() < self.params.strip_meta_talk)
        texts = {s: _instruction(s, strip_meta_talk(text) if strip else text, rng) for s, text in captions.items()}
        chosen = texts.pop(style)
        others = dict.fromkeys(other.instruction for other in texts.values())
        record = draft(
            image.record,
            "text_to_image",
            "caption",
            Op.of(self.name, self.version, style=style, strip_meta_talk=strip),
            instruction=chosen.instruction,
            instruction_variants=tuple(text for text in others if text != chosen.instruction),
            template_id=chosen.template_id,
        )
        return [Sample(record, {"output.jpg": image.jpeg})]


def _instruction(style: Style, text: str, rng: np.random.Generator) -> Phrasing:
    """The caption itself; only bare tags are put into a sentence."""
    if style == "tags":
        return phrase("captions", "tags", rng, variants=0, tags=text)
    return Phrasing(text, (), f"captions/{style}")
