"""The X2I export satisfies what OmniGen's data loader and processor check, and carries the corpus unchanged."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipelines.export import JSONL, export_x2i
from pipelines.storage import Folder
from schemas.vocabulary import normalise_task
from tests.corpora import STREAM_NAMES, make_corpus, make_samples


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / JSONL).read_text("utf-8").splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_the_official_loader_and_processor_check(corpus: Folder, tmp_path: Path) -> None:
    """OmniGen/train_helper/data.py reads four fields; OmniGen/processor.py asserts on the placeholder ids."""
    assert export_x2i(corpus, tmp_path) == 6 * len(STREAM_NAMES)
    for line in lines(tmp_path):
        assert list(line) == ["task_type", "instruction", "input_images", "output_image"]
        ids = sorted({int(i) for i in re.findall(r"<\|image_(\d+)\|>", line["instruction"])})
        assert ids == list(range(1, len(ids) + 1))
        assert len(ids) == len(line["input_images"])
        for path in (*line["input_images"], line["output_image"]):
            assert (tmp_path / path).is_file()


def test_images_and_instructions_are_those_of_the_corpus(corpus: Folder, tmp_path: Path) -> None:
    export_x2i(corpus, tmp_path)
    exported = {Path(line["output_image"]).name.partition(".")[0]: line for line in lines(tmp_path)}
    samples = [sample for stream in STREAM_NAMES for sample in make_samples(stream)]
    assert exported.keys() == {sample.record.key for sample in samples}
    for sample in samples:
        line, record = exported[sample.record.key], sample.record
        assert line["instruction"] == record.instruction
        assert normalise_task(line["task_type"]) == (record.task, record.subtask)
        paths = [*line["input_images"], line["output_image"]]
        assert [(tmp_path / p).read_bytes() for p in paths] == [
            data for name, data in sample.images.items() if name != "edit_mask.png"
        ]


def test_the_export_can_be_narrowed_and_repeated(corpus: Folder, tmp_path: Path) -> None:
    assert export_x2i(corpus, tmp_path / "a", ["edit"], "val") == 1
    assert export_x2i(corpus, tmp_path / "b", ["edit"], "val") == 1
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert len(files(tmp_path / "a")) == 3
    with pytest.raises(ValueError, match="no samples of split 'dev'"):
        export_x2i(corpus, tmp_path / "c", split="dev")
    assert files(tmp_path / "c") == {}


def test_lists_have_a_type_from_the_first_line_on(corpus: Folder, tmp_path: Path) -> None:
    """The official trainer reads the lines with `datasets`, which infers types from the first ones."""
    datasets = pytest.importorskip("datasets")
    export_x2i(corpus, tmp_path, ["text_to_image", "subject_2"])
    first, *_, last = lines(tmp_path)
    assert (len(first["input_images"]), last["input_images"]) == (2, [])
    loaded = datasets.load_dataset("json", data_files=str(tmp_path / JSONL), cache_dir=str(tmp_path / "hf"))["train"]
    assert loaded.features["input_images"] == datasets.List(datasets.Value("string"))
    assert len(loaded) == 12
