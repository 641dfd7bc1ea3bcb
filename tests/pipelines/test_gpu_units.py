"""Units that reserve a share of a GPU, on a Ray that is told to have one. The model takes the device that it finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import yaml

from pipelines import ledger
from pipelines.engine import Context
from pipelines.recipes import RECIPE
from pipelines.run import build
from pipelines.storage import Folder


@pytest.fixture
def a_gpu() -> Iterator[None]:
    ray.shutdown()  # one of an earlier test
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("a_gpu")
def test_a_scorer_that_reserves_half_a_gpu_runs_on_ray(recipe_file: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(recipe_file.read_text()) | {"score": {"features": {"num_gpus": 0.5}}}
    recipe["ingest"]["unit_rows"] = 8
    corpus = Folder(str(tmp_path / "corpus"))
    build(Context(corpus, RECIPE.model_validate(recipe), ""), workers=2, until="score")
    (marker,) = ledger.read_markers(corpus, "score").values()
    assert marker.counts["kept"] == 8
