"""The `x2i` command line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from fine_tune.cli import register
from pipelines.progress import console
from pipelines.storage import Folder

app = typer.Typer(
    help="Build OmniGen-style any-to-image training corpora from ordinary images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

RecipeArgument = Annotated[Path, typer.Argument(help="recipe YAML", exists=True, dir_okay=False)]
CorpusArgument = Annotated[
    str, typer.Argument(help="corpus folder: a path or an fsspec URL such as s3://bucket/corpus")
]
CorpusOption = Annotated[str, typer.Option("--corpus", "-c", help="where to build: a path or an fsspec URL")]
ImagesOption = Annotated[str | None, typer.Option(help="instead of the path of the recipe's only source")]


class ExportFormat(str, Enum):
    """The first four are for a corpus, the others for a training run."""

    X2I = "x2i"
    OMNIGEN2 = "omnigen2"
    INSTRUCTPIX2PIX = "instructpix2pix"
    OPEN_CLIP = "open_clip"
    DIFFUSERS = "diffusers"
    OFFICIAL = "official"
    PEFT = "peft"


_PACKAGES = ("schemas", "filters", "builders", "pipelines", "fine_tune")


class UsageError(RuntimeError):
    """Something the user can put right; shown without a traceback."""


def _friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Show errors that x2i itself defines as one message and exit 2; anything else is a bug and keeps its traceback."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except Exception as error:
            package = type(error).__module__.partition(".")[0]
            if not isinstance(error, FileNotFoundError) and package not in _PACKAGES:
                raise
            console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(2) from error

    return run


@app.command()
@_friendly
def plan(recipe: RecipeArgument, corpus: CorpusOption, images: ImagesOption = None) -> None:
    """List the sources and show the units a build would run. Writes the listing only."""
    from pipelines.preflight import preflight
    from pipelines.stages.ingest import IngestStage

    context = _context(recipe, corpus, images)
    preflight(context)
    tasks = IngestStage(context).tasks()
    done = _markers(context.corpus, "ingest")
    fresh = {t.unit for t in tasks if t.unit in done and done[t.unit].digest == t.digest}
    table = Table("source", "units", "to do", "items")
    for source in context.recipe.sources:
        units = [t for t in tasks if t.payload["source"] == source.name]
        todo = sum(t.unit not in fresh for t in units)
        table.add_row(source.name, f"{len(units):,}", f"{todo:,}", f"{sum(t.payload['items'] for t in units):,}")
    wanted = context.recipe
    used = {"scorers": wanted.scorers(), "annotators": wanted.annotators(), "builders": wanted.builders()}
    parts = [f"{kind} {', '.join(names) or 'none'}" for kind, names in used.items()]
    typer.echo(f"recipe {context.recipe.name}: {'; '.join(parts)}")
    _print(table)


@app.command()
@_friendly
def build(
    *,
    recipe: RecipeArgument,
    corpus: CorpusOption,
    images: ImagesOption = None,
    workers: Annotated[
        int, typer.Option(help="units at a time on Ray; 0 runs in this process without Ray", min=0)
    ] = os.cpu_count() or 1,
    address: Annotated[str | None, typer.Option(help="Ray cluster, e.g. auto or ray://head:10001")] = None,
    until: Annotated[
        str,
        typer.Option(
            help="last stage: ingest, score, neighbours, decide, annotate, pair, build, group, pack, latents, publish"
        ),
    ] = "publish",
) -> None:
    """Build a corpus, or bring it up to date: units that are done and unchanged are skipped."""
    from pipelines.run import build as run_build
    from pipelines.stages import STAGES

    if until not in (*STAGES, "publish"):
        raise UsageError(f"--until {until!r} is not one of {', '.join((*STAGES, 'publish'))}")
    context = _context(recipe, corpus, images)
    run_build(context, workers, address, until)
    if until == "publish":
        _print_summary(context.corpus)
        typer.echo(f"what was left out, and why: x2i stats {corpus}; what it looks like: x2i report {corpus}")


@app.command()
@_friendly
def publish(recipe: RecipeArgument, corpus: CorpusOption, images: ImagesOption = None) -> None:
    """Pack finished parts into shards and write card, indexes and manifest; runs no builder."""
    from pipelines.run import publish_parts

    context = _context(recipe, corpus, images)
    if not _markers(context.corpus, "build"):
        raise UsageError(f"{corpus}: nothing is built yet; run `x2i build {recipe} --corpus {corpus}`")
    publish_parts(context)
    _print_summary(context.corpus)


@app.command()
@_friendly
def latents(
    *,
    corpus: CorpusArgument,
    vae: Annotated[str, typer.Option(help="of the model to be trained: Hub id, folder, or tiny")],
    side: Annotated[list[int], typer.Option(help="longest side in pixels, as data.max_side; repeat for more")],
    revision: Annotated[str, typer.Option(help="commit of a Hub id")] = "",
    subfolder: Annotated[str, typer.Option(help="where in it the VAE is: vae in a diffusers pipeline")] = "",
    dtype: Annotated[str, typer.Option(help="to store: bfloat16, float16 or float32")] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    num_gpus: Annotated[float, typer.Option(help="of each worker; 0.5: two workers share one", min=0)] = 0,
    workers: Annotated[int, typer.Option(help="shards at a time on Ray; 0: in this process", min=0)] = os.cpu_count()
    or 1,
    address: Annotated[str | None, typer.Option(help="Ray cluster, e.g. auto or ray://head:10001")] = None,
) -> None:
    """Encode the images of a published corpus once, so that training neither decodes nor encodes them."""
    from pydantic import ValidationError

    from pipelines.run import encode_latents
    from schemas.latents import Latents

    folder = _published(_url(corpus))
    where = {"revision": revision, "subfolder": subfolder, "device": device, "num_gpus": num_gpus}
    try:
        wanted = Latents.model_validate({"vae": _absolute(vae), "sides": side, "dtype": dtype, **where})
    except ValidationError as error:
        raise UsageError("; ".join(f"{problem['msg']}" for problem in error.errors())) from error
    encode_latents(folder, wanted, workers, address)
    for entry in folder.read_json("manifest.json")["latents"]:
        size = sum(shard["bytes"] for shard in entry["shards"].values())
        typer.echo(
            f"{entry['folder']}: {entry['side']} px, {entry['vae_name']}, {entry['dtype']}, {size / 1e6:,.1f} MB"
        )


@app.command()
@_friendly
def status(corpus: CorpusArgument) -> None:
    """How far each stage is, and what became of its inputs."""
    from pipelines.viewing import progress

    folder = _existing(corpus)
    table = Table("stage", "units done", "inputs", "kept", "dropped", "quarantined")
    for row in progress(corpus).to_pylist():
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else cell for cell in row.values()))
    _print(table)
    interrupted = folder.list("work/attempts", ".json")
    if interrupted:
        typer.echo(f"{len(interrupted)} unit(s) running or interrupted, e.g. {interrupted[0]}")
    complete = folder.exists("manifest.json")
    typer.echo("published" if complete else "not published yet: run `x2i build` to go on")


@app.command()
@_friendly
def stats(
    corpus: CorpusArgument,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable, everything")] = False,
    plots: Annotated[Path | None, typer.Option(help="write a histogram per filter to this folder, as PNG")] = None,
) -> None:
    """Counts per stream and subtask, what each filter saw and refused, and why inputs were dropped or quarantined."""
    from pipelines.corpus import summary
    from pipelines.funnel import funnel
    from pipelines.funnel_views import funnel_table, plot_funnel
    from pipelines.ledger import reasons

    folder = _published(corpus)
    steps = funnel(folder)
    drawn = list(plot_funnel(steps, plots)) if plots else []
    if as_json:
        found = {"ledger": reasons(folder), "funnel": [step.to_json() for step in steps]}
        typer.echo(json.dumps(summary(folder) | found, indent=1, sort_keys=True))
        return
    _print_summary(folder)
    _print(funnel_table(steps))
    for path in drawn:
        typer.echo(path)
    table = Table("stage", "fate", "reason", "inputs")
    for stage, fates in reasons(folder).items():
        for fate, by_reason in fates.items():
            for reason, number in by_reason.items():
                table.add_row(stage, fate, reason, f"{number:,}")
    _print(table)


@app.command()
@_friendly
def lint(corpus: CorpusArgument) -> None:
    """Check every byte of a published corpus against its rules; exits 1 when something is wrong."""
    from pipelines.lint import lint as run_lint

    findings = run_lint(_published(corpus))
    for finding in findings:
        typer.echo(f"{finding.path}: {finding.rule}: {finding.detail}")
    typer.echo(f"{len(findings)} problem(s)" if findings else "no problems")
    raise typer.Exit(1 if findings else 0)


@app.command()
@_friendly
def calibrate(
    images: Annotated[
        Path | None,
        typer.Option(help="clean photographs; default: those of the demo", exists=True, file_okay=False),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="whose scorers and thresholds; default: built in", exists=True, dir_okay=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for calibration.json, .md and .png")] = Path("calibration"),
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Plant known faults into clean photographs; show how many each filter finds, and what it rejects wrongly."""
    from filters.calibration import report
    from pipelines import calibrate as calibration
    from pipelines.recipes import load

    checks = calibration.calibrate(images, load(recipe) if recipe else None)
    paths = calibration.write(checks, out)
    if as_json:
        typer.echo(json.dumps([check.to_json() for check in checks], indent=1, ensure_ascii=False))
        return
    _print(report.table(checks))
    for path in paths:
        typer.echo(path)


