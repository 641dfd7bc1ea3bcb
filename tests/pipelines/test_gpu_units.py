"""Units that reserve a share of a GPU, on a Ray that is told to have one. The model takes the device that it finds."""

from __future__ import annotations

import json
import os
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import yaml

from pipelines import ledger
from pipelines.engine import Context
from pipelines.recipes import RECIPE, load
from pipelines.run import build
from pipelines.storage import Folder
from schemas.recipe import RecipeError


@pytest.fixture
def a_gpu(tmp_path: Path) -> Iterator[Path]:
    """A Ray whose workers write what they do into the folder that this gives; one is lost at its second unit."""
    ray.shutdown()  # one of an earlier test
    log = tmp_path / "loads"
    log.mkdir()
    environment = {"worker_process_setup_hook": _logs_units(str(log))}
    ray.init(num_cpus=3, num_gpus=1, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield log
    ray.shutdown()


def _logs_units(folder: str) -> Callable[[], None]:
    def hook() -> None:
        from pipelines import engine

        run_unit, earlier = engine._run_unit, []

        def logged(stage: engine.Stage, task: engine.Task) -> ledger.Marker:
            lost = Path(folder, "lost")
            if earlier and task.num_gpus and not lost.exists():
                lost.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            earlier.append(task)
            Path(folder, f"{stage.name}-{task.unit}").write_text(json.dumps([task.num_gpus, task.model, os.getpid()]))
            return run_unit(stage, task)

        engine._run_unit = logged

    return hook


@pytest.mark.slow
def test_workers_with_a_share_of_a_gpu_keep_their_model_and_are_replaced_when_lost(
    a_gpu: Path, recipe_file: Path, tmp_path: Path
) -> None:
    recipe = yaml.safe_load(recipe_file.read_text())
    recipe["score"] = {"features": {"num_gpus": 0.5}, "nsfw": {"num_gpus": 0.5}}
    recipe["ingest"]["unit_rows"] = 1
    corpus = Folder(str(tmp_path / "corpus"))
    build(Context(corpus, RECIPE.model_validate(recipe), ""), workers=3, until="score")
    markers = ledger.read_markers(corpus, "score")
    assert len(markers) == 16
    assert all(marker.counts["kept"] == 1 for marker in markers.values())
    served = defaultdict(list)
    for file in a_gpu.glob("score-*"):
        num_gpus, model, process = json.loads(file.read_text())
        assert num_gpus == 0.5
        served[model].append(process)
    assert {model: len(units) for model, units in served.items()} == {"features": 8, "nsfw": 8}
    assert (a_gpu / "lost").exists()
    processes = [set(units) for units in served.values()]
    assert all(len(of_model) <= 3 for of_model in processes)  # two fit the GPU, and one was lost
    assert not set.intersection(*processes)


@pytest.mark.slow
def test_without_a_gpu_a_share_of_one_is_an_error_and_not_a_wait(recipe_file: Path, tmp_path: Path) -> None:
    ray.shutdown()
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    wanting = tmp_path / "wanting.yaml"
    wanting.write_text(recipe_file.read_text() + "score:\n  features: {num_gpus: 0.5}\n")
    with pytest.raises(RecipeError, match=r"wanting\.yaml:\d+: score\.features: num_gpus reserves a share of a GPU"):
        build(Context(Folder(str(tmp_path / "corpus")), load(wanting), ""), workers=2, until="score")
