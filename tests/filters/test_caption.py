"""Caption quality: clean captions stay clean, and what is wrong is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.scorers.base import ScorerInput, ScorerParams
from filters.scorers.caption import Caption, personal_data, repetition, words
from schemas.records import Captions

PHOTOS = Path(__file__).parents[2] / "recipes/demo/photos.jsonl"
SCORER = Caption(ScorerParams())


def score(text: str) -> dict:
    return SCORER.score([ScorerInput("", b"", Captions(long=text))])[0]


def demo_captions() -> list[str]:
    records = [json.loads(line) for line in PHOTOS.read_text(encoding="utf-8").splitlines()]
    return [record[key] for record in records for key in ("caption", "caption_short")]


def test_captions_of_the_demo_are_clean():
    for caption in demo_captions():
        row = score(caption)
        assert row["caption_refusal"] == row["caption_meta_talk"] == row["caption_pii"] == 0, caption
        assert row["caption_repetition"] < 0.1, caption
        assert abs(row["caption_words"] - len(caption.split())) <= 2, caption  # 1:21 are two words
        assert row["caption_chars"] == len(caption)


def test_long_captions_of_the_demo_are_english():
    long = demo_captions()[::2]
    rows = [score(caption) for caption in long]
    assert {row["caption_language"] for row in rows} == {"en"}
    assert min(row["caption_language_score"] for row in rows) > 0.9


def test_everything_is_null_without_a_caption():
    assert set(score("").values()) == set(score(" \n").values()) == {None}
    assert set(score("")) == set(SCORER.columns)


def test_the_most_complete_caption_is_judged():
    captions = Captions(short="a cat", long="a cat on a red mat", alt="cat.jpg")
    assert SCORER.score([ScorerInput("", b"", captions)])[0]["caption_words"] == 6


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Ein kleiner Hund läuft am Strand entlang und schaut auf das Meer hinaus.", "de"),
        ("Una mujer con un vestido rojo camina por la calle bajo la lluvia.", "es"),
        ("一只猫坐在窗边看着外面的雨。", "zh"),
        ("Красный автомобиль стоит перед старым деревянным домом.", "ru"),
    ],
)
def test_languages(text, language):
    assert score(text)["caption_language"] == language


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with identifying people in this image.",
        "I’m sorry, I cannot assist with that request.",
        "I am unable to view images directly.",
        "As an AI language model, I do not see pictures.",
        "Please provide an image so that I can describe it.",
    ],
)
def test_refusals(text):
    assert score(text)["caption_refusal"] == 1


@pytest.mark.parametrize("text", ["A dog who looks sorry for itself.", "A sign that says: no dogs, we cannot help it."])
def test_not_refusals(text):
    assert score(text)["caption_refusal"] == 0


@pytest.mark.parametrize(
    "text", ["The image shows a dog.", "In this picture, a dog runs.", "This photo depicts a dog.", "We can see a dog."]
)
def test_meta_talk(text):
    assert score(text)["caption_meta_talk"] == 1


@pytest.mark.parametrize("text", ["A picture hangs in the hall.", "A photo album in the middle of the picture frame."])
def test_not_meta_talk(text):
    assert score(text)["caption_meta_talk"] == 0


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to jane.doe+cats@mail.example.co.uk today", "email"),
        ("card 4111 1111 1111 1111 exp", "card"),  # the test number of Visa
        ("amex 378282246310005", "card"),
        ("IBAN GB82 WEST 1234 5698 7654 32", "iban"),  # the example of the registry
        ("DE89370400440532013000", "iban"),
        ("server 192.168.10.254 down", "ipv4"),
        ("SSN 219-09-9999.", "ssn"),
        ("call +49 30 901820 now", "phone"),
        ("call (212) 555-0123", "phone"),
        ("ring 212-555-0123", "phone"),
        ("Tel. 030 1234567", "phone"),
    ],
)
def test_personal_data(text, kind):
    assert [found for found, _ in personal_data(text)] == [kind]


@pytest.mark.parametrize(
    "text",
    [
        "A poster for the years 1998-2004 and 1914/1918.",
        "4111 1111 1111 1112",  # the check digit is wrong
        "GB83 WEST 1234 5698 7654 32",
        "version 1.2.3.4.5, released 2024-05-12",
        "999.999.999.999",
        "000-12-3456",
        "Canon EOS 5D, 1/250 s, f/2.8, ISO 400, 1920x1080, 12,345,678 pixels",
        "IMG_20190412_153012 DSC00123",
        "at 12:30:45 on 12.05.2019",
    ],
)
def test_not_personal_data(text):
    assert list(personal_data(text)) == []


def test_repetition():
    assert repetition(words("a red car and a red car and a red car and a red car")) > 0.6
    assert repetition(words("cat cat")) == 0.5
    assert repetition([]) == 0.0


@given(st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=30))
def test_repetition_is_a_share_that_doubling_never_lowers(tokens):
    assert 0 <= repetition(tokens) < 1
    if len(tokens) >= 3:
        assert repetition(tokens + tokens) >= repetition(tokens)


@given(st.text(max_size=200))
def test_any_text_is_scored_the_same_twice(text):
    assert score(text) == score(text)
