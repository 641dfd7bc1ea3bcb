"""The commands `train`, `check` and `sample` of `x2i`; `register` adds them to an app."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fine_tune.check import CheckReport
    from fine_tune.presets import Config

Overrides = Annotated[list[str] | None, typer.Argument(help="settings, as key=value or section.key=value")]
Preset = Annotated[str, typer.Option(help="tiny, lora, full, or stage1 to stage5 of the paper")]


Command = Callable[..., None]


def register(app: typer.Typer, wrap: Callable[[Command], Command]) -> None:
    """Add the commands of this module to `app`; `wrap` decides how their errors are shown."""
    for command in (train, check, sample):
        app.command(command.__name__)(wrap(command))


def train(
    overrides: Overrides = None,
    preset: Preset = "tiny",
    corpus: Annotated[str, typer.Option("--corpus", "-c", help="folder or fsspec URL of a corpus")] = "",
    run: Annotated[str, typer.Option(help="run folder; an earlier run in it is resumed")] = "",
    force: Annotated[bool, typer.Option(help="resume even though settings or data have changed")] = False,
) -> None:
    """Fine-tune OmniGen on a corpus."""
    from fine_tune.train import train as run_training

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = _config(preset, overrides, corpus, run)
    typer.echo(f"saved {run_training(config, force)}")
    typer.echo(f"loss curve {config.run.folder}/loss.png, sample grids {config.run.folder}/samples")


def check(
    corpus: Annotated[str, typer.Argument(help="folder or fsspec URL of a corpus")],
    overrides: Overrides = None,
    preset: Preset = "tiny",
    split: Annotated[str | None, typer.Option(help="which split; that of the preset if not given")] = None,
) -> None:
    """Read every sample of a corpus as a run would, and say what it would leave out; exits 1 if that is too much."""
    from fine_tune.check import check as run_check

    report = run_check(_config(preset, overrides, corpus, ""), split)
    _print_report(report)
    raise typer.Exit(0 if report.is_good else 1)


def sample(
    *,
    model: Annotated[str, typer.Option(help="pipeline folder or Hub id")],
    prompt: Annotated[str, typer.Option(help="instruction; input image k is <img><|image_k|></img>")],
    out: Annotated[Path, typer.Option(help="image file to write")],
    image: Annotated[list[Path] | None, typer.Option(help="input image; repeat for more", exists=True)] = None,
    height: Annotated[int, typer.Option(help="in pixels, a multiple of 16")] = 1024,
    width: Annotated[int, typer.Option(help="in pixels, a multiple of 16")] = 1024,
    steps: Annotated[int, typer.Option(help="flow steps", min=1)] = 50,
    guidance_scale: Annotated[float, typer.Option(help="how far to follow the instruction")] = 2.5,
    img_guidance_scale: Annotated[float, typer.Option(help="how far to follow the input images")] = 1.6,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
) -> None:
    """Draw an image with a trained model."""
    from PIL import Image

    from fine_tune.presets import ConfigError
    from fine_tune.sample import Pipeline

    pipeline: Any = Pipeline.from_pretrained(model)
    try:
        drawn = pipeline(
            prompt,
            [Image.open(path) for path in image or []],
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            img_guidance_scale=img_guidance_scale,
            seed=seed,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    drawn.save(out)
    typer.echo(out)


def _config(name: str, overrides: list[str] | None, corpus: str, run: str) -> Config:
    from fine_tune.presets import ConfigError, preset

    given = [f"data.corpus={json.dumps(corpus)}"] if corpus else []
    given += [f"run.folder={json.dumps(run)}"] if run else []
    config = preset(name, [*given, *(overrides or [])])
    if not config.data.corpus:
        raise ConfigError("no corpus: give --corpus, a folder made by `x2i build`")
    return config


def _print_report(report: CheckReport) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = (
        "stream",
        "samples",
        "bad",
        "tokens (median, most)",
        "targets (most frequent)",
        "share asked, got",
        "of tokens",
    )
    table = Table(*columns)
    for stream in report.streams:
        sizes = ", ".join(f"{width}x{height}" for (height, width), _ in stream.target_sizes.most_common(3))
        tokens = f"{stream.tokens[0]:,}, {stream.tokens[1]:,}"
        shares = f"{stream.requested:.1%}, {stream.realised:.1%}"
        table.add_row(
            stream.name, f"{stream.samples:,}", f"{stream.bad:,}", tokens, sizes, shares, f"{stream.tokens_share:.1%}"
        )
    Console().print(table)
    for title, skips in (("left out by the index", report.left_out), ("cannot be read", report.bad)):
        for reason, number in skips.counts.items():
            first = next(skip for skip in skips.examples if skip.reason == reason)
            typer.echo(f"{number:,} of {report.seen:,} samples {title}: {reason}, e.g. {first}")
    typer.echo(f"packs are {report.fill:.1%} full")
    if not report.is_good:
        typer.echo(f"a run would stop: more than data.max_skip_rate={report.max_skip_rate:g} of the samples are bad")
