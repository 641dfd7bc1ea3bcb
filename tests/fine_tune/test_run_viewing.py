"""What a notebook sees of a run agrees with what the run has written."""

from __future__ import annotations

from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from fine_tune.metrics import MetricLog
from fine_tune.viewing import ViewingError, plot_losses, samples, side_by_side


@pytest.fixture
def run(tmp_path: Path) -> Path:
    log = MetricLog(tmp_path, 0, tensorboard=False)
    for step in (1, 2, 3):
        log.write(step, "train", {"loss_unweighted": 1 / step, "loss_unweighted_by_task": {"edit": 2 / step}})
    log.write(3, "held_out", {"loss_unweighted": 0.3, "loss_unweighted_by_task": {"edit": 0.3}})
    (tmp_path / "samples").mkdir()
    for step, colour in ((0, "red"), (100, "blue")):
        Image.new("RGB", (20, 10), colour).save(tmp_path / f"samples/step-{step:08d}.png")
    return tmp_path


def test_the_loss_curve_has_a_line_per_task_and_one_of_all(run: Path) -> None:
    train, held_out = plot_losses(run).axes
    lines = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in train.get_lines()}
    assert lines["all"] == [[1, 1], [2, 0.5], [3, pytest.approx(1 / 3)]]
    assert lines["edit"] == [[1, 2], [2, 1], [3, pytest.approx(2 / 3)]]
    assert held_out.get_title() == "held-out loss, unweighted"
    assert {line.get_label() for line in held_out.get_lines()} == {"edit", "all"}


def test_samples_are_those_of_the_last_step_or_of_a_given_one(run: Path) -> None:
    assert samples(run).getpixel((0, 0)) == (0, 0, 255)
    assert samples(str(run), 0).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ViewingError, match="nothing at step 50, but at 0, 100"):
        samples(run, 50)


def test_a_run_may_be_anywhere(run: Path) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(run), "/runs/viewed", recursive=True)
    assert samples("memory://runs/viewed").size == (20, 10)
    assert len(plot_losses("memory://runs/viewed").axes) == 2


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ViewingError, match="so it is no run"):
        plot_losses(tmp_path)
    with pytest.raises(ViewingError, match="has drawn no samples"):
        samples(tmp_path)


def test_images_stand_side_by_side_under_their_names() -> None:
    figure = side_by_side({"input": Image.new("L", (8, 4)), "target": Image.new("RGB", (4, 4))}, "Make it bright.")
    assert [axes.get_title("left") for axes in figure.axes] == ["input  8 x 4", "target  4 x 4"]
    assert figure.get_suptitle() == "Make it bright."
