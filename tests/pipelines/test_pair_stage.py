"""Folders of subjects become pairs, and pairs become samples: on real photographs of things seen several times."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from builders.annotators import captioners
from builders.annotators.crop_features import CropFeatures, CropFeaturesParams, read_features, square_crop
from builders.annotators.same_subject import SameSubject, read_yes
from builders.base import SourceImage
from filters.models import ModelMissing
from pipelines import ledger
from pipelines.artefacts import Artefacts
from pipelines.cli import app
from pipelines.corpus import iter_index
from pipelines.engine import Context
from pipelines.funnel import funnel
from pipelines.lint import lint
from pipelines.recipes import RECIPE, load
from pipelines.run import build
from pipelines.stages.annotate import annotators_of
from pipelines.stages.build import BuildStage
from pipelines.stages.kept import kept_images
from pipelines.stages.pair import answers_path, paired, pairs_path
from pipelines.storage import Folder
from recipes.demo.collect_photos import read_photos, read_verified
from schemas.pairs import Judge
from schemas.recipe import RecipeError
from tests.builders.tiny_annotators import save_qwen_vl
from tests.filters.tiny_models import save_dinov2

# Real photographs, each another one of the same thing.
SUBJECTS = {
    "stoneware_jug": ("pexels-7303773.jpg", "pexels-cup-of-couple-7303788.jpg", "pexels-7303842.jpg"),
    "plywood_chair": ("pexels-7303782.jpg", "pexels-7303800.jpg"),
    "lined_notebook": ("pexels-7303992.jpg", "pexels-7303994.jpg", "pexels-7303995.jpg"),
}
SIDE = 200
RECIPE_FILE = Path(__file__).parents[2] / "recipes/subjects.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of DreamBooth, without any annotation."""
    root = tmp_path_factory.mktemp("subjects")
    photos = {photo["image"]: photo for photo in read_photos()}
    for subject, names in SUBJECTS.items():
        (root / subject).mkdir()
        for number, name in enumerate(names):
            photo = photos[name]
            image = Image.open(io.BytesIO(read_verified(photo["package"], photo["file"], photo["sha256"])))
            image.thumbnail((SIDE, SIDE))
            image.save(root / subject / f"{number}.jpg", quality=92)
    return root


def recipe(folder: Path, pair: dict[str, Any] | None, splits: dict[str, float] | None = None) -> dict[str, Any]:
    data = yaml.safe_load(RECIPE_FILE.read_text())
    data["sources"][0]["path"] = str(folder)
    data["ingest"]["unit_rows"] = 3
    data["decide"] = {"filters": [], "splits": splits or {}}
    data |= {"score": {}, "annotate": {"entities": {}, "crop_features": {}}}
    data["build"]["subject_crops"]["segment_boxes"] = False
    data["pair"] = pair
    if pair is None:
        del data["pair"]
    return data


def context(corpus: Path, data: dict[str, Any]) -> Context:
    return Context(Folder(str(corpus)), RECIPE.model_validate(data), str(corpus.parent))


