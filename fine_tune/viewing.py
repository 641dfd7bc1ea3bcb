"""Looking at a run from a notebook: how its loss fell, what it draws, and an image beside what it should be.

    plot_losses("run")
    samples("run")
    side_by_side({"input": photograph, "target": map, "drawn": pipeline(...)})

Nothing here prints or writes. A run is a path or an fsspec URL.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from fine_tune.metrics import parse_metrics
from fine_tune.storage import Location

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL = 2.8  # inches, width of an image


class ViewingError(ValueError):
    """Something that the run does not have."""


def plot_losses(run: Location | Path | str) -> Figure:
    """The training loss per task over steps, and the held-out loss. Neither is weighted, so that tasks compare.

    Raises:
        ViewingError: nothing was trained there.
    """
    from matplotlib.figure import Figure

    file = Location.of(run) / "metrics.jsonl"
    if not file.exists():
        raise ViewingError(f"{run} has no metrics.jsonl, so it is no run; `x2i train --run` makes one")
    lines = parse_metrics(file.read().decode())
    tasks = sorted({task for line in lines for task in line["loss_unweighted_by_task"]})
    figure = Figure(figsize=(11, 4), dpi=110, layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("train", "held_out"), strict=True):
        of_kind = [line for line in lines if line["kind"] == kind]
        for number, task in enumerate(tasks):
            known = [line for line in of_kind if line["loss_unweighted_by_task"].get(task) is not None]
            losses = [line["loss_unweighted_by_task"][task] for line in known]
            style = {"label": task, "linewidth": 1, "alpha": 0.6, "marker": "." * (len(known) == 1)}
            axes.plot([line["step"] for line in known], losses, f"C{number}" + "--" * (number >= 10), **style)
        axes.plot([line["step"] for line in of_kind], [line["loss_unweighted"] for line in of_kind], "k", label="all")
        axes.set(title=f"{kind.replace('_', '-')} loss, unweighted", xlabel="step", ylabel="mean squared error")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def samples(run: Location | Path | str, step: int | None = None) -> Image.Image:
    """What a run has drawn of held-out samples: a row for each, with its input images, the target, and the drawn image.

    Args:
        step: after which; the last one that there is, unless given.

    Raises:
        ViewingError: nothing was drawn at that step; the message lists the steps.
    """
    files = {int(file.name[5:-4]): file for file in (Location.of(run) / "samples").list() if file.name.endswith(".png")}
    if not files:
        raise ViewingError(f"{run} has drawn no samples: run.sample_every is 0, or the corpus has no held-out split")
    if step is not None and step not in files:
        raise ViewingError(f"{run} has drawn nothing at step {step}, but at {', '.join(map(str, files))}")
    return Image.open(io.BytesIO(files[max(files) if step is None else step].read()))


def side_by_side(images: Mapping[str, Image.Image], title: str = "") -> Figure:
    """Images in a row, each under its name.

    Args:
        title: to stand above them, e.g. the instruction.
    """
    from matplotlib.figure import Figure

    tallest = max(image.height / image.width for image in images.values())
    figure = Figure(figsize=(_CELL * len(images), _CELL * tallest + 0.7), dpi=110, layout="constrained")
    for axes, (name, image) in zip(figure.subplots(1, len(images), squeeze=False)[0], images.items(), strict=True):
        axes.imshow(image, cmap="gray")
        axes.set_title(f"{name}  {image.width} x {image.height}", fontsize=9, loc="left")
        axes.axis("off")
    figure.suptitle(title, fontsize=10, wrap=True)
    return figure
