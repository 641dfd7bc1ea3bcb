"""The `x2i` command line."""

from __future__ import annotations

import json
import os
from collections import Counter
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


class ExportFormat(str, Enum):
    """`x2i` is for a corpus, the others for a training run."""

    X2I = "x2i"
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
def plan(recipe: RecipeArgument, corpus: CorpusOption) -> None:
    """List the sources and show the units a build would run. Writes the listing only."""
    from pipelines.preflight import preflight
    from pipelines.stages.ingest import IngestStage

    context = _context(recipe, corpus)
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
    recipe: RecipeArgument,
    corpus: CorpusOption,
    workers: Annotated[
        int, typer.Option(help="units at a time on Ray; 0 runs in this process without Ray", min=0)
    ] = os.cpu_count() or 1,
    address: Annotated[str | None, typer.Option(help="Ray cluster, e.g. auto or ray://head:10001")] = None,
    until: Annotated[
        str, typer.Option(help="last stage: ingest, score, neighbours, decide, annotate, build, pack or publish")
    ] = "publish",
) -> None:
    """Build a corpus, or bring it up to date: units that are done and unchanged are skipped."""
    from pipelines.run import build as run_build
    from pipelines.stages import STAGES

    if until not in (*STAGES, "publish"):
        raise UsageError(f"--until {until!r} is not one of {', '.join((*STAGES, 'publish'))}")
    context = _context(recipe, corpus)
    run_build(context, workers, address, until)
    if until == "publish":
        _print_summary(context.corpus)


@app.command()
@_friendly
def publish(recipe: RecipeArgument, corpus: CorpusOption) -> None:
    """Pack finished parts into shards and write card, indexes and manifest; runs no builder."""
    from pipelines.run import publish_parts

    context = _context(recipe, corpus)
    if not _markers(context.corpus, "build"):
        raise UsageError(f"{corpus}: nothing is built yet; run `x2i build {recipe} --corpus {corpus}`")
    publish_parts(context)
    _print_summary(context.corpus)


@app.command()
@_friendly
def status(corpus: CorpusArgument) -> None:
    """How far each stage is, and what became of its inputs."""
    from pipelines.ledger import totals
    from pipelines.stages import STAGES

    folder = _existing(corpus)
    table = Table("stage", "units done", "inputs", "kept", "dropped", "quarantined")
    for stage in STAGES:
        markers = _markers(folder, stage)
        counts = totals(m.counts for m in markers.values())
        table.add_row(stage, f"{len(markers):,}", *(f"{n:,}" for n in counts.values()))
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

    folder = _published(corpus)
    steps = funnel(folder)
    drawn = list(plot_funnel(steps, plots)) if plots else []
    if as_json:
        found = {"ledger": _reasons(folder), "funnel": [step.to_json() for step in steps]}
        typer.echo(json.dumps(summary(folder) | found, indent=1, sort_keys=True))
        return
    _print_summary(folder)
    _print(funnel_table(steps))
    for path in drawn:
        typer.echo(path)
    table = Table("stage", "fate", "reason", "inputs")
    for stage, fates in _reasons(folder).items():
        for fate, reasons in fates.items():
            for reason, number in reasons.items():
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
def export(
    *,
    source: Annotated[str, typer.Argument(help="corpus folder or URL, or the folder of a training run")],
    out: Annotated[Path, typer.Option(help="folder to write to")],
    kind: Annotated[
        ExportFormat, typer.Option("--format", help="x2i: a corpus as official JSONL; the others: a run as a model")
    ] = ExportFormat.X2I,
    stream: Annotated[list[str] | None, typer.Option(help="x2i: only these streams")] = None,
    split: Annotated[str | None, typer.Option(help="x2i: only this split: train, val or test")] = None,
    merge: Annotated[bool, typer.Option(help="run: add the adapter to the weights")] = False,
    average: Annotated[bool, typer.Option(help="run: take the moving average of the weights")] = False,
) -> None:
    """Export a corpus to the official OmniGen JSONL, or a training run to a model that others open."""
    if kind is ExportFormat.X2I:
        from pipelines.export import export_x2i

        try:
            export_x2i(_published(source), out, stream, split)
        except ValueError as error:
            raise UsageError(str(error)) from error
        typer.echo(out)
    else:
        from fine_tune.export import export_run

        typer.echo(export_run(Path(source), out, kind.value, merge, average))


@app.command()
@_friendly
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="as a page for people: docs/recipe.md")] = False,
) -> None:
    """Print the recipe's JSON Schema, with which editors complete and check YAML as it is typed."""
    from pipelines import reference
    from pipelines.recipes import RECIPE

    typer.echo(reference.markdown() if markdown else json.dumps(RECIPE.model_json_schema(), indent=1), nl=not markdown)


register(app, _friendly)


def _context(recipe: Path, corpus: str) -> Any:
    from pipelines.engine import Context
    from pipelines.recipes import load

    url = corpus if "://" in corpus else str(Path(corpus).absolute())
    return Context(Folder(url), load(recipe), str(recipe.absolute().parent))


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


def _reasons(corpus: Folder) -> dict[str, dict[str, dict[str, int]]]:
    """Inputs per stage, fate and reason, from the ledger."""
    from pipelines.ledger import FOLDER

    found: dict[str, dict[str, Counter[str]]] = {}
    for name in corpus.list(FOLDER, ".parquet"):
        fates = found.setdefault(name.split("/")[2], {})
        for row in corpus.read_table(name, ["status", "reason"]).to_pylist():
            fates.setdefault(row["status"], Counter())[row["reason"]] += 1
    return {s: {f: dict(sorted(r.items())) for f, r in sorted(fates.items())} for s, fates in found.items()}


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
