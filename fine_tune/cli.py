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
Preset = Annotated[str, typer.Option(help="tiny, lora, full, stages (the paper's five), stage1 to stage5, tiny_stages")]


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
    *,
    force: Annotated[bool, typer.Option(help="resume even though settings or data have changed")] = False,
    ray: Annotated[bool, typer.Option("--ray", help="on the workers of a Ray cluster")] = False,
    workers: Annotated[str, typer.Option(help="of Ray: how many, or fewest:most as there is room")] = "1",
    address: Annotated[str | None, typer.Option(help="of a Ray cluster, e.g. auto; else Ray starts here")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="only say what memory it takes on --workers devices")] = False,
    memory: Annotated[str, typer.Option(help="of each device, for --plan, as 80GB; else that of the one here")] = "",
) -> None:
    """Fine-tune OmniGen on a corpus: on this device, on the ranks that torchrun starts, or on a Ray cluster."""
    from fine_tune.parallel import join_torchrun
    from fine_tune.presets import ConfigError
    from fine_tune.storage import Location
    from fine_tune.train import train as run_training

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = _config(preset, overrides, corpus, run, needs_corpus=not plan)
    if plan:
        _print_plan(config, memory, parse_workers(workers)[0])
        return
    if memory:
        raise ConfigError("--memory is for --plan; a run has run.memory_gb")
    if ray:
        from fine_tune.cluster import train_on_ray

        saved = train_on_ray(config, parse_workers(workers), address, force)
    elif address or workers != "1":
        raise ConfigError("--workers and --address are for --ray")
    else:
        with join_torchrun(config) as world:
            saved = run_training(config, force, world)
            if world.rank:
                return
    typer.echo(f"saved {saved}")
    typer.echo(f"loss curve {config.run.folder}/loss.png")
    if (Location.of(config.run.folder) / "samples").exists():
        typer.echo(f"samples {config.run.folder}/samples")


def parse_workers(text: str) -> tuple[int, int]:
    """Fewest and most, of `4` or `2:8`; ConfigError for anything else."""
    from fine_tune.presets import ConfigError

    fewest, _, most = text.partition(":")
    if not (fewest.isdigit() and (most or fewest).isdigit() and 1 <= int(fewest) <= int(most or fewest)):
        raise ConfigError(f"--workers {text!r} is neither a number from 1 on nor fewest:most, as in 2:8")
    return int(fewest), int(most or fewest)


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


def _print_plan(config: Config, memory: str, ranks: int) -> None:
    """What a step takes, part by part, in the ways there are to train."""
    from rich.console import Console
    from rich.table import Table

    from fine_tune.planner import Planner, device_memory, largest_pack, largest_stage, parse_memory, typical_pack

    config = largest_stage(config)
    limit = parse_memory(memory) if memory else device_memory(config)
    sequences = largest_pack(config) if config.data.corpus else typical_pack(config)
    planner = Planner(config, sequences, limit, "cpu" if config.run.device == "cpu" else "cuda", ranks)
    parts = ("weights", "gradients", "optimizer", "average", "gathered", "activations")
    table = Table(*parts, "all", "host", "fits", "data.budget up to", "with")
    for candidate in planner.propose():
        taken = candidate.memory
        sizes = [getattr(taken, part) for part in parts]
        sizes[0] += taken.buffers + taken.vae
        fits = ("yes", f"{candidate.budget:,}") if candidate.fits else ("no", "")
        numbers = (f"{size / 1e9:.3g}" for size in (*sizes, taken.total, taken.host))
        table.add_row(*numbers, *fits, " ".join(candidate.settings) or "as configured")
    about = f"{len(sequences)} samples, {sum(map(len, sequences)):,} tokens, {planner.usable / 1e9:.3g} GB usable"
    typer.echo(f"GB on each of {ranks} devices ({planner.device}), for a pack of {about}; weights include the VAE's")
    Console(width=200).print(table)


def _config(name: str, overrides: list[str] | None, corpus: str, run: str, needs_corpus: bool = True) -> Config:
    from fine_tune.presets import ConfigError, preset

    given = [f"data.corpus={json.dumps(corpus)}"] if corpus else []
    given += [f"run.folder={json.dumps(run)}"] if run else []
    config = preset(name, [*given, *(overrides or [])])
    if needs_corpus and not config.data.corpus:
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
