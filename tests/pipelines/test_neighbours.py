"""Scores to pairs to a keep-set, on real photographs: what runs again after which change, and who is found."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from PIL import Image

from filters.blocklists import ban_report
from filters.dedup import PAIRS
from pipelines import ledger
from pipelines.engine import Context
from pipelines.recipes import RECIPE
from pipelines.run import build
from pipelines.stages import neighbours
from pipelines.stages.decide import DecideStage
from pipelines.stages.neighbours import NeighboursStage, scorer_of
from pipelines.storage import Folder
from schemas.recipe import RecipeError

DEDUP = {
    "perceptual": {"radius": 8},
    "semantic": {"column": "features_embedding", "threshold": 0.9, "cluster_images": 6},
}


@pytest.fixture(scope="module")
def photos(photographs: dict[str, np.ndarray], tmp_path_factory) -> Path:
    """Eight photographs as PNG; of each a smaller JPEG copy; of one a crop; one file twice; two blank images."""
    folder = tmp_path_factory.mktemp("near")
    for name, pixels in photographs.items():
        image = Image.fromarray(pixels)
        image.save(folder / f"{name}.png")
        image.resize((image.width * 3 // 4, image.height * 3 // 4)).save(folder / f"{name}_small.jpg", quality=80)
    (folder / "zz_cat_again.png").write_bytes((folder / "cat.png").read_bytes())
    Image.fromarray(photographs["coffee"][8:-8, 8:-8]).save(folder / "coffee_crop.png")
    for i, side in enumerate((64, 128)):
        Image.new("RGB", (side, side), (90, 90, 90)).save(folder / f"blank_{i}.png")
    return folder


def recipe(photos: Path, **decide: object) -> dict:
    return {
        "name": "near",
        "sources": [{"name": "photos", "type": "folder", "path": str(photos)}],
        "ingest": {"unit_rows": 5},
        "score": {"phash": {}, "features": {}},
        "decide": {"filters": [], **decide},
        "build": {"captions": {}},
    }


def context(corpus: Path, data: dict) -> Context:
    return Context(Folder(str(corpus)), RECIPE.model_validate(data), str(corpus.parent))


def decided(corpus: Path, data: dict, workers: int = 0) -> dict[str, set[str]]:
    """Build up to `decide`; the units that ran, by stage."""
    before = {f: f.stat().st_mtime_ns for f in corpus.glob("meta/ledger/*/*.json")}
    build(context(corpus, data), workers, until="decide")
    ran = [f for f in corpus.glob("meta/ledger/*/*.json") if before.get(f) != f.stat().st_mtime_ns]
    stages = ("ingest", "score", "neighbours", "decide")
    return {stage: {f.stem for f in ran if f.parent.name == stage} for stage in stages}


def fates(corpus: Path) -> dict[str, dict]:
    folder = Folder(str(corpus))
    rows = [r for n in folder.list("meta/ledger/decide", ".parquet") for r in folder.read_table(n).to_pylist()]
    return {Path(r["input"]).name: r for r in rows}


def digests(corpus: Path, *folders: str) -> dict[str, str]:
    files = [f for name in folders for f in (corpus / name).rglob("*.parquet")]
    return {str(f.relative_to(corpus)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def built(photos, tmp_path_factory) -> Path:
    """Built in this process. Do not change it."""
    corpus = tmp_path_factory.mktemp("built") / "corpus"
    decided(corpus, recipe(photos, dedup=DEDUP))
    return corpus


@pytest.fixture
def corpus(built, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(built, tmp_path / "corpus"))


def test_the_best_copy_stays_and_the_others_name_it(built, photographs):
    fate = fates(built)
    uid = {name: row["uid"] for name, row in fate.items()}
    for name in photographs:
        assert fate[f"{name}.png"]["status"] == "kept"
        small = fate[f"{name}_small.jpg"]
        assert (small["reason"], small["detail"]) == ("near_duplicate", uid[f"{name}.png"])
        assert 0 <= small["value"] <= 8
    again = fate["zz_cat_again.png"]
    assert again["reason"] == "duplicate" and Path(again["detail"]).name == "cat.png"
    blank = [fate[f"blank_{i}.png"]["reason"] for i in range(2)]
    assert blank == ["near_duplicate", ""]  # of equal hashes the larger image stays
    assert sum(row["status"] == "kept" for row in fate.values()) in (9, 10)


def test_pairs_say_what_they_are(built):
    folder = Folder(str(built))
    tables = [folder.read_table(name) for name in folder.list("meta/neighbours/perceptual")]
    assert all(table.schema.equals(PAIRS) for table in tables)
    same = pa.concat_tables(tables).filter(pc.field("same")).to_pylist()
    blank = sorted(row["uid"] for name, row in fates(built).items() if name.startswith("blank"))
    assert [(row["uid_a"], row["uid_b"], row["distance"]) for row in same if row["uid_a"] in blank] == [(*blank, 0.0)]


def test_workers_and_parts_change_no_verdict(corpus, photos, tmp_path, monkeypatch):
    """Also not a byte: in one part, in several, and in several on Ray with two workers."""
    folders, verdicts = ("meta/neighbours", "meta/ledger/decide"), digests(corpus, "meta/ledger/decide")
    for kind in ("perceptual", "semantic"):
        monkeypatch.setitem(neighbours._ROWS_PER_PART, kind, 7)
    data, on_ray = recipe(photos, dedup=DEDUP), tmp_path / "ray"
    shutil.copytree(corpus, on_ray)
    assert len(decided(corpus, data)["neighbours"]) == len(decided(on_ray, data, workers=2)["neighbours"]) == 6
    assert digests(on_ray, *folders) == digests(corpus, *folders)
    assert digests(corpus, "meta/ledger/decide") == verdicts


def test_only_scores_and_distances_make_pairs_anew(corpus, photos):
    filters = [{"column": "pixels", "min": 2000}]
    ran = decided(corpus, recipe(photos, dedup=DEDUP, filters=filters))
    assert ran == {"ingest": set(), "score": set(), "neighbours": set(), "decide": {"all"}}
    nearer = DEDUP | {"perceptual": {"radius": 2}}
    ran = decided(corpus, recipe(photos, dedup=nearer, filters=filters))
    assert ran == {"ingest": set(), "score": set(), "neighbours": {"perceptual-00000"}, "decide": {"all"}}
    ran = decided(corpus, recipe(photos, filters=filters))
    assert ran["neighbours"] == set() and ran["decide"] == {"all"}
    assert not list(corpus.glob("meta/neighbours/*/*.parquet")) and not list(corpus.glob("meta/ledger/neighbours/*"))
    assert {row["reason"] for row in fates(corpus).values()} == {"", "duplicate"}
    assert not any(decided(corpus, recipe(photos, filters=filters)).values())


def test_without_dedup_there_is_nothing_to_do_and_no_scorer_to_name(photos, tmp_path):
    data = recipe(photos)
    del data["score"]
    assert NeighboursStage(context(tmp_path / "corpus", data)).tasks() == []


def test_a_quantile_that_moves_no_image_leaves_the_keep_set_alone(corpus, photos):
    def kept() -> dict[str, str]:
        outputs = ledger.read_markers(Folder(str(corpus)), DecideStage.name)["all"].outputs
        return {path: made["kept"] for path, made in outputs.items()}

    decided(corpus, recipe(photos, filters=[{"column": "pixels", "min": 12_000}]))
    first, dropped = kept(), {n for n, row in fates(corpus).items() if row["reason"] == "pixels"}
    assert dropped
    decided(corpus, recipe(photos, filters=[{"column": "pixels", "min": 12_001}]))
    assert kept() == first
    decided(corpus, recipe(photos))
    assert kept() != first


def test_block_lists_are_read_beside_the_recipe_and_a_changed_one_is_noticed(corpus, photos, photographs):
    fate = fates(corpus)
    (corpus.parent / "ban").mkdir()
    (corpus.parent / "ban/files.txt").write_text(fate["cat.png"]["uid"] + "\n")
    folder = Folder(str(corpus))
    scores = pa.concat_tables(folder.read_table(n) for n in folder.list("meta/scores/phash", ".parquet"))
    rocket = scores.filter(pc.field("uid") == fate["rocket.png"]["uid"])["phash"][0].as_py()
    (corpus.parent / "ban/hashes.txt").write_text(f"# benchmark\n{rocket:016x}\n")
    flower = pa.concat_tables(folder.read_table(n) for n in folder.list("meta/scores/features", ".parquet")).filter(
        pc.field("uid") == fate["flower.png"]["uid"]
    )
    np.save(corpus.parent / "ban/vectors.npy", np.array(flower["features_embedding"].to_pylist(), np.float32))
    lists = [
        {"kind": "sha256", "path": "ban/files.txt"},
        {"kind": "phash", "path": "ban/hashes.txt", "radius": 8},
        {"kind": "embedding", "path": "ban/vectors.npy", "column": "features_embedding", "threshold": 0.9},
    ]
    data = recipe(photos, blocklists=lists, dedup=DEDUP)
    assert decided(corpus, data)["decide"] == {"all"}
    fate = fates(corpus)
    for name in ("cat.png", "zz_cat_again.png"):
        assert (fate[name]["reason"], fate[name]["detail"]) == ("blocklist:sha256", "ban/files.txt:1")
    assert fate["cat_small.jpg"]["reason"] == ""  # nothing better is left
    assert (fate["rocket.png"]["reason"], fate["rocket.png"]["detail"]) == ("blocklist:phash", "ban/hashes.txt:2")
    assert fate["rocket_small.jpg"]["reason"] == "blocklist:phash"
    assert fate["flower.png"]["reason"] == "blocklist:embedding" and fate["flower.png"]["value"] > 0.99
    entries = pa.concat_tables(folder.read_table(n) for n in folder.list("meta/ledger/decide", ".parquet"))
    report = ban_report(entries, context(corpus, data).recipe.decide.blocklists)
    assert report["images"].to_pylist()[:2] == [2, 2] and report["images"][2].as_py() >= 1
    assert not any(decided(corpus, data).values())
    (corpus.parent / "ban/files.txt").write_text("# all are free\n" + "0" * 64)
    assert decided(corpus, data)["decide"] == {"all"}
    assert fates(corpus)["cat.png"]["status"] == "kept"


def test_a_bad_or_missing_list_stops_the_build_before_it_starts(photos, tmp_path):
    (tmp_path / "bad.txt").write_text("0" * 64 + "\nnot a hash\n")
    lists = [{"kind": "sha256", "path": "bad.txt"}, {"kind": "canary", "path": "missing.txt"}]
    with pytest.raises(RecipeError) as error:
        build(context(tmp_path / "corpus", recipe(photos, blocklists=lists)), 0)
    assert "bad.txt:2: expected 64 hexadecimal digits" in str(error.value) and "missing.txt" in str(error.value)
    assert not (tmp_path / "corpus").exists()


def test_the_scorer_of_a_column_comes_from_the_recipe(photos):
    model = RECIPE.model_validate(recipe(photos))
    assert scorer_of(model, "phash") == "phash" and scorer_of(model, "features_embedding") == "features"
    assert scorer_of(model, "width") is None and scorer_of(model, "clip_score") is None


def test_scores_of_other_images_are_noticed(corpus, photos):
    folder = Folder(str(corpus))
    name = folder.list("meta/scores/phash", ".parquet")[0]
    table = folder.read_table(name)
    folder.write_table(name, table.take(pa.array(range(len(table) - 1, -1, -1))))
    data = recipe(photos, blocklists=[{"kind": "phash", "path": "list.txt"}])
    (corpus.parent / "list.txt").write_text("0" * 16)
    with pytest.raises(ValueError, match=r"phash/.* has other rows"):
        decided(corpus, data)
