"""Every command of README and docs is run: here, on small data, or by the test or Makefile line that is named here.

Pages are read from top to bottom as a user would, each in a folder of its own that has what its commands are about: a
recipe, photographs and a corpus. A new command needs nothing here, unless it cannot be run in a test.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from fine_tune.parallel import check_sharing
from fine_tune.presets import preset
from fine_tune.stages import StageConfig
from pipelines.cli import app
from tests.commands import COMMANDS, parse

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("recipes/**/README.md"))]
PROGRAMS = ("x2i", "python", "make", "torchrun")
OF_PAGES = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

# What needs minutes or a cluster: the words that mark it, and the test, or line of the Makefile, that runs it.
RUN_ELSEWHERE = {
    "make demo": "Makefile: \ndemo: ",
    "make test": "Makefile: \ntest: ",
    "x2i train --plan": 'tests/fine_tune/test_planner.py: ["train", "--plan", ',
    "x2i train --ray": "tests/pipelines/test_submit.py: def test_a_training_job_survives_the_loss_of_a_worker_and_of_",
    "torchrun": "tests/fine_tune/test_parallel.py: with join_torchrun(",
    "x2i build recipes/subjects.yaml": "tests/pipelines/test_pair_stage.py: recipes/subjects.yaml",
}

# What stands for the places that the pages name, relative to the folder that a page is run in.
PLACES = {"/data/": "data/", "s3://bucket/": "", "recipes/": f"{ROOT}/recipes/"}

# So little that a step takes a fraction of a second on a CPU.
SMALL_RUN = ["steps=2", "max_side=64", "budget=320", "packs_per_step=1", "device=cpu", "tensorboard=false"]
SMALL_RUN += ["eval_every=0", "sample_every=0", "save_every=0", "held_out_samples=0", "warmup_steps=1"]

# What a page takes for granted, and how it comes about.
GIVEN = {"lora_run": ("train", "--preset", "lora", "--corpus", "corpus", "--run", "lora_run")}


@dataclass(frozen=True)
class Command:
    """One command of a page, in words."""

    page: Path
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {shlex.join(self.words)}"


def blocks(page: Path) -> Iterator[tuple[str, int, str]]:
    """Language, number of the first line, and text of each fenced block."""
    text = page.read_text()
    for block in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        yield block[1], text.count("\n", 0, block.start(2)) + 1, block[2]


def commands(page: Path) -> Iterator[Command]:
    """Those of `PROGRAMS` in the fenced blocks of a page; a line that ends with a backslash goes on."""
    for language, start, text in blocks(page):
        if language in ("", "bash", "sh", "console"):
            for found in re.finditer(rf"^[ $]*((?:{'|'.join(PROGRAMS)})\s(?:.*\\\n)*.*)$", text, re.M):
                words = shlex.split(found[1].replace("\\\n", " "), comments=True)
                yield Command(page, start + text.count("\n", 0, found.start(1)), tuple(words))


ALL = [command for page in PAGES for command in commands(page)]


def elsewhere(command: Command) -> str:
    """Where it is run, if not here."""
    return next((where for marks, where in RUN_ELSEWHERE.items() if set(marks.split()) <= set(command.words)), "")


def test_the_pages_show_every_command() -> None:
    shown = {command.words[1] for command in ALL if command.words[0] == "x2i"}
    sentences = "".join(page.read_text() for page in PAGES)
    assert {name for name in COMMANDS if name not in shown and f"`x2i {name}" not in sentences} == {"publish"}


def existing(word: str) -> str:
    """Something that is there in place of a file or folder that the user has."""
    if word.startswith("/"):
        return str(ROOT)
    return str(ROOT / "README.md") if Path(word).suffix in (".yaml", ".txt", ".jpg", ".png") else word


@pytest.mark.parametrize("command", ALL, ids=str)
def test_a_command_has_options_and_values_that_exist(command: Command) -> None:
    program, *arguments = command.words
    if "pipelines.cli" in arguments:  # -m pipelines.cli
        program, arguments = "x2i", arguments[arguments.index("pipelines.cli") + 1 :]
    if program == "x2i":
        check_ranks(parse(["x2i", *map(existing, arguments)]))
    else:
        assert elsewhere(command), f"{command}: name the test that runs it in RUN_ELSEWHERE"


def check_ranks(values: dict[str, Any]) -> None:
    """The number of ranks of a training run, which is looked at only when a cluster is there."""
    if values.get("preset") and values.get("workers"):
        fewest, _, most = values["workers"].partition(":")
        config = preset(values["preset"], values.get("overrides") or values.get("what") or [])
        check_sharing(config, range(int(fewest), int(most or fewest) + 1))


@OF_PAGES
def test_a_command_in_a_sentence_has_options_that_exist(page: Path) -> None:
    sentences = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for name, rest in re.findall(r"`x2i ([a-z]+)([^`]*)`", sentences):
        assert name in COMMANDS, f"{page.name}: x2i has no command {name}"
        known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        assert set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest)) <= known, f"{page.name}: x2i {name}{rest}"


@pytest.mark.parametrize("where", RUN_ELSEWHERE.values())
def test_what_is_run_elsewhere_is_run_there(where: str) -> None:
    file, _, text = where.partition(": ")
    assert text in (ROOT / file).read_text()


def run(arguments: list[str], expect: int = 0) -> str:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == expect, f"x2i {shlex.join(arguments)}\n{result.output}"
    return result.output


@pytest.fixture(scope="module")
def base_model(corpus_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline folder, as a run of `tiny` exports it, in place of a model of the hub."""
    folder = tmp_path_factory.mktemp("base")
    run(["train", "--corpus", str(corpus_path), "--run", str(folder / "run"), *SMALL_RUN])
    run(["export", str(folder / "run"), "--format", "diffusers", "--out", str(folder / "base")])
    return folder / "base"


