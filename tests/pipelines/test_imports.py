"""Data as others publish it, written with their own libraries, becomes a corpus."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image
from pydantic import ValidationError

from pipelines.corpus import iter_index, read_members
from pipelines.engine import Context
from pipelines.lint import lint
from pipelines.recipes import RECIPE
from pipelines.run import build
from pipelines.sources import SourceError
from pipelines.storage import Folder
from schemas.instructions import placeholder
from tests.bad_images import jpeg, photo
from tests.reading import bad, config, good, listing, read, ready

NAMES = ("cat", "coffee", "china", "flower")


def write_dataset(path: Path, columns: dict[str, list[Any]]) -> None:
    """Parquet as `datasets` writes it; columns of pictures become images."""
    kinds = {name: datasets.Image() for name, values in columns.items() if isinstance(values[0], Image.Image)}
    table = datasets.Dataset.from_dict(columns)
    for name, kind in kinds.items():
        table = table.cast_column(name, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(str(path))


def darker(image: Image.Image) -> Image.Image:
    return image.point(lambda value: value // 2)


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_instructpix2pix_in_the_columns_of_diffusers(tmp_path: Path) -> None:
    photos = [photo(name) for name in NAMES]
    prompts = [f"make the {name} darker" for name in NAMES]
    edited = [darker(image) for image in photos]
    write_dataset(
        tmp_path / "data/train.parquet", {"input_image": photos, "edit_prompt": prompts, "edited_image": edited}
    )
    rows = list(ready(read(Folder(str(tmp_path)), type="parquet_samples", path="data")).values())
    assert len(rows) == len(NAMES)
    for row, image, prompt, result in zip(rows, photos, prompts, edited, strict=True):
        assert (row.task, row.subtask, row.stream) == ("edit", "instruction", "edit")
        assert row.instruction == f"{placeholder(1)} {prompt}"
        np.testing.assert_array_equal(decoded(row.inputs[0]), np.asarray(image))
        np.testing.assert_array_equal(decoded(row.output), np.asarray(result))


def test_magicbrush_and_omniedit_by_their_names(tmp_path: Path) -> None:
    image = photo("cat")
    turns: dict[str, list[Any]] = {"img_id": ["17", "17"], "turn_index": [1, 2], "source_img": [image, darker(image)]}
    turns |= {"mask_img": [image, image], "instruction": ["darken it", "more"], "target_img": [darker(image)] * 2}
    write_dataset(tmp_path / "magicbrush.parquet", turns)
    names: dict[str, Any] = {"inputs": ["source_img"], "instruction": "instruction", "output": "target_img"}
    magicbrush = read(
        Folder(str(tmp_path)), type="parquet_samples", path="magicbrush.parquet", fields={"scene_id": "img_id"}, **names
    )
    assert [row.scene_id for row in ready(magicbrush).values()] == ["17", "17"]

    prompts = [["Darken the cat.", "make it dark"], ["Paint it.", "Paint it."], [], [None, "x"], ["<img>", "x"]]
    edits: dict[str, list[Any]] = {
        "omni_edit_id": list("abcde"),
        "task": ["env", "style", "env", "env", "env"],
        "src_img": [image] * 5,
    }
    edits |= {"edited_img": [darker(image)] * 5, "edited_prompt_list": prompts, "o_score": [9.0] * 5}
    write_dataset(tmp_path / "omniedit.parquet", edits)
    names = {"inputs": ["src_img"], "instruction": "edited_prompt_list", "output": "edited_img"}
    tasks = {"task_column": "task", "tasks": {"style": "style/transfer"}}
    rows = read(Folder(str(tmp_path)), type="parquet_samples", path="omniedit.parquet", **names, **tasks)
    first, second = ready(rows).values()
    assert (first.instruction, first.variants) == (
        f"{placeholder(1)} Darken the cat.",
        (f"{placeholder(1)} make it dark",),
    )
    assert (second.stream, second.subtask, second.variants) == ("style", "transfer", ())
    assert list(bad(rows).values()) == ["bad_instruction"] * 3


def test_wrong_columns_and_tasks_are_errors(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a.parquet", {"src": [photo()], "edit_prompt": ["x"], "edited_image": [photo()]})
    with pytest.raises(SourceError, match=r"no column 'input_image' among .*name the right ones with `inputs`"):
        listing(Folder(str(tmp_path)), type="parquet_samples", path="a.parquet")
    with pytest.raises(SourceError, match="column 'edit_prompt' is string, neither binary nor struct"):
        listing(Folder(str(tmp_path)), type="parquet_samples", path="a.parquet", inputs=["src"], output="edit_prompt")
    with pytest.raises(ValidationError, match=r"'edit' takes 1 input image\(s\), not 2"):
        config(type="parquet_samples", path="a.parquet", inputs=["src", "edited_image"])
    with pytest.raises(ValidationError, match="unknown task 'edits'"):
        config(type="parquet_samples", path="a.parquet", task="edits")


def test_images_with_text_of_hugging_face_as_parquet_and_as_a_folder(tmp_path: Path) -> None:
    photos, texts = [photo(name) for name in NAMES], [f"a photo of {name}" for name in NAMES]
    write_dataset(tmp_path / "parquet/train-00000-of-00001.parquet", {"image": photos, "text": texts})
    rows = good(read(Folder(str(tmp_path)), type="parquet", path="parquet", fields={"caption": "text"}))
    assert [row.captions.long for row in rows.values()] == texts

    folder = tmp_path / "imagefolder/train"  # metadata.jsonl names its files `file_name`
    folder.mkdir(parents=True)
    for name in NAMES:
        (folder / f"{name}.jpg").write_bytes(jpeg(name))
    lines = [{"file_name": f"{name}.jpg", "text": text} for name, text in zip(NAMES, texts, strict=True)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert datasets.load_dataset(str(folder.parent), split="train", cache_dir=str(tmp_path / "hf"))["text"][:] == texts
    names = {"image": "file_name", "caption": "text"}
    rows = good(read(Folder(str(folder)), type="manifest", path="metadata.jsonl", fields=names))
    assert [row.captions.long for row in rows.values()] == texts


def x2i_line(task: str, instruction: str, *images: str) -> str:
    sample: dict[str, Any] = {"task_type": task, "instruction": instruction, "output_image": images[-1]}
    return json.dumps(sample | ({"input_images": list(images[:-1])} if images[1:] else {})) + "\n"


@pytest.fixture
def official(tmp_path: Path) -> Folder:
    """X2I as it is downloaded and unpacked, and two mixes of OmniGen2 over it."""
    root = tmp_path / "x2i"
    for name in NAMES:
        (root / "images").mkdir(parents=True, exist_ok=True)
        (root / f"images/{name}.jpg").write_bytes(jpeg(name))
    (root / "edits.jsonl").write_text(
        x2i_line("image_edit", f"{placeholder(1)} Add tea.", "images/cat.jpg", "images/coffee.jpg")
        + x2i_line("image_edit", "Make it a temple.", "images/flower.jpg", "images/china.jpg")
    )
    (root / "sub").mkdir()
    (root / "sub/t2i.jsonl").write_text(x2i_line("", "A cat.", "images/cat.jpg"))
    shutil.copytree(root / "images", root / "sub/images")
    entries = [{"path": "edits.jsonl", "type": "edit", "ratio": 1}, {"path": "sub/mix.yml", "ratio": 1.0}]
    (root / "mix.yml").write_text(yaml.safe_dump({"ratio_type": "inside_ratio", "data": entries}))
    (root / "sub/mix.yml").write_text(yaml.safe_dump({"data": [{"path": "sub/t2i.jsonl", "type": "t2i", "ratio": 1}]}))
    return Folder(str(root))


def test_a_downloaded_folder(official: Folder) -> None:
    rows = read(official, type="x2i", path=".", default_task="t2i")
    assert [row.task for row in ready(rows).values()] == ["edit", "edit", "text_to_image"]
    assert list(ready(rows)) == ["edits.jsonl#1", "edits.jsonl#2", "sub/t2i.jsonl#1"]
    official.write_bytes("images.tar.gz.aa", b"a part")
    warnings = listing(official, type="x2i", path=".")[1]
    assert len(warnings) == 1 and warnings[0].startswith("1 archive(s) are not read, e.g. images.tar.gz.aa: unpack")
    official.write_bytes("empty/readme.md", b"no data")
    with pytest.raises(SourceError, match=r"no \.jsonl in"):
        listing(official, type="x2i", path="empty")


def test_a_nested_mix(official: Folder) -> None:
    rows = read(official, type="x2i", path="mix.yml", image_root=".")
    assert [(row.task, row.instruction) for row in ready(rows).values()] == [
        ("edit", f"{placeholder(1)} Add tea."),
        ("edit", f"{placeholder(1)} Make it a temple."),
        ("text_to_image", "A cat."),
    ]
    assert listing(official, type="x2i", path="mix.yml")[1] == []


def write_mix(folder: Folder, *entries: dict[str, Any]) -> None:
    folder.write_bytes("other.yml", yaml.safe_dump({"data": list(entries)}).encode())


def test_ratios_become_the_mixture_to_train_with_or_are_refused(official: Folder) -> None:
    edits, captions = {"path": "edits.jsonl", "type": "edit"}, {"path": "sub/mix.yml"}
    write_mix(official, edits | {"ratio": 1}, captions | {"ratio": 4})
    (warning,) = listing(official, type="x2i", path="other.yml")[1]
    assert warning.endswith("train with 'data.mixture={edit: 0.3333, text_to_image: 0.6667}'")
    write_mix(official, edits | {"ratio": 1}, captions | {"ratio": 0})
    assert len(read(official, type="x2i", path="other.yml")) == 2
    write_mix(official, edits | {"ratio": 1}, edits | {"ratio": 3})
    with pytest.raises(SourceError, match=r"task edit have the ratios 1 and 3, but training mixes tasks, not files"):
        listing(official, type="x2i", path="other.yml")


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"path": "other.yml"}, "other.yml names itself"),
        ({"path": "missing.yml"}, "no file at .*missing.yml"),
        ({"path": "images/cat.jpg"}, "neither .jsonl"),
        ({"path": "/elsewhere/a.jsonl"}, "names /elsewhere/a.jsonl, outside of .* set `image_root`"),
        ({"path": "edits.jsonl", "ratio": -1}, "is not a mix"),
        ({"file": "edits.jsonl"}, "is not a mix"),
    ],
)
def test_a_bad_mix_is_an_error(official: Folder, entry: dict[str, Any], problem: str) -> None:
    write_mix(official, entry)
    with pytest.raises(SourceError, match=problem):
        listing(official, type="x2i", path="other.yml")


def test_imported_samples_make_a_sound_corpus(tmp_path: Path, official: Folder) -> None:
    photos = [photo("cat")] * 8 + [photo(name) for name in NAMES[1:]]
    edits = {"input_image": photos, "edited_image": [darker(image) for image in photos]}
    prompts = [[f"edit number {i}", f"number {i}, please"] for i in range(11)]
    write_dataset(tmp_path / "p2p.parquet", edits | {"edit_prompt": prompts})
    recipe = {
        "name": "imports",
        "sources": [
            {"name": "p2p", "type": "parquet_samples", "path": str(tmp_path / "p2p.parquet")},
            {"name": "official", "type": "x2i", "path": f"{official.url}/mix.yml", "image_root": "."},
        ],
        "decide": {"splits": {"val": 0.3, "test": 0.3}},
        "build": {},
    }
    corpus = Folder(str(tmp_path / "corpus"))
    build(Context(corpus, RECIPE.model_validate(recipe), ""), workers=0)
    assert lint(corpus) == []  # edits of one photograph are in one split, among other things
    rows = [row for table in iter_index(corpus) for row in table.to_pylist()]
    assert len(rows) == 14
    assert {row["split"] for row in rows} == {"train", "val", "test"}
    varied = [row for row in rows if row["instruction_variants"]]
    assert len(varied) == 11
    number = varied[0]["instruction"].rpartition(" ")[2]
    assert varied[0]["instruction_variants"] == [f"{placeholder(1)} number {number}, please"]
    np.testing.assert_array_equal(decoded(read_members(corpus, varied[0])["edit_mask.png"]), 255)
