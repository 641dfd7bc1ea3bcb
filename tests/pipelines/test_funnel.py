"""The funnel retraces what `decide` did: its numbers add up, and its histograms are of the values that were judged."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.engine import Context
from pipelines.funnel import funnel, histogram
from pipelines.recipes import RECIPE
from pipelines.run import build
from pipelines.storage import Folder
from tests.pipelines.test_cli import x2i

FILTERS = [
    {"column": "min_side", "min": 100},
    {"column": "aspect", "max_quantile": 0.9},
    {"column": "sharpness", "min": 60},
    {"column": "sharpness", "min_quantile": 0.2},
    {"column": "caption_words", "min": 5, "unknown": "drop"},
    {"column": "caption_words", "max": 1000, "unknown": "keep"},
]


@pytest.fixture(scope="module")
def corpus(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs, and with each rule in mind one that it drops; the work folder is gone."""
    root = tmp_path_factory.mktemp("funnel")
    photos = root / "photos"
    photos.mkdir()
    for file in photo_folder.iterdir():
        (photos / file.name).write_bytes(file.read_bytes())
    cat, caption = np.asarray(Image.open(photos / "cat.jpg")), (photos / "cat.txt").read_text()
    images = {
        "small": cat[:90],
        "blurred": cv2.GaussianBlur(cat, (0, 0), 8),
        "mirrored": cat[:, ::-1],
        "copy": cv2.convertScaleAbs(np.asarray(Image.open(photos / "motorcycle.jpg")), alpha=1.02),
    }
    for name, pixels in images.items():
        Image.fromarray(pixels).save(photos / f"{name}.jpg", quality=95)
        (photos / f"{name}.txt").write_text("A cat." if name == "mirrored" else caption)
    (photos / "optout.jpg").write_bytes((photos / "coffee.jpg").read_bytes() + b"\n")
    (photos / "optout.json").write_text(json.dumps({"x_robots_tag": "noai"}))
    (photos / "other_licence.jpg").write_bytes((photos / "flower.jpg").read_bytes() + b"\n")
    (photos / "other_licence.json").write_text(json.dumps({"license": "CC-BY-NC-4.0"}))
    (photos / "uncaptioned.jpg").write_bytes((photos / "rocket.jpg").read_bytes() + b"\n")
    (photos / "zz_copy.jpg").write_bytes((photos / "china.jpg").read_bytes())
    (photos / "zz_copy.txt").write_text(caption)
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    source = {"name": "photos", "type": "folder", "path": str(photos), "text_is": "caption", "license": "CC0-1.0"}
    recipe = {
        "name": "funnel",
        "sources": [source, source | {"name": "again", "path": str(photo_folder / "rocket.jpg")}],
        "ingest": {"unit_rows": 7},
        "score": {"pixels": {}, "phash": {}, "caption": {}},
        "decide": {"licenses": ["CC0-1.0"], "filters": FILTERS, "dedup": {"perceptual": {"radius": 6}}},
        "build": {"captions": {}},
    }
    folder = Folder(str(root / "corpus"))
    build(Context(folder, RECIPE.model_validate(recipe), ""), 0)
    folder.remove("work")
    return root / "corpus"


def test_every_image_is_in_each_step_until_one_drops_it(corpus):
    steps = funnel(Folder(str(corpus)))
    names = ["ingest", "optout", "license", *(f["column"] for f in FILTERS), "duplicate", "near_duplicate"]
    assert [s.name for s in steps] == names
    for step in steps:
        assert step.entered == step.left + sum(step.dropped.values())
    for before, after in pairwise(steps):
        assert before.left == after.entered
    stats = json.loads(x2i("stats", corpus, "--json")[1])
    assert steps[-1].left == sum(stats["ledger"]["decide"]["kept"].values())
    assert stats["funnel"] == [step.to_json() for step in steps]


def test_each_rule_says_what_it_dropped(corpus):
    dropped = [(s.name, s.dropped) for s in funnel(Folder(str(corpus)))]
    assert dropped[:4] == [
        ("ingest", {"truncated": 1}),
        ("optout", {"x-robots-tag: noai": 1}),
        ("license", {"CC-BY-NC-4.0": 1}),
        ("min_side", {"below": 1}),
    ]
    named = dict(dropped[6:])  # the second of the filters on sharpness, and the second on captions
    assert named["duplicate"] == {"duplicate": 1} and named["near_duplicate"] == {"near_duplicate": 1}
    assert [d for n, d in dropped if n == "caption_words"] == [{"unknown": 2, "below": 1}, {}]
    absolute, relative = (d for n, d in dropped if n == "sharpness")
    assert absolute["below"] >= 1 and relative["below"] >= 1


def test_histograms_are_of_what_reached_the_filter(corpus):
    steps = [s for s in funnel(Folder(str(corpus))) if s.column]
    assert len(steps) == len(FILTERS)
    for step, rule in zip(steps, FILTERS, strict=True):
        shown = step.histogram
        assert shown is not None and step.threshold is not None
        assert sum(shown.counts) + shown.unknown == step.entered
        if "min" in rule or "max" in rule:
            assert step.threshold == rule.get("min", rule.get("max"))
        assert shown.edges == sorted(shown.edges) and len(shown.edges) == len(shown.counts) + 1
        lower = any(key.startswith("min") for key in rule)
        gone = sum(
            count
            for edge, count in zip(shown.edges if lower else shown.edges[1:], shown.counts, strict=False)
            if (edge < step.threshold if lower else edge > np.nextafter(step.threshold, np.inf))
        )
        assert gone == step.dropped.get("below", 0) + step.dropped.get("above", 0)
    relative = steps[3]
    assert steps[3].rule == "min quantile 0.2"
    assert relative.dropped["below"] == int(0.2 * relative.entered)


def test_the_terminal_and_the_plots_show_it(corpus, tmp_path):
    code, out = x2i("stats", corpus, "--plots", tmp_path / "plots")
    assert code == 0 and "x-robots-tag: noai" in out and "min quantile 0.2" in out and "█" in out
    plots = sorted(p.name for p in (tmp_path / "plots").iterdir())
    assert plots == [f"{i:02d}-{f['column']}.png" for i, f in enumerate(FILTERS, 1)]
    for path in (tmp_path / "plots").iterdir():
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.std() > 10


def test_scores_of_other_images_are_refused(corpus, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    for path in copy.glob("meta/scores/pixels/again-*"):
        path.unlink()
    with pytest.raises(ValueError, match="of different images"):
        funnel(Folder(str(copy)))


def test_the_corpus_alone_is_enough(corpus):
    assert not (corpus / "work").exists()
    assert yaml.safe_load((corpus / "recipe.yaml").read_text())["name"] == "funnel"


@given(st.lists(st.floats(-1e6, 1e6) | st.floats(1e-3, 1e6), min_size=1, max_size=60))
def test_a_histogram_counts_every_value(values):
    shown = histogram(np.array(values))
    assert shown is not None and sum(shown.counts) == len(values)
    assert shown.edges[0] <= min(values) and max(values) <= shown.edges[-1]


def test_a_heavy_tail_is_drawn_on_a_logarithmic_axis():
    rng = np.random.default_rng(0)
    assert histogram(np.exp(rng.normal(3, 2, 500))).logarithmic  # type: ignore[union-attr]
    assert not histogram(rng.normal(3, 2, 500)).logarithmic  # type: ignore[union-attr]
    assert histogram(np.zeros(0)) is None
