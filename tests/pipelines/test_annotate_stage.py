"""Artefacts are computed once per image and annotator, stored losslessly, and reach samples with their provenance."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml
from PIL import Image
from pydantic import BaseModel

from builders.annotators import registry
from builders.annotators.annotator import Annotator, Artefact
from builders.annotators.entities import Entities
from builders.base import BuilderParams, SourceImage
from filters.models import content_revision
from pipelines import ledger
from pipelines.artefacts import Artefacts, members_path, table_path
from pipelines.corpus import iter_index
from pipelines.engine import Context
from pipelines.recipes import load
from pipelines.run import build
from pipelines.stages.annotate import AnnotateStage, AnnotatorError, phase
from pipelines.storage import Folder
from schemas.codec import decode_raw, encode_png
from schemas.recipe import RecipeError
from schemas.records import Captions, ImageRecord, Op
from tests.builders.tiny_annotators import save_owlv2, save_qwen_vl, save_sam2
from tests.conftest import CAPTIONS

UNITS = ("photos-000000", "photos-000001")


@pytest.fixture(scope="module")
def photos(photographs: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small photographs of different shorter sides."""
    folder = tmp_path_factory.mktemp("photos")
    for name, side in {"astronaut": 120, "cat": 100, "coffee": 80, "rocket": 64}.items():
        image = Image.fromarray(photographs[name])
        scale = side / min(image.size)
        image.resize((round(image.width * scale), round(image.height * scale))).save(folder / f"{name}.jpg", quality=92)
        (folder / f"{name}.txt").write_text(CAPTIONS[name])
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_owlv2(folder / "owlv2")
    save_sam2(folder / "sam2")
    save_qwen_vl(folder / "qwen")
    return folder


