"""The production recipe runs as it is, with each hub model replaced by a tiny one of the same kind and layout."""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from builders.registry import BUILDERS
from filters.scorers.registry import SCORERS
from pipelines import ledger
from pipelines.engine import Context
from pipelines.funnel import funnel
from pipelines.lint import lint
from pipelines.preflight import preflight
from pipelines.recipes import RECIPE, load
from pipelines.run import build
from pipelines.storage import Folder
from schemas.recipe import RecipeError, load_recipe
from tests.builders.map_models import save_depth_anything
from tests.builders.tiny_annotators import save_grounding_dino, save_human_parser, save_qwen_vl, save_sam2
from tests.builders.tiny_editors import save_inpainter, save_instruct_pix2pix
from tests.conftest import CAPTIONS
from tests.filters.tiny_models import VIT_WIDTH, save_aesthetic, save_classifier, save_clip, save_dinov2

PRODUCTION = Path(__file__).parents[2] / "recipes/production.yaml"


def use_tiny_models(score: dict[str, Any], root: Path) -> None:
    local = {
        "clip": save_clip(root / "clip"),
        "features": save_dinov2(root / "dinov2"),
        "nsfw": save_classifier(root / "nsfw", ["normal", "nsfw"]),
        "watermark": save_classifier(root / "watermark", ["No Watermark", "Watermark"]),
    }
    for name, folder in local.items():
        score[name] |= {"model": str(folder), "revision": ""}
    score["clip"]["aesthetic"] = {"model": str(save_aesthetic(root / "aesthetic"))}


def use_tiny_builders(recipe: dict[str, Any], root: Path) -> None:
    """The annotators and the models of `edit_pairs`, which here see 64 x 64 pixels and take one step."""
    annotate, edits = recipe["annotate"], recipe["build"]["edit_pairs"]
    dino, sam = save_grounding_dino(root / "dino"), save_sam2(root / "sam2")
    editors = {"inpainter": save_inpainter(root / "inpainter"), "editor": save_instruct_pix2pix(root / "editor")}
    annotate["caption"] |= _local(save_qwen_vl(root / "qwen"), max_tokens=8, num_gpus=0)
    annotate["depth"] |= _local(save_depth_anything(root / "depth"), num_gpus=0)
    annotate["crop_features"] |= _local(root / "dinov2", num_gpus=0)
    recipe["pair"]["judge"] |= _local(root / "qwen", max_tokens=4, num_gpus=0)
    annotate["garments"] |= _local(save_human_parser(root / "garments"), num_gpus=0)
    annotate["entities"] |= _local(dino, segmenter=_local(sam), num_gpus=0)
    for name, folder in editors.items():
        edits[name] |= _local(folder, steps=1, resolution=64, num_gpus=0)
    edits["gates"]["recheck"] |= _local(dino)
    edits["gates"]["clip"] |= _local(root / "clip")


def _local(folder: Path, **options: Any) -> dict[str, Any]:
    return {"model": str(folder), "revision": "", **options}


def write_tar(folder: Path, photographs: dict[str, np.ndarray]) -> None:
    """What img2dataset leaves: jpg, txt and json of each key."""
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number, (name, pixels) in enumerate(photographs.items()):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=92)
            fields = {"caption": CAPTIONS[name], "url": f"https://example.org/{name}.jpg", "status": "success"}
            fields |= {"x_robots_tag": "noai, unavailable_after: 25 Jun 2010 15:00:00 PST"} if name == "coffee" else {}
            members = {"jpg": file.getvalue(), "txt": CAPTIONS[name].encode(), "json": json.dumps(fields).encode()}
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_blocklists(folder: Path, photographs: dict[str, np.ndarray]) -> None:
    folder.mkdir()
    (folder / "removed.sha256").write_text("0" * 64 + "\n")
    (folder / "benchmark-images.phash").write_text("ff00ff00ff00ff00\n")
    np.save(folder / "benchmark-images.npy", -np.ones((1, VIT_WIDTH), np.float32))
    (folder / "benchmark-prompts.txt").write_text(CAPTIONS["rocket"] + "\n")
    (folder / "canaries.txt").write_text("canary-2d9c\n")


def test_it_asks_for_everything_there_is() -> None:
    recipe = load_recipe(PRODUCTION, RECIPE)
    assert set(recipe.builders()) == set(BUILDERS)
    assert set(recipe.scorers()) == set(SCORERS) - {"conse"}  # CLIP says the same, and better


def test_unknown_commits_are_named_with_their_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match=r"production.yaml:\d+: score\.\w+\.\w*: .*0{40}"):
        preflight(Context(Folder(str(tmp_path / "corpus")), load(PRODUCTION), str(PRODUCTION.parent)))


@pytest.mark.slow
def test_it_runs_end_to_end(photographs: dict[str, np.ndarray], tmp_path: Path) -> None:
    recipe = yaml.safe_load(PRODUCTION.read_text())
    use_tiny_models(recipe["score"], tmp_path / "models")
    use_tiny_builders(recipe, tmp_path / "models")
    write_tar(tmp_path / "web", photographs)
    write_blocklists(tmp_path / "blocklists", photographs)
    for rule in recipe["decide"]["filters"]:  # random models know nothing, and the photographs are small
        rule |= {bound: {"min": -1e9, "max": 1e9}[bound] for bound in ("min", "max") if bound in rule}
    recipe["decide"]["dedup"]["semantic"]["threshold"] = 1.0
    recipe["decide"]["filters"][-1]["min_quantile"] = 0.3
    (tmp_path / "production.yaml").write_text(yaml.safe_dump(recipe))
    folder = Folder(str(tmp_path / "corpus"))
    build(Context(folder, load(tmp_path / "production.yaml"), str(tmp_path)), 0)

    assert lint(folder) == []
    markers = ledger.read_markers(folder, "score")
    assert set(markers) == {f"web-000000.{name}" for name in recipe["score"]}
    assert not any(r["reason"] for n in folder.list("meta/ledger/score", ".parquet") for r in _rows(folder, n))
    for scorer in recipe["score"]:
        for row in _rows(folder, f"meta/scores/{scorer}/web-000000.parquet"):
            assert all(value is not None for value in row.values())
    steps = {step.name: step for step in funnel(folder)}
    assert steps["optout"].dropped == {"x-robots-tag: noai": 1}
    assert steps["blocklist:ngram"].dropped == {"blocklist:ngram": 1}
    assert steps["clip_score"].left == steps["clip_score"].entered - math.floor(0.3 * steps["clip_score"].entered)
    assert steps["semantic_duplicate"].left >= 3
    streams = {name.split("/")[1] for name in folder.list("data", ".tar")}
    assert {"text_to_image", "restore", "control", "edit"} <= streams
    edits = [row for name in folder.list("meta/ledger/build", ".parquet") for row in _rows(folder, name)]
    restyled = [row["reason"] for row in edits if row["input"].endswith("/edit_pairs/restyle_scene")]
    assert restyled and set(restyled) == {"misaligned"}  # random weights lose the picture, and the gates see it


def _rows(folder: Folder, name: str) -> list[dict[str, Any]]:
    return list(folder.read_table(name).to_pylist())
