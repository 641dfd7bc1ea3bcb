import csv
import io
import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.sources import BadRow, SourceError, SourceRow
from pipelines.storage import Folder
from schemas.instructions import lint_instruction
from schemas.masks import decode_mask, encode_rle
from tests.bad_images import jpeg
from tests.reading import bad, good, listing, read, ready

BOX = [10, 20, 90, 100]


def manifest_rows() -> list[dict[str, Any]]:
    mask = np.zeros((112, 160), bool)
    mask[20:100, 10:90] = True
    entity = {"phrase": "the cat", "label": "cat", "box": BOX}
    return [
        {
            "image": "images/cat.jpg",
            "caption": "A tabby cat looks up.",
            "caption_short": "a cat",
            "tags": ["cat", "tabby"],
            "alt": "IMG_1",
            "entities": [
                {**entity, "mask": encode_rle(mask)},
                {**entity, "mask": [[10, 20, 90, 20, 90, 100, 10, 100]]},
                {**entity, "mask": "masks/cat.png"},
                entity,
            ],
            "license": "CC0-1.0",
            "license_url": "https://example.org/cc0",
            "author": "Ann",
            "source_url": "https://example.org/cat",
            "scene_id": 17,
            "depth": "depth/cat.png",
            "optout": True,
        },
        {"image": "./images/cat.jpg"},
        {"image": "images/missing.jpg", "caption": "gone"},
        {"image": "../secret.jpg"},
        {"image": "/etc/passwd"},
        {"image": "images"},
        {"image": "n" * 300},
        {"image": "file:///etc/passwd"},
        {"image": "images/cat.jpg", "entities": [{"phrase": "x", "box": [5, 5, 1, 1]}]},
        {"image": "images/cat.jpg", "entities": [{"phrase": "x", "box": BOX, "mask": "../secret.png"}]},
        {"image": "images/cat.jpg", "entities": [{"phrase": "x", "box": BOX, "mask": {"size": [4, 4], "counts": [3]}}]},
        {
            "image": "images/cat.jpg",
            "entities": [{"phrase": "x", "box": BOX, "mask": {"size": [4, 4], "counts": "abc"}}],
        },
        {"image": "images/cat.jpg", "entities": [{"phrase": "x", "box": BOX, "mask": [[1, 2, 3, 4]]}]},
        {"image": "images/cat.jpg", "entities": 5},
        {"image": "images/cat.jpg", "depth": "depth/missing.png"},
        {"image": "images/cat.jpg", "optout": "perhaps"},
        {"caption": "no image"},
        {"image": "images/cat.jpg", "caption": "x" * 9000},
    ]


# A folder or an overlong name is `unreadable_file` on a disk, `missing_file` on a store that knows neither.
REASONS = [
    "unreadable_file",
    *["unsafe_path"] * 2,
    *["unreadable_file"] * 2,
    "unsafe_path",
    "bad_entities",
    "unsafe_path",
    *["bad_entities"] * 4,
    "unreadable_file",
    *["bad_field"] * 2,
    "caption_too_long",
]


def write_manifest(folder: Folder, kind: str, rows: list[dict[str, Any]]) -> str:
    name = f"data.{kind}"
    flat = [{k: json.dumps(v) if k == "entities" else v for k, v in row.items()} for row in rows]
    if kind == "jsonl":
        folder.write_bytes(name, "".join(json.dumps(row) + "\n" for row in rows).encode())
    elif kind == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: ", ".join(v) if isinstance(v, list) else v for k, v in row.items()} for row in flat)
        folder.write_bytes(name, text.getvalue().encode())
    else:
        columns = {k: [None if row.get(k) is None else row[k] for row in flat] for k in rows[0]}
        columns["optout"] = [str(v) if v is not None else None for v in columns["optout"]]
        folder.write_table(name, pa.table(columns))
    return name


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_manifest_rows_carry_everything_and_bad_ones_their_reason(images: Folder, kind: str) -> None:
    rows = read(images, type="manifest", path=write_manifest(images, kind, manifest_rows()))
    found = ["unreadable_file" if reason == "missing_file" else reason for reason in bad(rows).values()]
    assert found == REASONS
    full, bare = good(rows).values()
    assert full.captions.model_dump() == {
        "long": "A tabby cat looks up.",
        "short": "a cat",
        "alt": "IMG_1",
        "tags": "cat, tabby",
    }
    assert (full.license, full.author, full.scene_id, full.optout_reason) == ("CC0-1.0", "Ann", "17", "row")
    assert (full.license_url, full.source_url) == ("https://example.org/cc0", "https://example.org/cat")
    by_runs, by_polygon, by_file, boxed = full.entities
    assert boxed.mask == {}
    assert decode_mask(by_runs.mask, 112, 160).sum() == 80 * 80
    assert np.array_equal(decode_mask(by_file.mask, 112, 160), decode_mask(by_runs.mask, 112, 160))
    assert decode_mask(by_polygon.mask, 112, 160)[20:100, 10:90].all()
    assert full.depth_png == images.read_bytes("depth/cat.png")
    assert (bare.image, bare.captions.best(), bare.entities, bare.depth_png) == (jpeg(), "", (), b"")


