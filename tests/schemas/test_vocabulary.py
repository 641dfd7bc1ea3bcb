import pytest

from schemas.vocabulary import STREAMS, TASKS, normalise_task, stream_for


@pytest.mark.parametrize(
    ("wild", "known"),
    [
        ("text_to_iamge", ("text_to_image", "caption")),  # sic, OmniGen toy data
        ("segementation", ("perceive", "segmentation")),  # sic, OmniGen toy data
        ("try-on", ("try_on", "try_on")),
        ("Image Edit", ("edit", "instruction")),
        ("t2i", ("text_to_image", "caption")),
        ("ic", ("subject", "reference")),
        ("restore/deblur", ("restore", "deblur")),
    ],
)
def test_spellings_in_the_wild_are_understood(wild, known):
    assert normalise_task(wild) == known


def test_unknown_task_suggests_a_known_one():
    with pytest.raises(ValueError, match="did you mean segmentation"):
        normalise_task("segmentaton")


def test_every_alias_and_task_leads_to_a_stream():
    from schemas.vocabulary import _ALIASES

    for name in (*_ALIASES, *TASKS):
        assert normalise_task(name)[0] in TASKS


def test_stream_is_found_by_number_of_inputs():
    assert stream_for("control", 2).name == "control_2"
    assert stream_for("subject", 3).name == "subject_3"
    assert stream_for("few_shot", 3).name == "few_shot_1"
    with pytest.raises(ValueError, match="takes 1 input"):
        stream_for("edit", 2)


def test_maps_and_masks_are_lossless():
    for stream in STREAMS.values():
        assert ("edit_mask.png" in stream.members) == stream.edit_mask
    assert set(STREAMS["control_3"].inputs) == {"png"} and STREAMS["perceive"].output == "png"
