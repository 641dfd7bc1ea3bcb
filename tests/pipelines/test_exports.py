"""Exports open in the loaders that they are for: of diffusers' trainer, open_clip and OmniGen2."""

from __future__ import annotations

import io
import json
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import open_clip_train.data
import pytest
import torch
import yaml
from open_clip_train.data import get_wds_dataset
from PIL import Image
from typer.testing import CliRunner
from webdataset.tariterators import tar_file_expander

from pipelines.cli import app
from pipelines.corpus import iter_index, read_members
from pipelines.export import MIX, export_omnigen2, in_words
from pipelines.export_tables import export_instructpix2pix, export_open_clip
from pipelines.storage import Folder
from schemas.instructions import placeholder
from tests.corpora import STREAM_NAMES, make_corpus, photos
from tests.reading import bad, read, ready

RESOLUTION = 64


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def members(corpus: Folder, stream: str) -> dict[str, dict[str, Any]]:
    rows = [row for table in iter_index(corpus, [stream]) for row in table.to_pylist()]
    return {row["key"]: {**read_members(corpus, row), "split": row["split"]} for row in rows}


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_instructpix2pix_loads_as_the_trainer_of_diffusers_does(corpus: Folder, tmp_path: Path) -> None:
    """examples/instruct_pix2pix: columns by these names, images resized after `convert("RGB")`, prompts tokenised."""
    assert export_instructpix2pix(corpus, tmp_path / "out") == 6
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "hf"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 4, "validation": 1, "test": 1}
    image = datasets.Image()
    expected = {"input_image": image, "edit_prompt": datasets.Value("string"), "edited_image": image}
    assert loaded["train"].features == expected
    want = [sample for sample in members(corpus, "edit").values() if sample["split"] == "train"]
    for row, sample in zip(loaded["train"], want, strict=True):
        assert row["edit_prompt"] == "Tint the middle of the picture blue."
        for column, name in (("input_image", "input_1.jpg"), ("edited_image", "output.jpg")):
            np.testing.assert_array_equal(np.asarray(row[column]), np.asarray(Image.open(io.BytesIO(sample[name]))))
            pixels = np.array(row[column].convert("RGB").resize((RESOLUTION, RESOLUTION))).transpose(2, 0, 1)
            assert pixels.shape == (3, RESOLUTION, RESOLUTION)


def test_instructpix2pix_comes_back_as_finished_samples(corpus: Folder, tmp_path: Path) -> None:
    export_instructpix2pix(corpus, tmp_path)
    rows = read(Folder(str(tmp_path)), type="parquet_samples", path="data")
    assert not bad(rows)
    want = [(s["input_1.jpg"], s["output.jpg"]) for s in members(corpus, "edit").values()]
    assert sorted((row.inputs[0], row.output) for row in ready(rows).values()) == sorted(want)