@app.command()
@_friendly
def preview(
    corpus: CorpusArgument,
    out: Annotated[Path, typer.Option(help="folder for the contact sheets")] = Path("preview"),
    per_subtask: Annotated[int, typer.Option(min=1, help="random samples per sheet")] = 6,
    seed: Annotated[int, typer.Option(help="which random samples")] = 0,
) -> None:
    """Draw contact sheets of random samples of every subtask."""
    from pipelines.preview import preview as run_preview

    for path in run_preview(_published(corpus), out, per_subtask, seed):
        typer.echo(path)


@app.command()
@_friendly
def report(
    corpus: CorpusArgument,
    out: Annotated[Path | None, typer.Option(help="file to write; default: report.html in the corpus")] = None,
    per_subtask: Annotated[int, typer.Option(min=1, help="random samples per subtask in the gallery")] = 4,
    seed: Annotated[int, typer.Option(help="which random samples")] = 0,
) -> None:
    """Write one page that shows the corpus: counts, funnel, distributions and a gallery. It needs no network."""
    from pipelines.report import render_report

    folder = _published(corpus)
    page = render_report(folder, per_subtask, seed).encode()
    if out is None:
        folder.write_bytes("report.html", page)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(page)
    typer.echo(f"{out or folder.path('report.html')}: {len(page) / 1e6:.1f} MB")


