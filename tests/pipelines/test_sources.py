import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipelines.images import BadInput, normalise
from pipelines.sources import SourceError, open_reader
from pipelines.sources.fields import clean_caption
from pipelines.storage import Folder
from tests.bad_images import cases, encode, jpeg, photo
from tests.reading import bad, config, good, listing, read


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        (b"\xef\xbb\xbf a cat \r\n", "a cat"),
        ("a\0 ca\x07t\x1b[0m", "a cat[0m"),
        ("cafe\u0301", "café"),
        ("two\r\nlines\tand a tab", "two\nlines\tand a tab"),
        ("家族 👨‍👩‍👧", "家族 👨‍👩‍👧"),
    ],
)
def test_captions_are_cleaned(given_text: str | bytes, expected: str) -> None:
    assert clean_caption(given_text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [(b"caf\xe9", "caption_encoding"), ("a \ud800 b", "caption_encoding"), ("x" * 100_000, "caption_too_long")],
)
def test_bad_captions_have_a_reason(text: str | bytes, reason: str) -> None:
    with pytest.raises(BadInput) as caught:
        clean_caption(text)
    assert caught.value.reason == reason


@given(st.text(max_size=60))
@example("\ufeff\x00 \ufeff a")
def test_cleaning_twice_changes_nothing(text: str) -> None:
    once = clean_caption(text)
    assert clean_caption(once) == clean_caption(once.encode()) == once


def test_folder_reads_images_of_any_case_with_their_sidecars(folder: Folder) -> None:
    folder.write_bytes("b/CAT.JPG", jpeg())
    folder.write_bytes("b/CAT.txt", b"  a tabby\0 cat\n")
    folder.write_bytes("a.png", encode(photo("coffee"), "PNG"))
    folder.write_bytes("a.json", json.dumps({"caption": "a cup", "license": "CC0-1.0", "unknown": 1}).encode())
    folder.write_bytes("plain.webp", encode(photo("china"), "WEBP"))
    for hidden in (".DS_Store", "b/._CAT.JPG", "__MACOSX/b/x.jpg"):
        folder.write_bytes(hidden, b"junk")
    folder.write_bytes("notes.md", b"#")
    folder.write_bytes("lost.txt", b"a caption without an image")

    items, warnings = listing(folder, type="folder", path=".", license="CC-BY-4.0", scene_from="folder")
    assert [item.locator for item in items] == ["a.png", "b/CAT.JPG", "plain.webp"]
    assert items[1].size == len(jpeg()) + len("  a tabby\0 cat\n")
    assert len(warnings) == 2
    rows = good(read(folder, type="folder", path=".", license="CC-BY-4.0", scene_from="folder"))
    assert rows["b/CAT.JPG"].image == jpeg()
    assert rows["b/CAT.JPG"].captions.alt == "a tabby cat"
    assert rows["b/CAT.JPG"].scene_id == "pool/b"
    assert (rows["a.png"].captions.long, rows["a.png"].license, rows["a.png"].scene_id) == ("a cup", "CC0-1.0", "")
    assert rows["plain.webp"].license == "CC-BY-4.0"
    assert normalise(rows["plain.webp"].image, 1 << 20, declared=rows["plain.webp"].declared).width == 160


def test_folder_puts_each_kind_of_bad_input_where_it_belongs(folder: Folder) -> None:
    for case in cases().values():
        folder.write_bytes(case.name, case.data)
    captions = {"latin": b"caf\xe9", "nul": b"a\0b", "endless": b"x" * 100_000}
    for name, text in captions.items():
        folder.write_bytes(f"{name}.jpg", jpeg())
        folder.write_bytes(f"{name}.txt", text)
    folder.write_bytes("odd.jpg", jpeg())
    folder.write_bytes("odd.json", b"[1, 2")

    rows = read(folder, type="folder", path=".")
    assert bad(rows) == {
        "latin.jpg": "caption_encoding",
        "endless.jpg": "caption_too_long",
        "odd.jpg": "bad_sidecar",
    }
    reasons = {}
    for name, row in good(rows).items():
        try:
            normalise(row.image, 1 << 20, declared=row.declared)
        except BadInput as error:
            reasons[name] = error.reason
    assert reasons == {case.name: case.reason for case in cases().values() if case.reason}


def test_folder_listing_notices_changes(folder: Folder) -> None:
    folder.write_bytes("cat.jpg", jpeg())
    before, _ = listing(folder, type="folder", path=".")
    folder.write_bytes("cat.txt", b"a cat")
    after, _ = listing(folder, type="folder", path=".")
    assert before[0].version != after[0].version
    assert listing(folder, type="folder", path=".")[0] == after


def test_a_file_that_vanishes_after_listing_is_one_bad_row(folder: Folder) -> None:
    folder.write_bytes("a.jpg", jpeg())
    folder.write_bytes("b.jpg", jpeg())
    reader = open_reader(config(type="folder", path="."), folder.url)
    items = list(reader.list())
    folder.remove("a.jpg")
    rows = list(reader.read(items))
    assert bad(rows) == {"a.jpg": "missing_file"}
    assert list(good(rows)) == ["b.jpg"]


def test_globs_and_single_files_are_paths_too(folder: Folder) -> None:
    for name in ("x/1.jpg", "x/2.jpg", "x/3.png", "y/1.jpg"):
        folder.write_bytes(name, jpeg())
    assert [i.locator for i in listing(folder, type="folder", path="x/*.jpg")[0]] == ["1.jpg", "2.jpg"]
    assert [i.locator for i in listing(folder, type="folder", path="*/1.jpg")[0]] == ["x/1.jpg", "y/1.jpg"]
    assert list(good(read(folder, type="folder", path="y/1.jpg"))) == ["1.jpg"]


def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))).write_bytes(jpeg())
    assert list(good(read(Folder(str(tmp_path)), type="folder", path="."))) == ["caf\\xe9.jpg"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"type": "folder", "path": "nowhere"}, "no file at"),
        ({"type": "folder", "path": "texts"}, "no image"),
        ({"type": "webdataset", "path": "texts"}, r"no \.tar"),
        ({"type": "parquet", "path": "texts"}, r"no \.parquet"),
        ({"type": "manifest", "path": "texts/empty.csv"}, "no rows"),
        ({"type": "manifest", "path": "texts/a.txt"}, "none of .csv, .jsonl"),
    ],
)
def test_a_source_that_holds_nothing_is_an_error(folder: Folder, section: dict[str, str], message: str) -> None:
    folder.write_bytes("texts/a.txt", b"text")
    folder.write_bytes("texts/empty.csv", b"")
    with pytest.raises(SourceError, match=message):
        listing(folder, **section)


@pytest.mark.parametrize(
    "section",
    [
        {"type": "folder", "path": "x", "extension": ["jpg"]},
        {"type": "folder", "path": "x", "name": "Not A Slug"},
        {"type": "webdataset", "path": "{00000..00012}.tar"},
        {"type": "parquet", "path": "x", "fields": {"captoin": "text"}},
        {"type": "zip", "path": "x"},
    ],
)
def test_a_wrong_section_is_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config(**section)