def test_open_clip_trains_and_evaluates_on_it(corpus: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # For training it asks for webdataset <= 0.2.86, whose tar reader did not mark the end of a file.
    monkeypatch.setattr(open_clip_train.data, "tar_file_expander", partial(tar_file_expander, eof_value=None))
    assert export_open_clip(corpus, tmp_path) == 6
    sizes = {split: json.loads((tmp_path / split / "sizes.json").read_text()) for split in ("train", "val", "test")}
    assert sizes == {"train": {"00000.tar": 4}, "val": {"00000.tar": 1}, "test": {"00000.tar": 1}}
    for split, is_train in (("train", True), ("val", False)):
        args = Namespace(
            train_data=str(tmp_path / "train/{00000..00000}.tar"),
            val_data=str(tmp_path / "val/00000.tar"),
            train_num_samples=None,  # counted from sizes.json
            val_num_samples=None,
            train_data_upsampling_factors=None,
            batch_size=2 if is_train else 1,
            workers=0,
            world_size=1,
            seed=0,
        )

        def to_tensor(image: Image.Image) -> torch.Tensor:
            return torch.from_numpy(np.array(image.resize((32, 32))))

        loader = get_wds_dataset(args, to_tensor, is_train, tokenizer=lambda text: [text]).dataloader
        if is_train:
            assert (loader.num_samples, loader.num_batches) == (4, 2)
        batches = list(loader)
        assert all(images.shape[1:] == (32, 32, 3) for images, _ in batches)
        texts = sorted(text for _, texts in batches for text in texts)
        want = [s["txt"].decode() for s in members(corpus, "text_to_image").values() if s["split"] == split]
        assert texts == sorted(want)


def test_omnigen2_reads_the_mix_as_its_dataset_does(
    corpus: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """omnigen2_train_dataset.py: `load_dataset("json")` per entry, one concatenation, paths opened as they are."""
    assert export_omnigen2(corpus, tmp_path) == 6 * len(STREAM_NAMES)
    monkeypatch.chdir(tmp_path)
    mix = yaml.safe_load(Path(MIX).read_text())
    assert {(entry["type"], entry["ratio"]) for entry in mix["data"]} == {("t2i", 1.0), ("edit", 1.0), ("ic", 1.0)}
    parts = [
        datasets.load_dataset("json", data_files=entry["path"], cache_dir=str(tmp_path / "hf"))["train"]
        for entry in mix["data"]
    ]
    together = datasets.concatenate_datasets(parts)
    assert len(together) == 6 * len(STREAM_NAMES)
    for item in together:
        assert item["instruction"] and "<img>" not in item["instruction"] and item["task_type"]
        assert (item["input_images"] is None) == ("text_to_image" in item["task_type"])
        for path in (*(item["input_images"] or ()), item["output_image"]):
            Image.open(path).convert("RGB")
    two = next(item["instruction"] for item in together if item["task_type"].startswith("subject"))
    assert two == "The upper left looks like image 1, the lower right like image 2."


def test_omnigen2_comes_back_as_finished_samples(corpus: Folder, tmp_path: Path) -> None:
    export_omnigen2(corpus, tmp_path)
    rows = read(Folder(str(tmp_path)), type="x2i", path=MIX, image_root=".")
    assert not bad(rows)
    assert {row.stream for row in ready(rows).values()} == set(STREAM_NAMES)
    assert len(rows) == len(photos()) * len(STREAM_NAMES)


@pytest.mark.parametrize(
    ("instruction", "words"),
    [
        ("{} Remove the cup.", "Remove the cup."),
        ("{} becomes night.", "The image becomes night."),
        ("In {}, remove the cup.", "In the image, remove the cup."),
        ("Take the photo {} and remove the cup.", "Take the photo and remove the cup."),
        ("Here is a picture: {} Remove the cup.", "Here is a picture: Remove the cup."),
        ("What would {} look like without a cup?", "What would the image look like without a cup?"),
    ],
)
def test_an_image_in_words(instruction: str, words: str) -> None:
    assert in_words(instruction.format(placeholder(1)), 1) == words


def test_equal_corpora_give_equal_files_and_a_split_alone(corpus: Folder, tmp_path: Path) -> None:
    for export in (export_instructpix2pix, export_open_clip, export_omnigen2):
        a, b, one = (tmp_path / f"{export.__name__}-{name}" for name in ("a", "b", "one"))
        export(corpus, a)
        export(corpus, b)
        assert files(a) == files(b)
        assert export(corpus, one, split="test") == (len(STREAM_NAMES) if export is export_omnigen2 else 1)
        with pytest.raises(ValueError, match="no samples of split 'dev'"):
            export(corpus, tmp_path / "none", split="dev")


def test_the_command_refuses_streams_that_do_not_fit(corpus: Folder, tmp_path: Path) -> None:
    def export(kind: str, *streams: str) -> tuple[int, str]:
        chosen = [argument for stream in streams for argument in ("--stream", stream)]
        result = CliRunner().invoke(app, ["export", corpus.url, "--out", str(tmp_path), "--format", kind, *chosen])
        return result.exit_code, " ".join(result.output.split())

    assert export("instructpix2pix", "control") == (0, f"{tmp_path}: 6 samples")
    code, message = export("instructpix2pix", "edit", "subject_2")
    assert code == 2 and "InstructPix2Pix edits one image, and subject_2 takes 2: leave it out" in message
    code, message = export("open_clip", "edit")
    assert code == 2 and "single images with a text, and edit takes 1" in message
    only = make_corpus(tmp_path / "only", ["control"])
    with pytest.raises(ValueError, match="the corpus has nothing of the kind; streams that fit are edit, style"):
        export_instructpix2pix(only, tmp_path / "out")