@app.command()
@_friendly
def export(
    *,
    source: Annotated[str, typer.Argument(help="corpus folder or URL, or the folder of a training run")],
    out: Annotated[Path, typer.Option(help="folder to write to")],
    kind: Annotated[
        ExportFormat,
        typer.Option(
            "--format", help="a corpus: x2i (official JSONL), omnigen2, instructpix2pix or open_clip; a run: the others"
        ),
    ] = ExportFormat.X2I,
    stream: Annotated[list[str] | None, typer.Option(help="corpus: only these streams")] = None,
    split: Annotated[str | None, typer.Option(help="corpus: only this split: train, val or test")] = None,
    merge: Annotated[bool, typer.Option(help="run: add the adapter to the weights")] = False,
    average: Annotated[bool, typer.Option(help="run: take the moving average of the weights")] = False,
) -> None:
    """Export a corpus for other trainers, or a training run to a model that others open."""
    from pipelines.export import export_omnigen2, export_x2i
    from pipelines.export_tables import export_instructpix2pix, export_open_clip

    exports = {
        ExportFormat.X2I: export_x2i,
        ExportFormat.OMNIGEN2: export_omnigen2,
        ExportFormat.INSTRUCTPIX2PIX: export_instructpix2pix,
        ExportFormat.OPEN_CLIP: export_open_clip,
    }
    match kind:
        case ExportFormat.DIFFUSERS | ExportFormat.OFFICIAL | ExportFormat.PEFT:
            from fine_tune.export import export_run

            typer.echo(export_run(source, out, kind.value, merge, average))
        case _:
            if _existing(source).exists("checkpoints"):
                raise UsageError(f"{source} is a training run: give --format diffusers, official or peft")
            try:
                count = exports[kind](_published(source), out, stream, split)
            except ValueError as error:
                raise UsageError(str(error)) from error
            typer.echo(f"{out}: {count:,} samples")