def test_manifest_items_know_size_and_version_of_their_files(images: Folder) -> None:
    name = write_manifest(images, "jsonl", [{"image": "images/cat.jpg"}, {"image": "images/coffee.jpg"}])
    before, _ = listing(images, type="manifest", path=name)
    assert [item.size for item in before] == [len(jpeg()), len(jpeg("coffee"))]
    assert [item.locator for item in before] == ["data.jsonl#1", "data.jsonl#2"]
    images.write_bytes("images/cat.jpg", jpeg("china", 64, 48))
    after, _ = listing(images, type="manifest", path=name)
    assert [a.version == b.version for a, b in zip(before, after, strict=True)] == [False, True]


def test_manifest_lines_that_do_not_parse_are_single_bad_rows(images: Folder) -> None:
    lines = [
        b'\xef\xbb\xbf{"image": "images/cat.jpg"}',
        b"{not json",
        b"",
        b"[1, 2]",
        b'{"image": "images/cat.jpg", "caption": "caf\xe9"}',
        b'{"image": "images/cat.jpg", "caption": "\\ud800"}',
        b'{"image": "images/cat.jpg", "caption": {"en": "a cat"}}',
        b'{"image": "images/coffee.jpg", "caption": ["coffee", "a cup of coffee on a table"]}',
    ]
    images.write_bytes("data.jsonl", b"\n".join(lines))
    rows = read(images, type="manifest", path="data.jsonl")
    assert bad(rows) == {
        "data.jsonl#2": "bad_row",
        "data.jsonl#4": "bad_row",
        "data.jsonl#5": "caption_encoding",
        "data.jsonl#6": "caption_encoding",
        "data.jsonl#7": "bad_field",
    }
    captions = good(rows)["data.jsonl#8"].captions
    assert (captions.long, captions.short) == ("a cup of coffee on a table", "coffee")


def test_csv_rows_that_do_not_parse_are_single_bad_rows(images: Folder) -> None:
    huge = "x" * 140_000
    text = f'image,caption\nimages/cat.jpg,"a, b"\nimages/cat.jpg,a,b,c\nimages/cat.jpg,{huge}\nimages/coffee.jpg\n'
    images.write_bytes("data.csv", text.encode())
    rows = read(images, type="manifest", path="data.csv")
    assert bad(rows) == {"data.csv#3": "bad_row", "data.csv#4": "bad_row"}
    assert [row.captions.long for row in good(rows).values()] == ["a, b", ""]


def test_misspelt_columns_are_errors_and_unknown_ones_are_named_once(images: Folder) -> None:
    name = write_manifest(images, "jsonl", [{"image": "images/cat.jpg", "captoin": "a cat"}])
    with pytest.raises(SourceError, match="did you mean 'caption'"):
        listing(images, type="manifest", path=name)
    assert good(read(images, type="manifest", path=name, fields={"caption": "captoin"}))["data.jsonl#1"].captions.long
    assert listing(images, type="manifest", path=name, ignore=["captoin"])[1] == []

    name = write_manifest(images, "jsonl", [{"image": "images/cat.jpg", "width": 1, "crs": 2}] * 3)
    assert listing(images, type="manifest", path=name)[1] == ["columns without meaning here are left out: width, crs"]
    with pytest.raises(SourceError, match="no column 'txt'"):
        listing(images, type="manifest", path=name, fields={"caption": "txt"})
    with pytest.raises(SourceError, match=r"no column 'file'.*fields: \{image"):
        listing(images, type="manifest", path=name, fields={"image": "file"})


def test_manifest_images_may_have_another_root_or_a_url(images: Folder, tmp_path: Path) -> None:
    images.write_bytes("lists/a.jsonl", b'{"image": "cat.jpg"}\n{"image": "images/cat.jpg"}')
    rows = read(images, type="manifest", path="lists/a.jsonl", image_root="../images")
    assert (list(good(rows)), bad(rows)) == (["a.jsonl#1"], {"a.jsonl#2": "missing_file"})

    fsspec.filesystem("memory").pipe("/elsewhere/cat.jpg", jpeg())
    images.write_bytes("urls.jsonl", b'{"image": "memory://elsewhere/cat.jpg"}')
    assert bad(read(images, type="manifest", path="urls.jsonl")) == {"urls.jsonl#1": "unsafe_path"}
    assert list(good(read(images, type="manifest", path="urls.jsonl", url_schemes=["memory"]))) == ["urls.jsonl#1"]


@given(st.text(alphabet="./\\ab\0:~%", max_size=12))
def test_no_path_in_a_manifest_leaves_its_folder(path: str) -> None:
    root = Folder("memory://fence/inside")
    root.write_bytes("a", b"inside")
    fsspec.filesystem("memory").pipe("/fence/a", b"outside")
    root.write_bytes("m.jsonl", json.dumps({"image": path}).encode())
    (row,) = read(root, type="manifest", path="m.jsonl")
    assert isinstance(row, BadRow) or (isinstance(row, SourceRow) and row.image == b"inside")


