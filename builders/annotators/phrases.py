"""Things that a caption names, found without a parser.

A caption is cut at words that cannot be part of a noun phrase (prepositions, verbs, pronouns, ...); what remains
between two cuts is a candidate. Rules miss what a parser would see (an unlisted verb stays in its phrase), which costs
a query: an open-vocabulary detector finds nothing for a phrase that names nothing, and its score decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_WORDS = 4

_PREPOSITIONS = """
    about above across after against along amid among around as at atop before behind below beneath beside besides
    between beyond by despite down during for from in inside into like near next of off on onto out outside over
    past per through throughout to toward towards under underneath until up upon via while with within without
"""
_CONJUNCTIONS = "and although because but if nor or so than that then though when where whereas which who whose yet"
_PRONOUNS = """
    he her hers herself him himself i it itself me my one ones others our ours she someone something their theirs
    them themselves there these they this those us we what you your
"""
_AUXILIARIES = """
    am are be been being can could did do does had has have having is may might must shall should was were will
    would
"""
_VERBS = """
    appear appears bask basks carries carry contain contains cover covers depict depicts display displays eat eats
    face faces feature features fill fills float floats fly flies gaze gazes grow grows hang hangs held hold holds
    includes jump jumps lean leans lie lies look looks made make makes overlook overlooks pass passes play plays
    portray portrays pose poses rest rests ride rides rise rises run runs seem seems shine shines show shows sit
    sits sleep sleeps smile smiles stand stands stare stares stretch stretches surround surrounds surrounded swim
    swims take taken takes walk walks watch watches wear wears wearing holding riding sitting standing lying looking
    walking using eating carrying playing
"""
_ADVERBS = (
    "also away back close close-up here just more most much not only partly quite rather still together too very well"
)
_DETERMINERS = """
    a an the some several many few both each every all any another other no two three four five six seven eight nine
    ten his its
"""
# Parts of a picture, arrangements and properties: words for which there is no box.
_ABSTRACT = """
    angle area arrangement array atmosphere background backdrop blur bottom bunch center centre collection color
    colors colour colours composition corner couple day depth detail details direction distance edge effect end
    evening field-of-view focus foreground front group half hint image kind left light lighting lot middle mood
    morning night number pair part pattern photo photograph picture piece place portion position range reflection
    right row scene section series set setting shade shades shadow shadows shape shot side sides size space style
    surface surroundings texture time top touch type variety view way
"""

_CUTS = frozenset(" ".join((_PREPOSITIONS, _CONJUNCTIONS, _PRONOUNS, _AUXILIARIES, _VERBS, _ADVERBS)).split())
_STARTS = frozenset(_DETERMINERS.split())
_NO_THING = frozenset(_ABSTRACT.split())
_WORD = re.compile(r"[^\W\d_]+(?:[-'’][^\W\d_]+)*|\d+|[^\w\s]")


def noun_phrases(text: str) -> list[str]:
    """Noun phrases of an English text in lower case, without determiners, each once, in order.

    >>> noun_phrases("A smiling astronaut in an orange space suit stands in front of two flags.")
    ['smiling astronaut', 'orange space suit', 'flags']
    """
    words = [word.lower().removesuffix("'s").removesuffix("’s") for word in _WORD.findall(text)]
    phrases: list[list[str]] = [[]]
    for word, following in zip(words, [*words[1:], "."], strict=False):
        if _is_cut(word, following, phrases[-1]):
            phrases.append([])
        if _is_content(word) and not _is_cut(word, following, phrases[-1]):
            phrases[-1].append(word)
    return list(
        dict.fromkeys(" ".join(words[-MAX_WORDS:]) for words in phrases if words and words[-1] not in _NO_THING)
    )


def listed_phrases(text: str) -> list[str]:
    """Entries of a list separated by commas, in lower case, each once; longer ones than `MAX_WORDS` name no thing."""
    entries = (" ".join(words) for part in text.split(",") if 1 <= len(words := part.lower().split()) <= MAX_WORDS)
    return list(dict.fromkeys(entries))


def head_noun(phrase: str) -> str:
    """What kind of thing a phrase names: in English, its last word."""
    return phrase.rsplit(maxsplit=1)[-1]


def unique(phrases: Iterable[str]) -> list[str]:
    """Each phrase once; of two of which one ends with the other ("cup" after "white cup"), only the first."""
    kept: list[str] = []
    for phrase in phrases:
        if not any(f" {longer}".endswith(f" {phrase}") for longer in kept):
            kept.append(phrase)
    return kept


def _is_content(word: str) -> bool:
    return word[0].isalpha() and word not in _CUTS and word not in _STARTS


def _is_cut(word: str, following: str, phrase: list[str]) -> bool:
    if not _is_content(word) or word.endswith("ly"):
        return True
    # "a man riding a horse", but "a dining table"
    return bool(phrase) and word.endswith("ing") and not _is_content(following)