@app.command()
@_friendly
def forget(
    corpus: CorpusArgument,
    uids: Annotated[list[str] | None, typer.Argument(help="uids, their first 20 digits, or keys of samples")] = None,
    *,
    licence: Annotated[str | None, typer.Option(help="all images under this licence")] = None,
    file: Annotated[Path | None, typer.Option(help="a uid per line", exists=True, dir_okay=False)] = None,
    near_duplicates: Annotated[bool, typer.Option(help="and images that were dropped as near duplicates")] = False,
    reason: Annotated[str, typer.Option(help="for the list of tombstones")] = "",
    dry_run: Annotated[bool, typer.Option(help="say what would be done")] = False,
) -> None:
    """Take images out of a published corpus, with all that was made of them, and keep them out of later builds."""
    from pipelines import forget as forgetting
    from pipelines.tombstones import is_pending

    folder = _published(_url(corpus))
    named = [*(uids or []), *(line.split("#")[0].strip() for line in (file.read_text().splitlines() if file else ()))]
    named = [name for name in named if name]
    if not named and licence is None:
        if not is_pending(folder):
            raise UsageError("name images: uids, --file or --licence")
        forgetting.finish(folder)
        typer.echo(f"ended what was interrupted: {folder.url}")
        return
    found = forgetting.find_images(folder, named, licence, near_duplicates)
    why = reason or ("requested" if licence is None else f"licence {licence}")
    plan = forgetting.make_plan(folder, found) if dry_run else forgetting.forget(folder, found, why)
    table = Table("stream", "samples that go", "shards written anew", "shards that vanish")
    for stream, counts in plan.per_stream().items():
        table.add_row(stream, *(f"{n:,}" for n in counts))
    _print(table)
    typer.echo(f"{'would forget' if dry_run else 'forgot'} {len(plan.uids):,} image(s): {folder.url}")
    if plan.unknown:
        typer.echo(f"{len(plan.unknown):,} of them were not in the corpus, e.g. {plan.unknown[0]}")
    if plan.duplicates:
        more = f"{len(plan.duplicates):,} other image(s) were dropped as near duplicates of these"
        typer.echo(f"{more}, and a later build may keep them: --near-duplicates forgets them too")


@app.command()
@_friendly
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="as a page for people: docs/recipe.md")] = False,
) -> None:
    """Print the recipe's JSON Schema, with which editors complete and check YAML as it is typed."""
    from pipelines import reference
    from pipelines.recipes import RECIPE

    typer.echo(reference.markdown() if markdown else json.dumps(RECIPE.model_json_schema(), indent=1), nl=not markdown)


