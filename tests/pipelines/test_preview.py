"""Contact sheets show each drawn sample's images where they belong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.corpus import Shard, read_index, read_members
from pipelines.preview import contact_sheets, preview, sample_strip
from pipelines.storage import Folder
from schemas.codec import decode_rgb
from tests.corpora import STREAM_NAMES, make_corpus

CELL, STEP, TOP = 256, 268, 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def test_one_sheet_per_stream_and_subtask(corpus: Folder, tmp_path: Path) -> None:
    paths = preview(corpus, tmp_path / "sheets", per_subtask=2, seed=3)
    assert [p.name for p in paths] == [
        "control-canny.png",
        "edit-recolor.png",
        "few_shot_1-invert.png",
        "perceive-luminance.png",
        "subject_2-reference.png",
        "text_to_image-caption.png",
    ]
    sheets = contact_sheets(corpus, per_subtask=2, seed=3)
    assert len(sheets) == len(STREAM_NAMES)
    for path, sheet in zip(paths, sheets.values(), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(sheet))


def test_another_seed_draws_other_samples_and_the_whole_stream_fits(corpus: Folder) -> None:
    def drawn(per_subtask: int, seed: int) -> bytes:
        return contact_sheets(corpus, per_subtask, seed)["text_to_image", "caption"].tobytes()

    assert drawn(2, 0) == drawn(2, 0)
    assert len({drawn(2, seed) for seed in range(4)}) > 1
    assert contact_sheets(corpus, 99, 0)["text_to_image", "caption"].height > 6 * 128


def test_a_strip_shows_inputs_output_and_mask(corpus: Folder) -> None:
    row = read_index(corpus, Shard("edit", 0)).to_pylist()[0]
    members = read_members(corpus, row)
    strip = np.asarray(sample_strip(row, members)).astype(float)
    for column, name in enumerate(("input_1.jpg", "output.jpg")):
        image = Image.fromarray(decode_rgb(members[name])).resize((CELL, CELL), Image.Resampling.NEAREST)
        shown = strip[TOP : TOP + CELL, column * STEP : column * STEP + CELL]
        np.testing.assert_array_equal(shown, np.asarray(image))
    overlay = strip[TOP : TOP + CELL, 2 * STEP : 2 * STEP + CELL]
    mask = np.asarray(
        Image.fromarray(decode_rgb(members["edit_mask.png"])).resize((CELL, CELL), Image.Resampling.NEAREST)
    )
    is_grey = np.ptp(overlay, axis=-1) == 0
    np.testing.assert_array_equal(~is_grey, mask[..., 0] == 255)


def test_a_strip_shows_the_loss_weight_that_the_mask_implies(corpus: Folder) -> None:
    row = read_index(corpus, Shard("edit", 0)).to_pylist()[0]
    members = read_members(corpus, row)
    strip = sample_strip(row, members)
    weighted = np.asarray(strip)[TOP : TOP + CELL, 3 * STEP : 3 * STEP + CELL].astype(float)
    mask = np.asarray(
        Image.fromarray(decode_rgb(members["edit_mask.png"])).resize((CELL, CELL), Image.Resampling.NEAREST)
    )
    tinted = np.ptp(weighted, axis=-1) > 0
    assert tinted[mask[..., 0] == 255].all()
    assert not tinted[: CELL // 16, : CELL // 16].any() or mask[: CELL // 16, : CELL // 16].any()
    unweighted = sample_strip({**row, "edit_source_index": -1}, members)
    assert unweighted.width == strip.width - STEP


def test_a_long_instruction_makes_the_strip_longer_not_wider(corpus: Folder) -> None:
    row = read_index(corpus, Shard("edit", 0)).to_pylist()[0]
    members = read_members(corpus, row)
    short = sample_strip(row, members)
    long = sample_strip({**row, "instruction": "many words " * 500}, members)
    assert long.width == short.width
    assert short.height < long.height < 3 * short.height
