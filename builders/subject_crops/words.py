"""How a subject is called: with what is said of its looks, or without, so that only its reference tells.

English is cut by rules, as in `builders.annotators.phrases`: a wrong cut gives a poorer name, never another thing's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from builders.annotators.layouts import bare_name
from builders.annotators.phrases import noun_phrases
from builders.edit_pairs.things import PERSONS, name_alone
from builders.templates import load_templates
from schemas.records import Entity

FUNCTION_WORDS = (
    "and|or|but|in|on|at|of|with|by|to|from|for|as|is|are|was|were|has|have|that|which|who|while|against|under|over|near"
    "|ones?"
)


@dataclass(frozen=True)
class Name:
    """`full` says what a thing looks like as far as its phrase does, `plain` only what it is."""

    full: str
    plain: str

    def said(self, withheld: bool) -> str:
        return self.plain if withheld else self.full


def name_of(entity: Entity) -> Name:
    """What an entity is called in a reference that shows nothing else; both are "" if it has no usable name."""
    label, phrase = bare_name(entity.label), bare_name(entity.phrase)
    words = phrase.split()
    relations, places = (load_templates("subject_things")[group] for group in ("relations", "places"))
    cut = next((i for i, w in enumerate(words) if i and (w.lower() in relations or _is_verb(words, i))), len(words))
    full = " ".join(w for w in words[:cut] if w.lower() not in places) or label
    nouns = noun_phrases(without_looks(full))
    plain = without_looks(label or (nouns[0] if nouns else full))
    return Name(full or plain, plain)


def pointers(shown: Sequence[Entity], size: tuple[int, int]) -> Name | None:
    """Names that mean the first of several entities in one picture, by a word for its place if need be.

    Args:
        shown: the entities in the picture, boxes in its pixels.
        size: (height, width) of the picture.
    """
    names = [name_of(entity) for entity in shown]
    found = []
    for withheld in (False, True):
        called = [
            e.model_copy(update={"phrase": n.said(withheld), "label": n.plain})
            for e, n in zip(shown, names, strict=True)
        ]
        found.append(name_alone(called, 0, size))
    full, plain = found
    return Name(full[0], plain[0]) if full and plain else None


def without_looks(text: str) -> str:
    """The text without words for colours, materials and patterns where they stand before a noun; articles agree.

    >>> without_looks("An orange tabby cat and a black and white mug on a round, dark brown table.")
    'A cat and a mug on a round table.'
    """
    looks, after_comma = _looks()
    shorter = looks.sub("", after_comma.sub(r"\1 ", text))
    if shorter == text:
        return text
    agreeing = re.sub(r"\b([Aa])n? (?=(\w+))", lambda m: f"{m[1]}{'n' * _takes_an(m[2])} ", shorter)
    return re.sub(r"(?:^|(?<=[.!?] ))[a-z]", lambda m: m[0].upper(), agreeing) if text[:1].isupper() else agreeing


def mentions_looks(text: str) -> bool:
    """Whether a name says what a thing looks like."""
    return bool(set(re.findall(r"[a-z-]+", text.lower())) & _appearance())


def is_person(entity: Entity) -> bool:
    """Whether the entity is, by its label or the noun of its phrase, a human being."""
    nouns = (bare_name(entity.label), re.split(r" (?:of|with) ", name_of(entity).full)[0])
    return any(noun and noun.lower().split()[-1] in PERSONS for noun in nouns)


def is_body_part(entity: Entity) -> bool:
    return ends_in(entity, load_templates("subject_things")["body_parts"])


def bears_text(entity: Entity) -> bool:
    """Whether a thing of this name, or something on it, often has writing on it."""
    words = re.findall(r"[\w-]+", f"{entity.label} {entity.phrase}".lower())
    return not set(words).isdisjoint(load_templates("subject_things")["text_bearers"])


def ends_in(entity: Entity, nouns: Iterable[str]) -> bool:
    """Whether the entity's label, or its phrase where it has none, names one of these things."""
    called = f" {bare_name(entity.label or name_of(entity).full).lower()}"
    return any(called.endswith(f" {noun}") for noun in nouns)


def _is_verb(words: Sequence[str], i: int) -> bool:
    """ "laptop showing the time", but "dining table" and "a building"."""
    return words[i].endswith("ing") and i + 1 < len(words) and not noun_phrases(words[i + 1])


def _takes_an(word: str) -> bool:
    return bool(re.match(r"(?!uni|use|usu|eu|one)[aeiou]", word, re.IGNORECASE))


@cache
def _appearance() -> frozenset[str]:
    groups = load_templates("appearance_words")
    return frozenset(word for name, group in groups.items() if name != "shades" for word in group)


@cache
def _looks() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Words for looks before a noun, and the article, adjective and comma that stand before them."""
    any_of = "|".join(sorted(map(re.escape, _appearance()), key=len, reverse=True))
    shades = "|".join(load_templates("appearance_words")["shades"])
    one = rf"(?:(?:{shades})[ -])?(?:{any_of})(?:-colou?red)?(?:-(?:and-)?(?:{any_of}))*"
    joined = rf"{one}(?:(?:, and |, or |, | and | or | ){one})*"
    run = rf"(?<!ly )(?<!very )\b{joined}[ ](?=[A-Za-z])(?!(?:{FUNCTION_WORDS})\b)"
    after_comma = rf"(\b(?:an?|the) [\w-]+), (?={run})"
    return re.compile(run, re.IGNORECASE), re.compile(after_comma, re.IGNORECASE)
