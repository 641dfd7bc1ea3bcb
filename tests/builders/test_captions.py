"""Source captions as text_to_image samples."""

from collections import Counter

import numpy as np
import pytest
import skimage.data
from hypothesis import given
from hypothesis import strategies as st

from builders.base import Rejected, SourceImage
from builders.captions import Captions, CaptionsParams, caption_problem, loop_length, normalise_caption, strip_meta_talk
from builders.templates import load_templates
from schemas.codec import encode_jpeg
from schemas.identity import generator, uid_of
from schemas.instructions import lint_instruction
from schemas.records import Captions as SourceCaptions
from schemas.records import ImageRecord

JPEG = encode_jpeg(skimage.data.chelsea())
FULL = SourceCaptions(
    short="A tabby cat looks  at the camera",
    long="The image shows a tabby cat in close-up.\nIts eyes are green.",
    alt="Chelsea the cat",
    tags="cat, whiskers, green eyes",
)


def build(captions, seed=0, **params):
    image = SourceImage(ImageRecord(uid=uid_of(JPEG), width=451, height=300, captions=captions), JPEG)
    builder = Captions(CaptionsParams(**params))
    assert builder.attempts(image.record, np.random.default_rng(0)) == ["caption"]
    return builder.build(image, "caption", generator(seed, uid_of(JPEG), "captions"))


def test_sample_has_the_caption_as_its_instruction_and_the_photo_untouched():
    (sample,) = build(SourceCaptions(short="A tabby cat looks  at\nthe camera"))
    assert sample.record.instruction == "A tabby cat looks at the camera"
    assert sample.images == {"output.jpg": JPEG}
    assert sample.record.template_id == "captions/short"
    assert sample.record.input_roles == ()


def test_mix_is_followed_and_other_styles_are_variants():
    drawn = Counter()
    for seed in range(600):
        record = build(FULL, seed)[0].record
        drawn[record.template_id.split("/")[1]] += 1
        assert len(record.instruction_variants) == 3
        assert record.instruction not in record.instruction_variants
        assert record.captions == FULL
    assert 0.5 < drawn["long"] / 600 < 0.65  # 0.6 of 1.05
    assert 0.23 < drawn["short"] / 600 < 0.34
    assert min(drawn["alt"], drawn["tags"]) > 0
    assert build(FULL, mix={"alt": 1})[0].record.instruction == "Chelsea the cat"


def test_same_seed_same_sample():
    assert build(FULL, 7)[0].members == build(FULL, 7)[0].members


def test_meta_talk_is_stripped_from_its_share():
    only_long = SourceCaptions(long=FULL.long)
    kept = sum(build(only_long, seed)[0].record.instruction.startswith("The image shows") for seed in range(300))
    assert 0.4 < kept / 300 < 0.6
    (always,) = build(only_long, strip_meta_talk=1)
    assert always.record.instruction == "A tabby cat in close-up. Its eyes are green."


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ("The image portrays two dogs.", "Two dogs."),
        ("This photo captures a quiet street.", "A quiet street."),
        ("In this picture, a man is running.", "A man is running."),
        ("The image shows that a dog can swim.", "The image shows that a dog can swim."),
        ("The imagery shows nothing.", "The imagery shows nothing."),
        ("A dog looks at the image.", "A dog looks at the image."),
        ("the image shows", "The image shows"),
    ],
)
def test_only_meta_talk_is_stripped(text, stripped):
    assert strip_meta_talk(text) == stripped


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a cat", "too_short"),
        ("a b c", "too_short"),
        ("I'm sorry, but I can't describe people.", "refusal"),
        ("I’m unable to see the image.", "refusal"),
        ("As an AI language model, I have no eyes.", "refusal"),
        ("A cat beside <img><|image_1|></img> here", "reserved_token"),
        ("A cat <|endoftext|> and a dog", "reserved_token"),
        ("A cat and <cfg> and a dog", "reserved_token"),
        ("a dog and a dog and a dog and a dog and a dog", "repetition_loop"),
        ("A street. " + "There is a car on the left. " * 4, "repetition_loop"),
        ("very very very very tall tower", "repetition_loop"),
    ],
)
def test_captions_that_cannot_be_instructions(text, reason):
    problem = caption_problem(normalise_caption(text))
    assert problem is not None and problem.reason == reason
    assert build(SourceCaptions(long=text)) == problem


@pytest.mark.parametrize(
    "text",
    [
        "two cats, three cats, four cats and a dog",
        "A sign that says I'm sorry hangs on a door.",
        "very very very tall tower",
        "A cat sits on a mat. A dog sits on a mat. A bird sits on a mat.",
    ],
)
def test_honest_captions_pass(text):
    assert caption_problem(text) is None


def test_no_caption_at_all():
    assert build(SourceCaptions()) == Rejected("no_caption")
    assert build(SourceCaptions(tags="cat, dog, bird"), mix={"long": 1}) == Rejected("no_caption")


def test_one_bad_caption_does_not_cost_the_image():
    (sample,) = build(SourceCaptions(long="I'm sorry, I can't help with that.", alt="A cat on a sofa"))
    assert sample.record.instruction == "A cat on a sofa"
    assert sample.record.instruction_variants == ()


def test_tags_are_put_into_a_sentence():
    (sample,) = build(SourceCaptions(tags="cat, whiskers, green eyes"))
    assert "cat, whiskers, green eyes" in sample.record.instruction
    assert sample.record.template_id.startswith("captions/tags/")


def test_tag_templates_are_many_and_clean():
    texts = load_templates("captions")["tags"]
    assert len(set(texts)) == len(texts) >= 10
    for text in texts:
        assert text.count("{tags}") == 1
        assert lint_instruction(text.format(tags="cat, dog"), 0) == []


@given(words=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12, unique=True), times=st.integers(4, 6))
def test_a_phrase_said_four_times_running_is_a_loop(words, times):
    assert loop_length(["x", *words * times, "y"]) == len(words)
    assert loop_length(["x", *words * 3, "y"]) == 0
