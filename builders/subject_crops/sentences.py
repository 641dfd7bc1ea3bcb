"""Instructions with references: a caption of the target in which the tags stand for the subjects, or a template.

Every second instruction of a sample withholds what its subjects look like, so that a model has to look at the
references; which one comes first is drawn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from builders.annotators.layouts import bare_name, enumerate_words
from builders.captions import Style, draw_style, strip_meta_talk
from builders.subject_crops.words import FUNCTION_WORDS, Name, name_of, without_looks
from builders.templates import Phrasing, load_templates
from schemas.instructions import placeholder
from schemas.records import Entity

FILE = "subject_crops"
VARIANTS = 3  # beside the instruction: an even number in all, of which half withhold
CAPTION_MIX: dict[Style, float] = {"short": 0.6, "long": 0.3, "alt": 0.1}
# How a caption is used if it can be: with the subjects in it replaced, told after it, or not at all.
MODES = {"replaced": 0.5, "captioned": 0.35, "bare": 0.15}
_ORDINALS = ("first", "second", "third")
_TRIES = 24


@dataclass(frozen=True)
class Mention:
    """A subject in the instruction.

    Attributes:
        name: what means it in its reference.
        number: of its reference, from 1.
        entity: in the target, to be found in the target's captions.
        rivals: the other entities of the target.
        alone: whether its reference shows nothing else.
    """

    name: Name
    number: int
    entity: Entity
    rivals: tuple[Entity, ...] = ()
    alone: bool = True


def instruct(
    mentions: Sequence[Mention], captions: Mapping[Style, str], rng: np.random.Generator
) -> tuple[Phrasing, bool]:
    """The instruction with `VARIANTS` others, and whether it withholds what the subjects look like.

    Args:
        mentions: in the order in which templates name them.
        captions: usable ones of the target.
        rng: draws everything.
    """
    first = bool(rng.random() < 0.5)
    said: dict[str, str] = {}
    for _ in range(_TRIES):
        withheld = first ^ bool(len(said) % 2)
        text, template = _say(mentions, captions, withheld, rng)
        said.setdefault(text, template)
        if len(said) > VARIANTS:
            break
    texts = list(said)[: len(said) - len(said) % 2]
    return Phrasing(texts[0], tuple(texts[1:]), said[texts[0]]), first


def _say(
    mentions: Sequence[Mention], captions: Mapping[Style, str], withheld: bool, rng: np.random.Generator
) -> tuple[str, str]:
    caption = ""
    if captions:
        caption = strip_meta_talk(captions[draw_style(captions, CAPTION_MIX, rng)])
        caption = caption if caption[-1] in ".!?" else f"{caption}."
    spans = _spans(caption, mentions)
    possible = {
        mode: weight
        for mode, weight in MODES.items()
        if (mode == "bare" or caption) and (mode != "replaced" or spans is not None)
    }
    weights = np.array(list(possible.values()))
    mode = str(rng.choice(list(possible), p=weights / weights.sum()))
    calls = _calls(mentions, withheld, rng)
    if mode == "replaced":
        assert spans is not None
        caption = _replace(caption, dict(zip(spans, calls, strict=True)), withheld)
    elif withheld:
        caption = without_looks(caption)
    several = len(mentions) > 1
    name = mode if mode == "replaced" else f"{mode}_{'several' if several else 'one'}"
    templates = load_templates(FILE)[name]
    number = int(rng.integers(len(templates)))
    subjects, definitions = enumerate_words(calls), _definitions(mentions, withheld)
    text = templates[number].format(
        caption=caption, subjects=subjects, Subjects=_upper_first(subjects), definitions=definitions
    )
    return text, f"{FILE}/{name}/{number}"


def _calls(mentions: Sequence[Mention], withheld: bool, rng: np.random.Generator) -> list[str]:
    """Each subject as a noun phrase with its tag; one manner for all of them."""
    manners = ["the {name} in {tag}", "the {name} from {tag}", "the {name} shown in {tag}"]
    if len(mentions) > 1:
        manners.append("the {name} in the {ordinal} image {tag}")
    if all(mention.alone for mention in mentions):
        manners.append("the {name} {tag}")
    manner = str(rng.choice(manners))
    return [
        manner.format(name=m.name.said(withheld), tag=placeholder(m.number), ordinal=_ORDINALS[m.number - 1])
        for m in mentions
    ]


def _definitions(mentions: Sequence[Mention], withheld: bool) -> str:
    """ "The dog is in <img>…</img>, and the boy is in <img>…</img>." """
    parts = [f"the {m.name.said(withheld)} is the one in {placeholder(m.number)}" for m in mentions]
    return f"{_upper_first(', and '.join(filter(None, (', '.join(parts[:-1]), parts[-1]))))}."


Span = tuple[int, int]


def _spans(caption: str, mentions: Sequence[Mention]) -> list[Span] | None:
    """Where the caption speaks of each subject, article included; None unless all are found, apart from each other."""
    found = [_span(caption, mention) for mention in mentions]
    spans = [span for span in found if span is not None]
    apart = all(a[1] <= b[0] for a, b in pairwise(sorted(spans)))
    return spans if len(spans) == len(mentions) and apart else None


def _span(caption: str, mention: Mention) -> Span | None:
    name = name_of(mention.entity)
    for wanted in dict.fromkeys((bare_name(mention.entity.phrase), name.full)):
        if wanted and (span := _only_match(caption, re.escape(wanted))) is not None:
            return span
    if any(name_of(rival).plain == name.plain for rival in mention.rivals):
        return None
    words = rf"(?:(?!(?:an?|the|{FUNCTION_WORDS})\b)[a-z][\w-]* ){{0,3}}"  # adjectives, not "a tap and a" jug
    return _only_match(caption, words + re.escape(name.plain)) if _counts(caption, name.plain) == 1 else None


def _only_match(caption: str, pattern: str) -> Span | None:
    """The only match that begins with an article and ends a noun phrase."""
    ends = r"(?=[.,;:!?]| (?:and|or|with|on|in|at|of|is|are|stands|lies|sits|hangs|rests|that|which|who|from|by|to)\b)"
    matches = list(re.finditer(rf"\b(?:an?|the) {pattern}{ends}", caption, re.IGNORECASE))
    return matches[0].span() if len(matches) == 1 else None


def _counts(caption: str, noun: str) -> int:
    return len(re.findall(rf"\b{re.escape(noun)}(?:e?s)?\b", caption, re.IGNORECASE))


def _replace(caption: str, calls: Mapping[Span, str], withheld: bool) -> str:
    parts, end = [], 0
    for (start, stop), call in sorted(calls.items()):
        starts_sentence = start == 0 or caption[:start].rstrip()[-1:] in ".!?"
        parts += [caption[end:start], _upper_first(call) if starts_sentence else call]
        end = stop
    parts.append(caption[end:])
    if withheld:
        parts[::2] = [_keep_ends(part) for part in parts[::2]]
    return "".join(parts)


def _keep_ends(part: str) -> str:
    """`without_looks` of a part of a sentence, whose first letter is not the first of a sentence."""
    bare = without_looks(part)
    return part[:1] + bare[1:] if part[:1].isspace() else bare


def _upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]
