"""Export to the official JSONL, read it back as ready samples, and find the same images and instructions."""

from __future__ import annotations

import numpy as np

from pipelines.corpus import iter_index, read_members
from pipelines.engine import Context
from pipelines.export import export_x2i
from pipelines.lint import lint
from pipelines.recipes import RECIPE
from pipelines.run import build
from pipelines.storage import Folder
from schemas.codec import decode_rgb
from schemas.vocabulary import STREAMS


def samples(corpus: Folder) -> dict[tuple, list[np.ndarray]]:
    """Decoded images by (task, subtask, instruction)."""
    found = {}
    for table in iter_index(corpus, None, None, None):
        for row in table.to_pylist():
            members = read_members(corpus, row)
            names = [n for n in STREAMS[row["stream"]].image_members if n != "edit_mask.png"]
            found[row["task"], row["subtask"], row["instruction"]] = [decode_rgb(members[n]) for n in names]
    return found


def test_a_corpus_survives_the_official_format(corpus_path, tmp_path):
    corpus = Folder(str(corpus_path))
    export_x2i(corpus, tmp_path / "jsonl")
    recipe = {
        "name": "again",
        "sources": [{"name": "x2i", "type": "x2i", "path": str(tmp_path / "jsonl/x2i.jsonl")}],
        "ingest": {"unit_rows": 20},
        "build": {},
    }
    again = Folder(str(tmp_path / "again"))
    build(Context(again, RECIPE.model_validate(recipe), ""), workers=0)
    assert lint(again) == []
    before, after = samples(corpus), samples(again)
    assert set(after) == set(before)
    for key, images in before.items():
        for one, other in zip(images, after[key], strict=True):
            assert (one == other).all(), key
