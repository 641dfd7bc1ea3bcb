"""Latents beside the shards: the same bytes however they are made, complete, and never those of another shard."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from safetensors import safe_open
from typer.testing import CliRunner

from filters.models import ModelMissing
from fine_tune.tiny import VAE_DIR
from pipelines import ledger
from pipelines.cli import app
from pipelines.engine import Context
from pipelines.lint import lint
from pipelines.publish import publish_latents
from pipelines.recipes import RECIPE, load
from pipelines.run import build, encode_latents, publish_parts
from pipelines.storage import Folder
from schemas.latents import Latents
from schemas.recipe import RecipeError
from tests.corpora import make_corpus

ROOT = Path(__file__).parents[2]
WANTED = Latents(vae="tiny", sides=(64, 32), dtype="bfloat16")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published corpus without its ledger, as it comes from elsewhere: three streams, two shards each."""
    path = tmp_path_factory.mktemp("plain") / "corpus"
    make_corpus(path, ("control", "edit", "few_shot_1"), per_shard=3)
    return path


@pytest.fixture(scope="module")
def made(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with latents at 32 and 64 px, made in this process. Do not change it."""
    path = tmp_path_factory.mktemp("made") / "corpus"
    shutil.copytree(plain, path)
    encode_latents(Folder(str(path)), WANTED, workers=0)
    return path


@pytest.fixture
def corpus(made: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    shutil.copytree(made, tmp_path / "corpus")
    return tmp_path / "corpus"


def digests(corpus: Path) -> dict[str, str]:
    """Of everything that the stage has a hand in."""
    files = [*corpus.glob("latents/**/*.*"), *corpus.glob("meta/ledger/latents/*"), corpus / "manifest.json"]
    return {str(file.relative_to(corpus)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def times(corpus: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in corpus.glob("meta/ledger/latents/*.json")}


def findings(corpus: Path) -> list[str]:
    return [str(finding) for finding in lint(Folder(str(corpus)))]


def one(corpus: Path, pattern: str) -> Path:
    (found,) = corpus.glob(f"latents/{pattern}")
    return found


def test_every_input_and_target_is_where_the_table_says(made: Path) -> None:
    for side, shapes in ((32, {(8, 4, 4), (8, 2, 4), (8, 4, 2)}), (64, {(8, 8, 8)})):
        file = one(made, f"*-{side}/edit-000000.safetensors")
        data, rows = file.read_bytes(), pq.read_table(file.with_suffix(".parquet")).to_pylist()
        assert [row["member"] for row in rows] == ["input_1.jpg", "output.jpg"] * 3
        with safe_open(file, "pt") as stored:
            assert set(stored.keys()) == {f"{row['key']}.{row['member']}" for row in rows}
            for row in rows:
                tensor = stored.get_tensor(f"{row['key']}.{row['member']}")
                assert tensor.dtype == torch.bfloat16 and list(tensor.shape) == row["shape"]
                assert tensor.view(torch.uint8).numpy().tobytes() == data[row["offset"] :][: tensor.nbytes]
            assert stored.metadata()["side"] == str(side)
        assert {tuple(row["shape"]) for row in rows} & shapes


def test_manifest_and_card_list_them_and_lint_has_nothing_to_say(made: Path) -> None:
    assert findings(made) == []
    first, second = Folder(str(made)).read_json("manifest.json")["latents"]
    assert (first["side"], second["side"], first["vae_name"], first["dtype"]) == (32, 64, "tiny", "bfloat16")
    assert len(first["shards"]) == len(second["shards"]) == 6
    shard = made / "data/edit/edit-000000.tar"
    assert first["shards"]["edit-000000"]["shard_sha256"] == hashlib.sha256(shard.read_bytes()).hexdigest()
    assert f"`{first['folder']}`: 32 px by the VAE tiny, bfloat16" in (made / "README.md").read_text()
    counts = [marker.counts for marker in ledger.read_markers(Folder(str(made)), "latents").values()]
    assert sum(count["inputs"] for count in counts) == sum(count["kept"] for count in counts) == 36


@pytest.mark.slow
def test_killed_on_ray_and_resumed_without_gives_the_same_bytes(plain: Path, made: Path, tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    shutil.copytree(plain, path)
    sides = ["--side", "64", "--side", "32"]
    command = [sys.executable, "-m", "pipelines.cli", "latents", str(path), "--vae", "tiny", *sides, "--workers", "2"]
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 400
        while not times(path):
            assert driver.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.01)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    by_ray = times(path)
    encode_latents(Folder(str(path)), WANTED, workers=0)
    assert by_ray.items() <= times(path).items()  # what was done was not done again
    assert digests(path) == digests(made)


def test_only_what_is_missing_is_made(corpus: Path) -> None:
    before = times(corpus)
    encode_latents(Folder(str(corpus)), WANTED, workers=0)
    assert times(corpus) == before
    encode_latents(Folder(str(corpus)), Latents(vae="tiny", sides=(48,)), workers=0)
    assert before.items() <= times(corpus).items() and len(times(corpus)) == 18
    assert [entry["side"] for entry in Folder(str(corpus)).read_json("manifest.json")["latents"]] == [32, 48, 64]
    encode_latents(Folder(str(corpus)), Latents(vae="tiny", sides=(48,), dtype="float32"), workers=0)
    assert sum(times(corpus)[name] != time for name, time in before.items()) == 0
    assert findings(corpus) == []
    with safe_open(one(corpus, "*-48/edit-000001.safetensors"), "pt") as stored:
        assert {stored.get_tensor(name).dtype for name in stored.keys()} == {torch.float32}  # noqa: SIM118


def test_images_that_cannot_be_read_are_quarantined(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    shutil.copytree(plain, path)
    row = pq.read_table(path / "meta/samples/edit-000000.parquet").to_pylist()[1]
    with (path / row["shard"]).open("r+b") as tar:
        tar.seek(row["members"][1]["offset"])
        tar.write(b"\0" * 2000)
    encode_latents(Folder(str(path)), Latents(vae="tiny", sides=(32,)), workers=0)
    rows = pq.read_table(one(path, "*/edit-000000.parquet")).to_pylist()
    assert [place["offset"] < 0 for place in rows] == [False, False, True, True, False, False]
    entries = pq.read_table(next(path.glob("meta/ledger/latents/edit-000000.*.parquet"))).to_pylist()
    assert [(entry["status"], entry["reason"]) for entry in entries] == [
        ("kept", ""),
        ("quarantined", "undecodable image"),
        ("kept", ""),
    ]
    with safe_open(one(path, "*/edit-000000.safetensors"), "pt") as stored:
        assert len(stored.keys()) == 4
    assert [finding for finding in findings(path) if "latents/" in finding] == []


# Lint.


def patch(offset: int, data: bytes) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        content = bytearray(file.read_bytes())
        start = offset % len(content)
        content[start : start + len(data)] = data
        file.write_bytes(bytes(content))

    return apply


def reseal(corpus: Path) -> None:
    """Bring table, manifest and files in line, as a faulty encoder would."""
    folder = Folder(str(corpus))
    for path in folder.list("latents", ".parquet"):
        table = folder.read_table(path)
        digest = hashlib.sha256((corpus / path).with_suffix(".safetensors").read_bytes()).hexdigest()
        metadata = {**(table.schema.metadata or {}), b"sha256": digest.encode()}
        folder.write_table(path, table.replace_schema_metadata(metadata))

    publish_latents(folder)


def swap_rows(corpus: Path) -> None:
    path = one(corpus, "*-64/edit-000000.parquet")
    table = pq.read_table(path)
    pq.write_table(table.take([1, 0, *range(2, len(table))]), path)


def other_offset(corpus: Path) -> None:
    path = one(corpus, "*-64/edit-000000.parquet")
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["offset"], rows[1]["offset"] = rows[1]["offset"], rows[0]["offset"]
    pq.write_table(type(table).from_pylist(rows, table.schema), path)


def not_finite(corpus: Path) -> None:
    patch(-2, struct.pack("<H", 0x7FC0))(one(corpus, "*-64/edit-000000.safetensors"))
    reseal(corpus)


def new_shard(corpus: Path) -> None:
    folder = Folder(str(corpus))
    manifest = folder.read_json("manifest.json")
    manifest["streams"]["edit"]["shards"][0]["sha256"] = "0" * 64
    folder.write_json("manifest.json", manifest)


def remove(pattern: str) -> Callable[[Path], None]:
    return lambda corpus: one(corpus, pattern).unlink()


def forgotten(corpus: Path) -> None:
    for suffix in ("parquet", "safetensors"):
        one(corpus, f"*-64/edit-000000.{suffix}").unlink()
    reseal(corpus)


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another byte": (lambda c: patch(-5, b"x")(one(c, "*-64/edit-000000.safetensors")), "the manifest says"),
    "rows": (swap_rows, "other rows than the inputs and targets"),
    "offsets": (other_offset, "at another place than the table says"),
    "NaN": (not_finite, "not finite"),
    "stale": (new_shard, "are stale: their shard has changed"),
    "no tensors": (remove("*-64/edit-000000.safetensors"), "there is no such file"),
    "stray": (lambda c: (c / "latents/notes.txt").write_text("?"), "is not in the manifest"),
    "incomplete": (forgotten, "are missing: run `x2i latents` again"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_lint_finds(corpus: Path, fault: str) -> None:
    break_it, said = FAULTS[fault]
    break_it(corpus)
    found = [finding for finding in findings(corpus) if "latents" in finding]
    assert found and all(said in finding for finding in found)


# As a stage of a build.


@pytest.fixture
def built(corpus_path: Path, recipe_file: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A corpus with its ledger and parts, and its recipe."""
    shutil.copytree(corpus_path, tmp_path / "corpus")
    return tmp_path / "corpus", yaml.safe_load(recipe_file.read_text())


def rebuild(corpus: Path, recipe: dict[str, Any], work: Callable[..., None] = build, **options: Any) -> None:
    work(Context(Folder(str(corpus)), RECIPE.model_validate(recipe), ""), **options)


def test_a_build_makes_the_latents_that_its_recipe_asks_for(built: tuple[Path, dict[str, Any]]) -> None:
    """... and of a shard that is packed anew they are made anew, the old ones go."""
    corpus, recipe = built
    assert not (corpus / "latents").exists()
    with_latents = recipe | {"latents": {"vae": "tiny", "sides": [32]}}
    rebuild(corpus, with_latents, workers=0)
    assert findings(corpus) == []
    before = digests(corpus)
    names = {name for name in before if name.endswith(".safetensors")}
    assert len(names) == len(list(corpus.glob("data/*/*.tar")))

    larger = with_latents | {"pack": {"shard_bytes": "100MiB"}}
    rebuild(corpus, larger, work=publish_parts)
    assert any("are stale" in finding for finding in findings(corpus))
    rebuild(corpus, larger, workers=0)
    assert findings(corpus) == []
    streams = list(corpus.glob("data/*"))
    assert {name for name in digests(corpus) if name.endswith(".safetensors")} < names
    assert len(list(corpus.glob("latents/*/*.safetensors"))) == len(streams)

    kept = digests(corpus) | {"manifest.json": ""}
    rebuild(corpus, larger | {"latents": None}, workers=0)
    assert digests(corpus) | {"manifest.json": ""} == kept
    assert findings(corpus) == []


# What is refused.


def test_a_vae_that_is_not_there_is_said_with_its_line(recipe_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_file.read_text() + "latents:\n  sides: [32]\n  vae: /nowhere/vae\n")
    line = recipe.read_text().splitlines().index("  vae: /nowhere/vae") + 1
    with pytest.raises(RecipeError, match=rf"recipe.yaml:{line}: latents.vae: '/nowhere/vae': there is no /nowhere"):
        build(Context(Folder(str(tmp_path / "corpus")), load(recipe), str(tmp_path)), workers=0)
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("{vae: tiny}", "key 'sides' is missing"),
        ("{vae: tiny, sides: [100]}", "100 is not a positive multiple of 16"),
        ("{vae: org/vae, sides: [64]}", "needs the commit to use"),
        ("{vae: large, sides: [64]}", "is not one of 'tiny'"),
        ("{vae: tiny, sides: [64], dtype: int8}", "is not one of 'bfloat16'"),
        ("", "key 'vae' is missing"),
    ],
)
def test_a_wrong_section_is_refused(recipe_file: Path, tmp_path: Path, section: str, said: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_file.read_text() + f"latents: {section}\n")
    with pytest.raises(RecipeError) as refused:
        load(recipe)
    assert said in str(refused.value)