@pytest.fixture
def context(photos: Path, tmp_path: Path) -> Callable[..., Context]:
    """A recipe of four photographs in two units, with some annotators, and where to build it."""

    def make(annotate: dict[str, Any], name: str = "corpus", min_side: int = 64) -> Context:
        recipe = {
            "name": "annotated",
            "sources": [{"name": "photos", "type": "folder", "path": str(photos), "text_is": "caption"}],
            "ingest": {"unit_rows": 2},
            "decide": {"filters": [{"column": "min_side", "min": min_side}]},
            "annotate": annotate,
            "build": {"condition_maps": {"maps": ["luminance", "boxes"], "per_image": 2}},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return Context(Folder(str(tmp_path / name)), load(path), str(tmp_path))

    return make


def _grounded(models: Path) -> dict[str, Any]:
    rules = {"min_score": 0.3, "area": [0.0, 1.0], "max_borders": 4, "min_mask_score": 0.0, "fill": [0.0, 1.0]}
    return {"entities": {"model": str(models / "owlv2"), "segmenter": {"model": str(models / "sam2")}, **rules}}


def _files(corpus: Folder, folder: str) -> dict[str, bytes]:
    return {name: corpus.read_bytes(name) for name in corpus.list(folder)}


class Params(BuilderParams):
    """Parameters of the annotators below."""

    strength: int = 1


class Gradient(Annotator):
    """A real annotator without a model: how bright each pixel is, 16 bit. Counts the images that it was given."""

    name: ClassVar[str] = "gradient"
    version: ClassVar[str] = "1"
    Params: ClassVar[type[BaseModel]] = Params
    annotated: ClassVar[list[str]] = []
    refused: ClassVar[set[int]] = set()

    def op(self) -> Op:
        return Op.of(self.name, self.version, **self.params.model_dump())

    def annotate(self, images: Sequence[SourceImage]) -> list[Artefact]:
        found = []
        for image in images:
            self.annotated.append(image.record.uid)
            if image.record.width in self.refused:
                raise ValueError("too wide to think about")
            raw = image.pixels.sum(-1, dtype=np.uint16) * np.uint16(85)
            found.append(Artefact({"mean": round(float(raw.mean()), 3)}, {"raw.png": encode_png(raw)}))
        return found

    def enrich(self, record: ImageRecord, artefact: Artefact) -> ImageRecord:
        return record.model_copy(update={"captions": Captions(tags=f"brightness {artefact.data['mean']}")})


class Steepness(Gradient):
    """Reads what `Gradient` found, and what that made of the record."""

    name: ClassVar[str] = "steepness"
    needs: ClassVar[tuple[str, ...]] = ("gradient",)
    annotated: ClassVar[list[str]] = []
    refused: ClassVar[set[int]] = set()

    def annotate(self, images: Sequence[SourceImage]) -> list[Artefact]:
        self.annotated.extend(image.record.uid for image in images)
        return [
            Artefact({"twice": 2 * image.artefacts["gradient"].data["mean"], "told": image.record.captions.tags})
            for image in images
        ]

    def enrich(self, record: ImageRecord, artefact: Artefact) -> ImageRecord:
        return record


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The annotators above, in place of the real ones; nothing else is replaced."""
    from pipelines import recipes
    from pipelines.stages import annotate
    from schemas.recipe import recipe_model

    annotators = {a.name: a for a in (Steepness, Gradient)}
    monkeypatch.setattr(annotate, "ANNOTATORS", annotators)
    model = recipe_model(
        {name: builder.Params for name, builder in recipes.BUILDERS.items()},
        {name: scorer.Params for name, scorer in recipes.SCORERS.items()},
        {name: annotator.Params for name, annotator in annotators.items()},
    )
    monkeypatch.setattr(recipes, "RECIPE", model)
    for annotator in annotators.values():
        annotator.annotated.clear()
        annotator.refused.clear()


def test_models_annotate_and_samples_name_them(
    context: Callable[..., Context], models: Path, photographs: dict[str, np.ndarray]
) -> None:
    here = context(_grounded(models))
    build(here, workers=0)
    with Artefacts(here.corpus, "entities", UNITS[0]) as found:
        artefact = found.get(0)
        assert artefact is not None and artefact.data["found"]
        assert found.op == Entities(here.recipe.annotate.entities).op()
    rows = [row for table in iter_index(here.corpus) for row in table.to_pylist()]
    assert rows
    for row in rows:
        (op,) = [op for op in row["ops"] if op["name"] == "annotate:entities"]
        assert (op["model"], op["revision"]) == (str(models / "owlv2"), content_revision(models / "owlv2"))


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bytes(context: Callable[..., Context], models: Path) -> None:
    both = {"caption": {"model": str(models / "qwen"), "max_tokens": 6, "styles": ["tags"]}, **_grounded(models)}
    alone, side_by_side = (context(both, name) for name in ("alone", "parallel"))
    build(alone, workers=0, until="annotate")
    build(side_by_side, workers=0, until="decide")
    build(side_by_side, workers=2, until="annotate")
    for folder in ("artefacts", "meta/ledger/annotate"):
        files = _files(alone.corpus, folder)
        assert files and files == _files(side_by_side.corpus, folder)


def test_artefacts_are_lossless_and_in_a_plain_tar(counting: None, context: Callable[..., Context]) -> None:
    here = context({"gradient": {}})
    build(here, workers=0, until="annotate")
    corpus = here.corpus
    with tarfile.open(fileobj=io.BytesIO(corpus.read_bytes(members_path("gradient", UNITS[1])))) as tar:
        assert tar.getnames() == ["000000.raw.png", "000001.raw.png"]
        assert all((member.mtime, member.uid) == (0, 0) for member in tar)
    table = corpus.read_table(table_path("gradient", UNITS[1])).to_pylist()
    with Artefacts(corpus, "gradient", UNITS[1]) as found:
        for row in table:
            artefact = found.get(row["row"])
            assert artefact is not None and artefact.data == json.loads(row["data"])
            raw = decode_raw(artefact.members["raw.png"])
            assert raw.dtype == np.uint16 and round(float(raw.mean()), 3) == artefact.data["mean"]


def test_only_what_is_missing_is_annotated(counting: None, context: Callable[..., Context]) -> None:
    build(context({"gradient": {}}, min_side=90), workers=0, until="annotate")
    assert len(Gradient.annotated) == 2
    more = context({"gradient": {}}, min_side=70)
    build(more, workers=0, until="annotate")
    assert len(Gradient.annotated) == 3  # only the photograph that is new
    fresh = context({"gradient": {}}, "fresh", min_side=70)
    build(fresh, workers=0, until="annotate")
    assert _files(more.corpus, "artefacts") == _files(fresh.corpus, "artefacts")
    Gradient.annotated.clear()
    build(context({"gradient": {}}, min_side=110), workers=0, until="annotate")
    assert Gradient.annotated == []
    build(context({"gradient": {"strength": 2}}, min_side=110), workers=0, until="annotate")
    assert len(Gradient.annotated) == 1  # other parameters are another annotator


def test_files_that_the_marker_does_not_vouch_for_are_made_again(
    counting: None, context: Callable[..., Context]
) -> None:
    here = context({"gradient": {}}, min_side=70)
    build(here, workers=0, until="annotate")
    torn = members_path("gradient", UNITS[0])
    here.corpus.write_bytes(torn, here.corpus.read_bytes(torn)[:-1] + b"x")
    Gradient.annotated.clear()
    build(context({"gradient": {}}, min_side=110), workers=0, until="annotate")
    assert len(Gradient.annotated) == 1  # the astronaut, who was annotated before
    fresh = context({"gradient": {}}, "fresh", min_side=110)
    build(fresh, workers=0, until="annotate")
    assert _files(here.corpus, "artefacts") == _files(fresh.corpus, "artefacts")


def test_one_that_needs_another_runs_after_it_and_again_when_that_changes(
    counting: None, context: Callable[..., Context]
) -> None:
    here = context({"steepness": {}, "gradient": {}})
    annotators = AnnotateStage(here).annotators
    assert list(annotators) == ["gradient", "steepness"]  # though registered the other way round
    assert [phase(name, annotators) for name in annotators] == [0, 1]
    build(here, workers=0, until="annotate")
    with Artefacts(here.corpus, "steepness", UNITS[0]) as steep, Artefacts(here.corpus, "gradient", UNITS[0]) as flat:
        found, base = steep.get(1), flat.get(1)
        assert found and base and found.data["twice"] == 2 * base.data["mean"]
        assert found.data["told"] == f"brightness {base.data['mean']}"  # its record says what the first one found
    Steepness.annotated.clear()
    build(context({"steepness": {}, "gradient": {"strength": 2}}), workers=0, until="annotate")
    assert len(Steepness.annotated) == 4


def test_an_error_costs_the_row_its_artefact_and_is_on_record(counting: None, context: Callable[..., Context]) -> None:
    here = context({"gradient": {}}, min_side=100)
    Gradient.refused.add(120)  # the astronaut
    build(here, workers=0)
    rows = [
        row
        for unit in UNITS
        for row in here.corpus.read_table(ledger.ledger_path("annotate", f"{unit}.gradient")).to_pylist()
    ]
    failed = [row for row in rows if row["reason"]]
    assert [(r["status"], r["reason"], r["detail"]) for r in failed] == [
        ("kept", "error:ValueError", "too wide to think about")
    ]
    with Artefacts(here.corpus, "gradient", UNITS[0]) as found:
        assert [found.get(row) is None for row in (0, 1)] == [True, False]
    attempts = here.corpus.read_table(ledger.ledger_path("build", UNITS[0])).to_pylist()
    assert {row["uid"] for row in attempts} >= {failed[0]["uid"]}  # builders go on without it


def test_an_annotator_that_always_fails_ends_the_job(
    counting: None, context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.stages import annotate

    monkeypatch.setattr(annotate, "_ALL_FAILED", 2)
    Gradient.refused.update(range(1000))
    with pytest.raises(AnnotatorError, match="gradient fails for every image of photos-000000: error:ValueError"):
        build(context({"gradient": {}}), workers=0)


def test_a_missing_model_is_told_with_its_line_before_anything_runs(
    context: Callable[..., Context], models: Path, tmp_path: Path
) -> None:
    section = _grounded(models)
    section["entities"]["segmenter"]["model"] = str(tmp_path / "nowhere")
    here = context(section)
    with pytest.raises(RecipeError) as error:
        build(here, workers=0)
    line = 1 + (tmp_path / "corpus.yaml").read_text().split("\n").index(f"      model: {tmp_path}/nowhere")
    assert f"corpus.yaml:{line}: annotate.entities.segmenter.model: " in str(error.value)
    assert not here.corpus.exists("")


def test_a_builder_names_the_annotator_that_it_lacks(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "maps.yaml"
    source = f'sources: [{{name: photos, type: folder, path: "{photos}"}}]'
    path.write_text(f"name: maps\n{source}\nbuild:\n  condition_maps: {{maps: [semantic]}}\n")
    with pytest.raises(RecipeError, match=r"maps.yaml:4: build.condition_maps: this needs the annotator semantic"):
        build(Context(Folder(str(tmp_path / "corpus")), load(path), str(tmp_path)), workers=0)


def test_every_annotator_is_described_by_its_name() -> None:
    for name, annotator in registry.ANNOTATORS.items():
        assert annotator.name == name and annotator.version and set(annotator.needs) <= set(registry.ANNOTATORS)