TAG = "<img><|image_{}|></img>"
X2I_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"task_type": "text_to_iamge", "instruction": "A cat.", "input_images": [], "output_image": "images/cat.jpg"}, ""),
    (
        {
            "task_type": "image_edit",
            "instruction": f"{TAG.format(1)} Make it a coffee.",
            "input_images": ["images/cat.jpg"],
            "output_images": "images/coffee.jpg",
        },
        "",
    ),
    ({"task_type": "t2i", "instruction": "No list of inputs.", "output_image": "images/cat.jpg"}, ""),
    (
        {
            "task_type": "edit",
            "instruction": "OmniGen2.",
            "input_images": ["images/cat.jpg"],
            "output_image": "images/cat.jpg",
        },
        "",
    ),
    (
        {
            "task_type": "try-on",
            "instruction": f"{TAG.format(1)} wears {TAG.format(2)}.",
            "input_images": ["images/cat.jpg", "images/coffee.jpg"],
            "output_image": "images/cat.jpg",
        },
        "",
    ),
    (
        {
            "task_type": "edit",
            "instruction": "<img><|image_1|><img> x",
            "input_images": ["images/cat.jpg"],
            "output_image": "images/cat.jpg",
        },
        "bad_instruction",
    ),
    (
        {
            "task_type": "edit",
            "instruction": f"{TAG.format(2)} x",
            "input_images": ["images/cat.jpg"],
            "output_image": "images/cat.jpg",
        },
        "bad_instruction",
    ),
    (
        {"task_type": "edit", "instruction": "x", "input_images": [], "output_image": "images/cat.jpg"},
        "wrong_number_of_inputs",
    ),
    ({"task_type": "juggle", "instruction": "x", "output_image": "images/cat.jpg"}, "unknown_task"),
    ({"instruction": "no task", "output_image": "images/cat.jpg"}, "unknown_task"),
    ({"task_type": "t2i", "instruction": "x", "output_image": "/etc/passwd"}, "unsafe_path"),
    ({"task_type": "t2i", "instruction": "x", "output_image": "../x.jpg"}, "unsafe_path"),
    ({"task_type": "t2i", "instruction": "x", "output_image": "https://example.org/x.jpg"}, "unsafe_path"),
    ({"task_type": "t2i", "instruction": "x", "output_image": "images/missing.jpg"}, "missing_file"),
    ({"task_type": "t2i", "instruction": "x"}, "bad_row"),
    ({"task_type": "t2i", "instruction": "x", "output_image": ["images/cat.jpg", "images/cat.jpg"]}, "bad_row"),
    ({"task_type": "edit", "instruction": "x", "input_images": [1], "output_image": "images/cat.jpg"}, "bad_row"),
    ({"task_type": "t2i", "instruction": 3, "output_image": "images/cat.jpg"}, "bad_instruction"),
    ({"task_type": "t2i", "instruction": " ", "output_image": "images/cat.jpg"}, "bad_instruction"),
]


def test_x2i_samples_pass_and_bad_ones_have_their_reason(images: Folder) -> None:
    images.write_bytes("data.jsonl", "".join(json.dumps(row) + "\n" for row, _ in X2I_ROWS).encode() + b"{cut")
    rows = read(images, type="x2i", path="data.jsonl", license="Apache-2.0")
    expected = {f"data.jsonl#{i}": reason for i, (_, reason) in enumerate(X2I_ROWS, 1)} | {"data.jsonl#20": "bad_row"}
    assert {row.input: row.reason if isinstance(row, BadRow) else "" for row in rows} == expected
    samples = list(ready(rows).values())
    assert [sample.stream for sample in samples] == ["text_to_image", "edit", "text_to_image", "edit", "try_on"]
    assert all(lint_instruction(sample.instruction, len(sample.inputs)) == [] for sample in samples)
    assert samples[3].instruction == f"{TAG.format(1)} OmniGen2."
    assert samples[1].inputs == (jpeg(),)
    assert samples[1].output == jpeg("coffee")
    assert samples[0].license == "Apache-2.0"


def test_x2i_takes_a_default_task_own_names_and_an_image_root(images: Folder) -> None:
    lines = [
        '{"instruction": "a cat", "output_image": "cat.jpg"}',
        '{"task_type": "mine", "instruction": "b", "output_image": "cat.jpg"}',
    ]
    images.write_bytes("json/a.jsonl", "\n".join(lines).encode())
    rows = read(
        images,
        type="x2i",
        path="json/*.jsonl",
        image_root="../images",
        default_task="text_to_image",
        tasks={"mine": "text_render"},
    )
    assert [sample.task for sample in ready(rows).values()] == ["text_to_image", "text_render"]


def test_a_misspelt_image_root_is_an_error(images: Folder) -> None:
    images.write_bytes("a.jsonl", b"{}")
    with pytest.raises(SourceError, match="no file at"):
        listing(images, type="x2i", path="a.jsonl", image_root="imags")