@pytest.fixture(scope="module")
def built(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in this process. Do not change it."""
    corpus = tmp_path_factory.mktemp("built") / "corpus"
    build(context(corpus, recipe(folder, {})), workers=0)
    return corpus


@pytest.fixture
def corpus(built: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(built, tmp_path / "corpus"))


def ledger_of(corpus: Path) -> list[dict[str, Any]]:
    folder = Folder(str(corpus))
    return [row for name in folder.list("meta/ledger/pair", ".parquet") for row in folder.read_table(name).to_pylist()]


def files(corpus: Path, *folders: str) -> dict[str, bytes]:
    found = [path for name in folders for path in (corpus / name).rglob("*") if path.is_file()]
    return {str(path.relative_to(corpus)): path.read_bytes() for path in found}


def test_a_folder_of_subjects_makes_cross_image_samples(built: Path, folder: Path) -> None:
    corpus = Folder(str(built))
    rows = [row for table in iter_index(corpus, ["subject_1"]) for row in table.to_pylist()]
    cross = [row for row in rows if row["subtask"] == "cross_image"]
    assert len(cross) >= 8
    for row in cross:
        (reference,) = json.loads(row["references"])
        assert len(row["parents"]) == 2 and reference["uid"] in row["parents"]
        assert reference["evidence"] == "subject_id" and -1 <= reference["similarity"] <= 0.9
    scenes = {row["scene_id"] for row in cross}
    assert scenes == {f"subjects/{subject}" for subject in SUBJECTS}
    assert lint(corpus) == []


def test_every_candidate_has_a_fate(built: Path) -> None:
    rows = ledger_of(built)
    marker = ledger.read_markers(Folder(str(built)), "pair")["choose"]
    kept = [row for row in rows if row["status"] == "kept"]
    assert marker.counts["inputs"] == len(rows) and marker.counts["kept"] == len(kept) >= 8
    # Three photographs have six ordered pairs, two have two; some of them may be too alike.
    assert Counter(row["detail"] for row in rows)["subject_id"] == 6 + 2 + 6
    assert all(row["detail"] == "subject_id" for row in kept)
    steps = {step.name: step for step in funnel(Folder(str(built)))}
    similar = steps["pair:too_similar"]
    assert similar.histogram is not None and sum(similar.histogram.counts) == similar.entered
    assert steps["pair:stranger"].left >= len(kept)


def test_records_have_their_pairs_and_the_other_photographs(built: Path, folder: Path) -> None:
    here = context(built, recipe(folder, {}))
    splits, annotators = here.recipe.decide.splits, annotators_of(here.recipe)
    for unit in ("subjects-000000", "subjects-000001"):
        images = kept_images(here.corpus, unit, splits, annotators)
        for _, image in paired(here.corpus, unit, splits, annotators, images):
            assert isinstance(image, SourceImage)
            assert {pair.other for pair in image.record.pairs} == set(image.others)
            for pair in image.record.pairs:
                own, other = image.record.entities[pair.entity], image.others[pair.other].record
                assert other.entities[pair.other_entity].subject_id == own.subject_id
                assert other.uid != image.record.uid and image.others[pair.other].pixels.shape[:2] == (
                    other.height,
                    other.width,
                )


def test_subjects_are_named_by_their_folder_and_not_torn_apart(built: Path) -> None:
    table = Folder(str(built)).read_table("work/images/subjects-000000.parquet", ["entities", "width", "height"])
    for row in table.to_pylist():
        (entity,) = json.loads(row["entities"])
        assert entity["subject_id"] == f"subjects/{entity['label'].replace(' ', '_')}"
        assert entity["box"] == [0, 0, row["width"], row["height"]]


@pytest.mark.slow
def test_workers_change_no_byte(corpus: Path, folder: Path) -> None:
    made = ("meta/pairs", "meta/ledger/pair", "meta/ledger/build", "work/parts")
    expected = files(corpus, *made)
    for name in (*made, "manifest.json"):
        Folder(str(corpus)).remove(name)
    build(context(corpus, recipe(folder, {})), workers=2, until="build")
    assert expected and files(corpus, *made) == expected


def test_only_units_whose_pairs_change_are_built_again(corpus: Path, folder: Path) -> None:
    here = context(corpus, recipe(folder, {"max_per_image": 4}))
    before = {task.unit: task.digest for task in BuildStage(here).tasks()}
    stricter = context(corpus, recipe(folder, {"min_similarity": 0.99}))
    build(stricter, workers=0, until="pair")
    assert {row["status"] for row in ledger_of(corpus)} == {"dropped"}
    after = {task.unit: task.digest for task in BuildStage(stricter).tasks()}
    assert all(after[unit] != before[unit] for unit in before)
    relaxed = context(corpus, recipe(folder, {"min_similarity": 0.001}))
    build(relaxed, workers=0, until="pair")
    assert {task.unit: task.digest for task in BuildStage(relaxed).tasks()} == before  # as many pairs as before


def test_without_the_section_nothing_of_it_stays(corpus: Path, folder: Path) -> None:
    build(context(corpus, recipe(folder, None)), workers=0, until="pair")
    assert files(corpus, "meta/pairs", "meta/ledger/pair") == {}


@contextmanager
def judge(answers: list[str]) -> Iterator[str]:
    """A server with OpenAI's protocol that gives these answers in turn, over and over; its URL."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({"data": [{"id": "judge"}]})

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            text = answers[(len(asked) - 1) % len(answers)]
            self._send({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})

        def _send(self, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


def served(url: str, **rules: Any) -> dict[str, Any]:
    return {"judge": {"model": "judge", "base_url": url, "batch_size": 1, **rules}}


def answers_of(corpus: Path) -> list[dict[str, Any]]:
    folder = Folder(str(corpus))
    return [row for name in folder.list("meta/pairs/answers") for row in folder.read_table(name).to_pylist()]


def test_a_judge_cross_verifies_every_subject_and_is_asked_once(corpus: Path, folder: Path) -> None:
    with judge(["Yes, it is."]) as url:
        build(context(corpus, recipe(folder, served(url))), workers=0, until="pair")
        said = answers_of(corpus)
        open_pairs = [row for row in ledger_of(corpus) if row["status"] == "kept"]
        assert len(said) == len(open_pairs) / 2  # each pair once, for both directions
        assert {row["same"] for row in said} == {True} and {row["text"] for row in said} == {"Yes, it is."}
    with judge(["No."]) as url:  # what was asked before is not asked again, at whatever address
        stricter = recipe(folder, served(url, min_yes=0.8) | {"max_per_image": 1})
        build(context(corpus, stricter), workers=0, until="pair")
        assert answers_of(corpus) == said
        other = served(url, prompt="Are both photos of one {noun}? Answer yes or no.")
        build(context(corpus, recipe(folder, other)), workers=0, until="pair")
    assert {row["same"] for row in answers_of(corpus)} == {False}
    assert {row["reason"] for row in ledger_of(corpus)} - {"too_different", "near_duplicate"} == {"judge_ratio"}


@pytest.mark.slow
def test_a_model_in_this_process_judges_on_any_number_of_workers(
    corpus: Path, folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Random weights say neither yes nor no, which is on record; bytes are the same with and without Ray."""
    model = save_qwen_vl(tmp_path / "qwen")
    data = recipe(folder, {"judge": {"model": str(model), "max_tokens": 4, "max_pixels": 16384}})
    beside = Path(shutil.copytree(corpus, tmp_path_factory.mktemp("beside") / "corpus"))
    build(context(corpus, data), workers=0, until="pair")
    said = answers_of(corpus)
    assert said and all(row["text"] and -20 < row["mean_logprob"] < 0 for row in said)
    assert {row["same"] for row in said} == {None}
    assert "judge_unreadable" in {row["reason"] for row in ledger_of(corpus)}
    build(context(beside, data), workers=2, until="pair")
    assert files(beside, "meta/pairs", "meta/ledger/pair") == files(corpus, "meta/pairs", "meta/ledger/pair")


@pytest.mark.parametrize(
    ("text", "same"),
    [("Yes", True), ("no.", False), ("**No**, they differ. Yes?", False), ("I cannot tell", None), ("Noyes", None)],
)
def test_the_first_yes_or_no_counts(text: str, same: bool | None) -> None:
    assert read_yes(text) is same


def test_a_picture_that_a_server_refuses_costs_its_own_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioners, "_PAUSE_S", 0.0)
    crop = np.zeros((64, 64, 3), np.uint8)

    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(400, "bad picture")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        params = Judge(model="judge", base_url=f"http://127.0.0.1:{server.server_port}/v1")
        verdicts = SameSubject(params).ask("jug", [(crop, crop)] * 2)
        server.shutdown()
        thread.join()
    assert [verdict.same for verdict in verdicts] == [None, None] and "refuses" in verdicts[0].text


def test_a_missing_judge_and_a_missing_annotator_are_told_with_their_line(folder: Path, tmp_path: Path) -> None:
    source = f'sources: [{{name: photos, type: folder, path: "{folder}"}}]'
    path = tmp_path / "pairs.yaml"
    path.write_text(f"name: pairs\n{source}\npair:\n  judge:\n    model: {tmp_path}/nowhere\nbuild: {{captions: }}\n")
    with pytest.raises(RecipeError) as error:
        build(Context(Folder(str(tmp_path / "corpus")), load(path), str(tmp_path)), workers=0)
    assert "pairs.yaml:3: pair: this needs the annotator crop_features" in str(error.value)
    assert f"pairs.yaml:5: pair.judge.model: '{tmp_path}/nowhere'" in str(error.value)


def test_an_empty_section_asks_for_its_defaults(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.yaml"
    text = f'name: pairs\nsources: [{{name: p, type: folder, path: "{folder}"}}]\nbuild: {{captions: }}\n'
    path.write_text(text + "annotate: {crop_features: }\npair:\n")
    assert load(path).pair == RECIPE.model_validate(recipe(folder, {})).pair.model_copy()
    path.write_text(text)
    assert load(path).pair is None and "pair" not in load(path).model_dump()


def test_one_command_builds_from_a_folder(folder: Path, tmp_path: Path) -> None:
    few = tmp_path / "mine"
    shutil.copytree(folder / "plywood_chair", few / "plywood_chair")
    arguments = ["build", str(RECIPE_FILE), "--images", str(few), "-c", str(tmp_path / "corpus"), "--workers", "0"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "cross_image" in result.output
    assert yaml.safe_load((tmp_path / "corpus/recipe.yaml").read_text())["sources"][0]["path"] == str(few)


def test_images_replace_the_path_of_one_source_only(folder: Path, tmp_path: Path) -> None:
    data = recipe(folder, None)
    data["sources"].append({"name": "more", "type": "folder", "path": str(folder)})
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    arguments = ["build", str(path), "--images", str(folder), "-c", str(tmp_path / "corpus")]
    result = CliRunner().invoke(app, arguments)
    line = 1 + path.read_text().split("\n").index("sources:")
    assert result.exit_code == 2
    assert f"two.yaml:{line}: sources: images are given for one source, and there are subjects, more" in " ".join(
        result.output.split()
    )


def test_features_are_stored_as_they_are_and_always_the_same(built: Path, folder: Path) -> None:
    here = context(built, recipe(folder, {}))
    annotators = annotators_of(here.recipe)
    needs = {"entities": annotators["entities"]}
    images = list(kept_images(here.corpus, "subjects-000000", here.recipe.decide.splits, needs))
    again = CropFeatures(CropFeaturesParams(batch_size=1)).annotate([image for _, image in images])  # type: ignore[misc]
    with Artefacts(here.corpus, "crop_features", "subjects-000000") as stored:
        for (row, image), made in zip(images, again, strict=True):
            found = stored.get(row)
            assert found is not None and found.data == made.data
            vectors = read_features(found)
            assert vectors.dtype == np.float16 and vectors.shape == (len(image.record.entities), 1280)
            np.testing.assert_allclose(np.linalg.norm(vectors.astype(float), axis=1), 1, atol=2e-3)
            np.testing.assert_allclose(vectors.astype(float), read_features(made).astype(float), atol=1e-3)


def test_a_vision_model_of_transformers_embeds_crops_too(built: Path, folder: Path, tmp_path: Path) -> None:
    here = context(built, recipe(folder, {}))
    (_, image), *_ = kept_images(here.corpus, "subjects-000000", here.recipe.decide.splits, {})
    assert isinstance(image, SourceImage)
    params = CropFeaturesParams(model=str(save_dinov2(tmp_path / "dinov2")), pool="cls")
    annotator = CropFeatures(params)
    annotator.preflight()
    (artefact,) = annotator.annotate([image])
    assert annotator.op().model == params.model and annotator.op().revision.startswith("sha256:")
    assert len(read_features(artefact)) == 1
    with pytest.raises(ModelMissing):
        CropFeatures(CropFeaturesParams(model=str(tmp_path / "nowhere"))).preflight()


def test_a_crop_is_square_and_neutral_where_there_is_nothing(built: Path, folder: Path) -> None:
    here = context(built, recipe(folder, {}))
    (_, image), *_ = kept_images(here.corpus, "subjects-000000", here.recipe.decide.splits, {})
    assert isinstance(image, SourceImage)
    (entity,) = image.record.entities
    height, width = image.pixels.shape[:2]
    crop = square_crop(image.pixels, entity, masked=False)
    assert crop.shape[0] == crop.shape[1] == -(-max(height, width) * 8 // 7)
    top, left = (len(crop) - height) // 2, (len(crop) - width) // 2
    inside = crop[top + 1 : top + height, left + 1 : left + width]
    assert abs(inside.mean() - image.pixels.mean()) < 2
    assert (crop[0] == crop[0, 0]).all()
    mask = [[0, 0, width / 2, 0, width / 2, height, 0, height]]
    half = square_crop(image.pixels, entity.model_copy(update={"mask": mask}), masked=True)
    assert (half[:, left + width // 2 + 2 :] == crop[0, 0]).all()


def test_paths_name_their_units() -> None:
    assert {pairs_path("a-000000"), answers_path("a-000000")} == {
        "meta/pairs/chosen/a-000000.parquet",
        "meta/pairs/answers/a-000000.parquet",
    }