@pytest.fixture
def place(corpus_path: Path, recipe_file: Path, photo_folder: Path, tmp_path: Path) -> Iterator[Path]:
    """The folder in which a page is run, which is the current one meanwhile."""
    shutil.copytree(corpus_path, tmp_path / "corpus")
    shutil.copytree(photo_folder, tmp_path / "data/photos")
    scored = "score: {pixels: {}}\ndecide: {filters: [{column: blur, max: 9}, "
    (tmp_path / "mine.yaml").write_text(recipe_file.read_text().replace("decide: {filters: [", scored))
    with contextlib.chdir(tmp_path):
        yield tmp_path


def without(words: list[str], *options: str) -> list[str]:
    """The words without some options and their values."""
    gone = {i + step for i, word in enumerate(words) if word in options for step in (0, 1)}
    return [word for i, word in enumerate(words) if i not in gone]


def placed(word: str) -> str:
    for there, here in PLACES.items():
        if word.startswith(there):
            return here + word.removeprefix(there)
    return word


def of_stages(settings: list[str]) -> list[str]:
    """For presets in which every stage has some of the settings for itself."""
    own = {field.name for field in fields(StageConfig)}
    return ["stages.scale_steps=0.01", *(given for given in settings if given.partition("=")[0] not in own)]


def small(words: tuple[str, ...], place: Path, base_model: Callable[[], Path]) -> list[str]:
    """The arguments of `x2i` for the same work on what is in `place`, in little time."""
    name, *arguments = map(placed, words)
    match name:
        case "build" | "latents":
            arguments = [*without(arguments, "--workers", "--address"), "--workers", "0"]
        case "train":
            kind = parse(["x2i", name, *arguments])["preset"]
            arguments += of_stages(SMALL_RUN) if "stages" in kind else SMALL_RUN
            arguments += [] if kind.startswith("tiny") else [f"model.source={base_model()}"]
        case "calibrate":
            arguments += ["--recipe", "mine.yaml"]  # fewer scorers
        case "sample":
            arguments += ["--steps", "2"]
        case "forget":
            key = pq.read_table(place / arguments[0] / "meta/samples", columns=["key"])["key"][0].as_py()
            arguments = [key if word == "UID" else word for word in arguments]
        case "submit":
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
            arguments = [*without(arguments, "--address"), "--address", nobody]
    return [name, *arguments]


@OF_PAGES
def test_the_commands_of_a_page_run(page: Path, place: Path, request: pytest.FixtureRequest) -> None:
    def here(words: tuple[str, ...]) -> list[str]:
        return small(words, place, lambda: request.getfixturevalue("base_model"))

    todo = [command for command in commands(page) if not elsewhere(command)]
    for name, words in GIVEN.items():
        if any(name in command.words for command in todo):
            run(here(words))
    for command in todo:
        if command.words[1] == "submit":  # as far as the cluster, which tests/pipelines/test_submit.py has
            assert "no Ray job server answers" in run(here(command.words[1:]), expect=2), command
        else:
            run(here(command.words[1:]))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.name
)
@pytest.mark.usefixtures("place")
def test_the_python_of_a_page_runs(page: Path) -> None:
    names: dict[str, object] = {}
    for language, start, text in blocks(page):
        if language == "python":
            exec(compile("\n" * (start - 1) + text, str(page), "exec"), names)