@app.command()
@_friendly
def submit(
    what: Annotated[
        list[str] | None, typer.Argument(help="recipe to build; with --train: settings, as key=value")
    ] = None,
    *,
    address: Annotated[str, typer.Option(help="job server of a Ray cluster, e.g. http://head:8265")],
    corpus: Annotated[str, typer.Option("--corpus", "-c", help="a path that the cluster has, or an fsspec URL")] = "",
    preset: Annotated[str, typer.Option("--train", help="train with this preset instead of building")] = "",
    run: Annotated[str, typer.Option(help="with --train: run folder, a path that the cluster has, or a URL")] = "",
    workers: Annotated[str, typer.Option(help="units at a time; with --train: ranks, or fewest:most")] = "",
    name: Annotated[str, typer.Option("--id", help="of the job, instead of one made from what it does")] = "",
    runtime_env: Annotated[
        Path | None, typer.Option(help="YAML for Ray's runtime_env: env_vars, pip ...", exists=True, dir_okay=False)
    ] = None,
    follow: Annotated[bool, typer.Option(help="print what the job prints until it ends")] = True,
    stop: Annotated[str, typer.Option(help="stop the job with this id")] = "",
) -> None:
    """Run a build or a training as a job on a Ray cluster. Submitting it again goes on where it stopped."""
    from pipelines import submit as jobs

    if stop:
        jobs.stop(jobs.connect(address), stop)
        typer.echo(f"stopped {stop}")
        return
    if not corpus or (preset and not run):
        raise UsageError("--corpus is needed, and with --train also --run")
    if preset:
        job = jobs.train_job(preset, what or [], _url(corpus), _url(run), workers or "1")
    elif what and len(what) == 1 and Path(what[0]).is_file():
        if not workers.isdigit():
            raise UsageError("--workers is needed: how many units the cluster builds at a time")
        job = jobs.build_job(Path(what[0]), _url(corpus), int(workers))
    else:
        raise UsageError("name one recipe file, or --train PRESET")
    client = jobs.connect(address)
    job_id = jobs.submit(client, job, jobs.read_runtime_env(runtime_env) if runtime_env else {}, name)
    typer.echo(f"job {job_id}; x2i submit --address {address} --stop {job_id} stops it")
    if follow:
        jobs.follow(client, job_id)


register(app, _friendly)


def _context(recipe: Path, corpus: str, images: str | None) -> Any:
    from pipelines.engine import Context
    from pipelines.recipes import load, with_images

    loaded = load(recipe) if images is None else with_images(load(recipe), _url(images))
    return Context(Folder(_url(corpus)), loaded, str(recipe.absolute().parent))


def _url(corpus: str) -> str:
    """For workers, which run in another folder."""
    return corpus if "://" in corpus else str(Path(corpus).absolute())


def _absolute(model: str) -> str:
    """A relative folder as workers can find it; ids and plain names as they are."""
    return str(Path(model).absolute()) if Path(model).is_dir() and model != "tiny" else model


def _existing(corpus: str) -> Folder:
    folder = Folder(corpus)
    if not folder.exists(""):
        raise UsageError(f"{corpus}: no such corpus; `x2i build RECIPE --corpus {corpus}` makes one")
    return folder


def _published(corpus: str) -> Folder:
    folder = _existing(corpus)
    if not folder.exists("manifest.json"):
        raise UsageError(f"{corpus}: not published (no manifest.json); run `x2i build` to the end first")
    return folder


def _markers(corpus: Folder, stage: str) -> dict[str, Any]:
    from pipelines.ledger import read_markers

    return read_markers(corpus, stage)


def _print_summary(corpus: Folder) -> None:
    from pipelines.corpus import summary

    found = summary(corpus)
    table = Table("stream", "subtask", "samples")
    for stream, content in found["streams"].items():
        for subtask, numbers in content["subtasks"].items():
            table.add_row(stream, subtask, f"{numbers['samples']:,}")
    _print(table)
    typer.echo(
        f"{found['samples']:,} samples in {found['shards']:,} shards, {found['bytes'] / 1e6:,.1f} MB: {corpus.url}"
    )


def _print(table: Table) -> None:
    from rich.console import Console

    Console().print(table)


if __name__ == "__main__":
    app()
