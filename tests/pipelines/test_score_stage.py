"""Scores: one file per scorer and unit, no image lost, nothing measured twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from builders.registry import BUILDERS
from filters.models import ModelMissing
from filters.scorers.base import Scorer, ScorerInput, ScorerParams
from filters.scorers.registry import SCORERS
from pipelines import ledger
from pipelines.engine import Context
from pipelines.run import build
from pipelines.stages import STAGES
from pipelines.stages.score import ScorerError
from pipelines.storage import Folder
from schemas.recipe import RecipeError, recipe_model


class LightParams(ScorerParams):
    bad: tuple[str, ...] = ()  # captions that fail
    way: str = "raise"
    needs: str = ""
    batch_size: int = 4


class Light(Scorer):
    """Mean brightness; rows whose caption has a bad word misbehave."""

    name, version, Params = "light", "1", LightParams
    params: LightParams
    scored: ClassVar[list[str]] = []

    @property
    def columns(self) -> dict[str, pa.DataType]:
        return {"light": pa.float32(), "words": pa.int32()}

    @property
    def batch_size(self) -> int:
        return self.params.batch_size

    @property
    def provenance(self) -> dict[str, str]:
        return {"model": "by-hand", "revision": "7"}

    def preflight(self) -> None:
        if self.params.needs and not Path(self.params.needs).exists():
            raise ModelMissing("needs", f"there is no {self.params.needs}; make it")

    def score(self, items: Sequence[ScorerInput]) -> list[dict[str, Any]]:
        self.scored.extend(item.uid for item in items)
        return [row for item in items for row in self._score(item)]

    def _score(self, item: ScorerInput) -> list[dict[str, Any]]:
        row = {"light": float(item.pixels.mean()), "words": len(item.captions.best().split()) or None}
        if any(word in item.captions.best() for word in self.params.bad):
            match self.params.way:
                case "raise":
                    raise ArithmeticError("too dark")
                case "fewer":
                    return []
                case "nan":
                    row["light"] = float("nan")
                case "columns":
                    del row["light"]
        return [row]


class Size(Scorer):
    """Bytes of the encoded image."""

    name, version, Params = "size", "1", ScorerParams

    @property
    def columns(self) -> dict[str, pa.DataType]:
        return {"size": pa.int64()}

    def score(self, items: Sequence[ScorerInput]) -> list[dict[str, Any]]:
        return [{"size": len(item.data)} for item in items]


class Corpus:
    """A corpus that a test builds again and again with scorers of its own."""

    def __init__(self, root: Path, recipe: dict[str, Any]) -> None:
        self.path, self.recipe = root / "corpus", recipe
        self.folder = Folder(str(self.path))

    def build(self, until: str = "publish") -> dict[str, set[str]]:
        """Build, and return the units that ran, by stage."""
        model = recipe_model(
            {name: b.Params for name, b in BUILDERS.items()}, {name: s.Params for name, s in SCORERS.items()}
        )
        before = self._written()
        build(Context(self.folder, model.model_validate(self.recipe), ""), 0, until=until)
        ran = {name for name, time in self._written().items() if time != before.get(name)}
        return {s: {n.split("/")[3][:-5] for n in ran if n.startswith(f"meta/ledger/{s}/")} for s in STAGES}

    def _written(self) -> dict[str, int]:
        return {str(f.relative_to(self.path)): f.stat().st_mtime_ns for f in self.path.glob("meta/ledger/*/*.json")}

    def scores(self, scorer: str = "light") -> list[dict[str, Any]]:
        return [r for n in self.folder.list(f"meta/scores/{scorer}") for r in self.folder.read_table(n).to_pylist()]

    def images(self) -> list[dict[str, Any]]:
        return [r for n in self.folder.list("work/images", ".parquet") for r in self.folder.read_table(n).to_pylist()]

    def entries(self, stage: str) -> list[dict[str, Any]]:
        names = self.folder.list(f"meta/ledger/{stage}", ".parquet")
        return [r for n in names for r in self.folder.read_table(n).to_pylist()]


@pytest.fixture
def corpus(tmp_path, recipe_file, monkeypatch) -> Corpus:
    for scorer in (Light, Size):
        monkeypatch.setitem(SCORERS, scorer.name, scorer)
    monkeypatch.setattr(Light, "scored", [])
    recipe = yaml.safe_load(recipe_file.read_text())
    return Corpus(tmp_path, recipe | {"score": {"light": {}}, "build": {"captions": {}}})


def test_scores_follow_the_images_row_by_row(corpus):
    corpus.recipe["ingest"]["unit_rows"] = 5
    ran = corpus.build(until="score")
    assert ran["score"] == {"photos-000000.light", "photos-000001.light"}
    images, scores = corpus.images(), corpus.scores()
    assert [(s["unit"], s["row"], s["uid"]) for s in scores] == [(i["unit"], i["row"], i["uid"]) for i in images]
    assert len(scores) == 8 and all(0 < s["light"] < 255 and s["words"] > 3 for s in scores)
    assert sorted(Light.scored) == sorted(i["uid"] for i in images)


def test_columns_say_who_measured_them_with_what(corpus):
    corpus.build(until="score")
    schema = pq.read_schema(corpus.path / "meta/scores/light/photos-000000.parquet")
    for name in ("light", "words"):
        expected = {b"scorer": b"light", b"version": b"1", b"model": b"by-hand", b"revision": b"7"}
        assert schema.field(name).metadata == expected
    assert schema.field("words").type == pa.int32() and schema.field("uid").metadata is None


@pytest.mark.parametrize(
    ("way", "detail"),
    [
        ("raise", "too dark"),
        ("fewer", "scorer light gave 0 rows for 1 images"),
        ("nan", "scorer light: light is not finite"),
        ("columns", "scorer light gave words instead of light, words"),
    ],
)
def test_an_image_that_cannot_be_scored_is_kept_with_nulls_and_a_reason(corpus, way, detail):
    corpus.recipe["score"]["light"] = {"bad": ["rocket"], "way": way}
    corpus.build()
    (bad,) = [e for e in corpus.entries("score") if e["reason"]]
    assert bad["status"] == "kept" and "rocket" in bad["input"] and bad["detail"] == detail
    assert [s["uid"] for s in corpus.scores() if s["light"] is None and s["words"] is None] == [bad["uid"]]
    assert len(corpus.scores()) == len(corpus.entries("decide")) == 8
    counts = ledger.totals(m.counts for m in ledger.read_markers(corpus.folder, "score").values())
    assert counts == {"inputs": 8, "kept": 8, "dropped": 0, "quarantined": 0}


def test_what_a_null_means_is_decided_later(corpus):
    corpus.recipe["score"]["light"] = {"bad": ["rocket"]}
    for unknown, dropped in (("keep", 0), ("drop", 1)):
        corpus.recipe["decide"]["filters"] = [{"column": "light", "min": 0, "unknown": unknown}]
        ran = corpus.build(until="decide")
        assert [e["reason"] for e in corpus.entries("decide") if e["reason"]] == ["light"] * dropped
    assert ran["score"] == set()


def test_a_scorer_that_always_fails_ends_the_job(corpus, photographs, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(12):
        Image.fromarray(photographs["cat"]).rotate(i).save(folder / f"{i:02d}.png")
    corpus.recipe["sources"] = [{"name": "many", "type": "folder", "path": str(folder)}]
    corpus.recipe["ingest"]["unit_rows"] = 12
    corpus.recipe["score"]["light"] = {"bad": [""]}
    with pytest.raises(
        ScorerError, match=r"light fails for every image of many-000000: error:ArithmeticError: too dark"
    ):
        corpus.build()
    assert not corpus.folder.list("meta/scores/light")


def test_a_new_scorer_runs_alone(corpus):
    first = corpus.build()
    assert len(first["score"]) == 3
    corpus.recipe["score"]["size"] = {}
    ran = corpus.build()
    assert ran["score"] == {f"photos-00000{i}.size" for i in range(3)}
    assert ran["ingest"] == ran["decide"] == ran["build"] == set()
    assert [s["size"] > 1000 for s in corpus.scores("size")] == [True] * 8
    del corpus.recipe["score"]["light"]
    assert corpus.build()["score"] == set()
    assert not corpus.folder.list("meta/scores/light") and corpus.folder.list("meta/scores/size")


def test_parameters_and_model_are_part_of_the_work(corpus, monkeypatch):
    corpus.build(until="score")
    corpus.recipe["score"]["light"] = {"bad": ["nothing"]}
    assert len(corpus.build(until="score")["score"]) == 3
    monkeypatch.setattr(Light, "provenance", {"model": "by-hand", "revision": "8"})
    assert len(corpus.build(until="score")["score"]) == 3
    assert corpus.build(until="score")["score"] == set()


def test_a_new_threshold_scores_nothing_and_rebuilds_only_what_it_changes(corpus):
    corpus.recipe["decide"]["filters"] = [{"column": "light", "min": 1}]
    corpus.build()
    scores = corpus.scores()
    darkest = min(scores, key=lambda s: s["light"])
    times = len(Light.scored)
    for cleaned_up in (False, True):
        if cleaned_up:
            shutil.rmtree(corpus.path / "work")
            corpus.recipe["decide"]["filters"][0]["min"] = 1
            assert corpus.build()["score"] == set()
        corpus.recipe["decide"]["filters"][0]["min"] = darkest["light"] + 0.01
        ran = corpus.build()
        assert ran["score"] == set() and ran["decide"] == {"all"} and ran["build"] == {darkest["unit"]}
    assert len(Light.scored) == times == 8
    assert corpus.scores() == scores
    assert [e["uid"] for e in corpus.entries("decide") if e["status"] == "dropped"] == [darkest["uid"]]


def test_a_threshold_needs_no_model_that_has_done_its_work(corpus, tmp_path):
    model = tmp_path / "model"
    model.touch()
    corpus.recipe["score"]["light"] = {"needs": str(model)}
    corpus.build()
    model.unlink()
    corpus.recipe["decide"]["filters"] = [{"column": "light", "min": 1}]
    assert corpus.build()["decide"] == {"all"}
    corpus.recipe["score"]["light"]["bad"] = ["new work"]
    with pytest.raises(RecipeError, match=r"score\.light\.needs: there is no"):
        corpus.build()


def test_a_missing_model_is_found_before_anything_runs(corpus):
    corpus.recipe["score"]["light"] = {"needs": "/nowhere/model"}
    with pytest.raises(RecipeError, match="there is no /nowhere/model; make it"):
        corpus.build()
    assert not corpus.path.exists()


def test_finished_samples_are_judged_by_their_photograph(corpus, photographs, tmp_path):
    folder = tmp_path / "x2i"
    folder.mkdir()
    Image.fromarray(photographs["flower"]).save(folder / "photo.jpg")
    Image.new("RGB", (64, 64)).save(folder / "map.png")
    one = "<img><|image_1|></img>"
    rows = [
        ("text_to_image", "A pink dahlia among leaves.", [], "photo.jpg"),
        ("canny", f"Edges of {one}.", ["photo.jpg"], "map.png"),
        ("image_edit", f"Turn the lights on in {one}.", ["map.png"], "photo.jpg"),
    ]
    names = ("task_type", "instruction", "input_images", "output_image")
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    (folder / "x2i.jsonl").write_text("\n".join(lines))
    corpus.recipe["sources"] = [{"name": "x2i", "type": "x2i", "path": str(folder / "x2i.jsonl")}]
    corpus.build(until="score")
    scores = corpus.scores()
    expected = float(np.asarray(photographs["flower"]).mean())
    assert all(abs(s["light"] - expected) < 2 for s in scores)
    assert [s["words"] for s in scores] == [5, None, None]  # an editing instruction is no caption
