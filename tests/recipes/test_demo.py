"""The demo recipe on a few of its photographs: every builder runs, a source is appended, a photograph forgotten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines import ledger
from pipelines.engine import Context
from pipelines.forget import forget
from pipelines.lint import lint
from pipelines.recipes import load
from pipelines.run import build
from pipelines.stages import STAGES
from pipelines.storage import Folder
from pipelines.tombstones import PATH
from recipes.demo.collect_photos import collect, read_photos
from schemas.identity import uid_of
from tests.corpora import samples, where

DEMO = Path(__file__).parents[2] / "recipes/demo/recipe.yaml"
FIRST = ("astronaut.png", "motorcycle_left.png", "pexels-7303773.jpg")
APPENDED = ("pexels-cup-of-couple-7303788.jpg",)  # shows the jug of 7303773 once more
SOURCE = "  - name: {name}\n    type: manifest\n    path: {name}/manifest.jsonl\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both sources, and the recipe with the first and with both of them."""
    root = tmp_path_factory.mktemp("demo")
    photos = {photo["image"]: photo for photo in read_photos()}
    for name, images in (("photos", FIRST), ("more", APPENDED)):
        collect([photos[image] for image in images], root / name)
    text = DEMO.read_text().replace("unit_rows: 8", "unit_rows: 1")
    start, stop = text.index("  - name: photos"), text.index("\ningest:")
    sources = [SOURCE.format(name=name) for name in ("photos", "more")]
    (root / "first.yaml").write_text(text[:start] + sources[0] + text[stop:])
    (root / "both.yaml").write_text(text[:start] + "".join(sources) + text[stop:])
    return root


def built(root: Path, recipe: str) -> Folder:
    corpus = Folder(str(root / "corpus"))
    build(Context(corpus, load(root / recipe), str(root)), workers=0)
    return corpus


def check_accounts(corpus: Folder) -> None:
    for stage in STAGES:
        ledger.check_conservation(stage, ledger.totals(m.counts for m in ledger.read_markers(corpus, stage).values()))
    assert lint(corpus) == []


@pytest.mark.slow
def test_the_demo_is_built_grows_and_forgets(root: Path) -> None:
    astronaut, motorcycle, jug = (uid_of((root / "photos" / name).read_bytes()) for name in FIRST)
    jug_again = uid_of((root / "more" / APPENDED[0]).read_bytes())

    corpus = built(root, "first.yaml")
    check_accounts(corpus)
    first = samples(corpus)
    assert len(corpus.read_json("manifest.json")["streams"]) >= 10

    built(root, "both.yaml")
    check_accounts(corpus)
    both = samples(corpus)
    alone = {key: s for key, s in first.items() if s[0] in ([astronaut], [motorcycle])}
    assert {key: both.get(key) for key in alone} == alone, "what does not go with the new photograph is as it was"
    assert {jug, jug_again} in [set(parents) for parents, _ in both.values()], "subjects are paired over both sources"

    lost = {key: members for key, (parents, members) in both.items() if astronaut in parents}
    caption = next(p["caption"] for p in read_photos() if p["image"] == "astronaut.png")
    remaining = {data for key, (_, ms) in both.items() if key not in lost for data in ms.values()}
    needles = {d for ms in lost.values() for n, d in ms.items() if n not in ("txt", "json")} - remaining
    texts = [astronaut.encode(), json.dumps(caption).strip('"').encode(), b"astronaut"]
    assert len(needles) >= 10 and all(where(corpus, [*texts, *needles]))
    forget(corpus, {astronaut}, "requested")
    assert set.union(*where(corpus, [*texts, *needles])) == {PATH}, "only the tombstone knows of it"
    assert samples(corpus) == {key: sample for key, sample in both.items() if key not in lost}
    check_accounts(corpus)