def test_a_vae_of_another_factor_is_refused(plain: Path, tmp_path: Path) -> None:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae: Any = AutoencoderKL(block_out_channels=(4, 4, 4), norm_num_groups=2, **blocks)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ModelMissing, match="shrinks images by 4, OmniGen's does by 8"):
        encode_latents(Folder(str(plain)), Latents(vae=str(tmp_path / "vae"), sides=(32,)), workers=0)


def test_the_command_takes_a_folder_inside_of_a_pipeline_and_explains_mistakes(
    plain: Path, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(plain, tmp_path / "corpus")
    shutil.copytree(VAE_DIR, tmp_path / "pipeline/vae")
    command = ["latents", str(tmp_path / "corpus"), "--workers", "0", "--side", "32"]
    done = CliRunner().invoke(app, [*command, "--vae", str(tmp_path / "pipeline"), "--subfolder", "vae"])
    assert done.exit_code == 0, done.output
    files = [one(path, "*-32/edit-000000.safetensors") for path in (tmp_path / "corpus", made)]
    assert files[0].read_bytes() == files[1].read_bytes()  # the same weights, so the same latents
    for options, said in ((["--vae", "org/vae"], "needs the commit"), (["--vae", "tiny", "--dtype", "x"], "bfloat16")):
        refused = CliRunner().invoke(app, [*command, *options])
        assert refused.exit_code == 2 and said in refused.output.replace("\n", " ")
