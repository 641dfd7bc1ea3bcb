import gzip
import io
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from pipelines.images import normalise
from pipelines.sources import BadRow, SourceError, open_reader
from pipelines.storage import Folder
from schemas.codec import encode_png
from tests.bad_images import encode, jpeg, photo
from tests.reading import bad, config, good, listing, read


def write_tar(path: Path, count: int = 6, **extra: bytes) -> list[str]:
    """A tar as webdataset writes it, with PAX headers from its float mtime."""
    keys = [f"{i:09d}" for i in range(count)]
    with webdataset.TarWriter(str(path)) as writer:
        for i, key in enumerate(keys):
            meta = {"caption": f"photo {i}", "url": f"https://example.org/{i}.jpg", "key": key, "status": "success"}
            writer.write(
                {"__key__": key, "jpg": jpeg("cat", 64 + 16 * i, 64), "txt": f"photo {i}", "json": meta} | extra
            )
    return keys


def test_webdataset_reads_tars_of_img2dataset_and_accounts_for_failed_rows(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar")
    status = ["success"] * 7 + ["failed_to_download", "failed_to_resize"]
    log = {
        "key": [f"{i:09d}" for i in range(9)],
        "status": status,
        "error_message": [None] * 7 + ["HTTP Error 404: Not Found", "image too small"],
        "license": ["CC-BY-2.0"] * 9,
        "url": [f"https://example.org/{i}.jpg" for i in range(9)],
    }
    pq.write_table(pa.table(log), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text('{"count": 9}')
    for path in (".", "*.tar", "00000.tar"):
        rows = read(Folder(str(tmp_path)), type="webdataset", path=path)
        assert len(rows) == 9
        assert bad(rows) == {
            "00000.tar::000000006": "missing_in_tar",
            "00000.tar::000000007": "failed_to_download",
            "00000.tar::000000008": "failed_to_resize",
        }
        row = good(rows)["00000.tar::000000003"]
        assert (row.captions.alt, row.captions.long, row.license) == ("photo 3", "", "CC-BY-2.0")
        assert row.source_url == "https://example.org/3.jpg"
        assert normalise(row.image, 1 << 20, declared=row.declared).width == 112
    details = {row.input: row.detail for row in rows if isinstance(row, BadRow)}
    assert details["00000.tar::000000007"] == "HTTP Error 404: Not Found"


def test_a_damaged_log_of_img2dataset_costs_no_image(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar")
    (tmp_path / "00000.parquet").write_bytes(b"PAR1 and nothing else")
    rows = read(Folder(str(tmp_path)), type="webdataset", path=".")
    assert bad(rows) == {"00000.parquet": "corrupt_log"}
    assert len(good(rows)) == 6


def tar_of(members: list[tuple[str, bytes | None]], **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
            info.size = len(data or b"")
            tar.addfile(info, io.BytesIO(data or b""))
    return buffer.getvalue()


def test_webdataset_tolerates_foreign_tars(folder: Folder) -> None:
    long_name = "d" * 120 + "/" + "k" * 60
    members: list[tuple[str, bytes | None]] = [
        ("./v1.5/", None),
        ("./v1.5/a.JPG", jpeg()),
        ("./v1.5/a.txt", b"in a folder with a dot"),
        ("./v1.5/a.seg.png", b"another image of the sample"),
        ("./v1.5/a.npy", b"unknown"),
        ("__shard__.json", b"{}"),
        ("._junk.jpg", b"junk"),
        ("README", b"text"),
        (f"{long_name}.png", encode(photo(), "PNG")),
        ("../../etc/passwd.jpg", jpeg("china")),
        ("schlüssel.webp", encode(photo(), "WEBP")),
        ("schlüssel.caption", "Schlüssel".encode()),
        ("d.jpg", jpeg()),
        ("d.json", b'{"alt": "from json", "entities": [{"phrase": "cat", "box": [1, 2, 3, 4]}]}'),
        ("d.depth.png", encode_png(np.full((4, 4), 7, np.uint16))),
        ("twice.jpg", jpeg()),
        ("twice.png", b"second"),
        ("alone.txt", b"no image"),
        ("broken.jpg", jpeg()),
        ("broken.json", b"{"),
        ("latin.jpg", jpeg()),
        ("latin.txt", b"\xe9"),
        ("path.jpg", jpeg()),
        ("path.json", b'{"depth": "/etc/passwd"}'),
        ("d.jpg", jpeg("coffee")),
    ]
    folder.write_bytes("x.tar", tar_of(members, format=tarfile.PAX_FORMAT, pax_headers={"comment": "foreign"}))
    rows = read(folder, type="webdataset", path="x.tar", fields={})
    assert list(good(rows)) == [
        "x.tar::v1.5/a",
        f"x.tar::{long_name}",
        "x.tar::../../etc/passwd",  # a key, never a path
        "x.tar::schlüssel",
        "x.tar::d",
        "x.tar::twice",
        "x.tar::d#2",
    ]
    assert bad(rows) == {
        "x.tar::twice (twice.png)": "duplicate_member",
        "x.tar::alone": "no_image",
        "x.tar::broken": "bad_json",
        "x.tar::latin": "caption_encoding",
        "x.tar::path": "unsafe_path",
    }
    assert good(rows)["x.tar::v1.5/a"].captions.alt == "in a folder with a dot"
    assert good(rows)["x.tar::schlüssel"].captions.alt == "Schlüssel"
    d = good(rows)["x.tar::d"]
    assert (d.captions.alt, d.entities[0].phrase, len(d.depth_png) > 0) == ("from json", "cat", True)


def test_dots_in_keys_are_reported_and_can_be_allowed(folder: Folder) -> None:
    members = [(f"v1.5_{i}.{ext}", data) for i in range(3) for ext, data in (("jpg", jpeg()), ("txt", b"a cat"))]
    folder.write_bytes("x.tar", tar_of(list(members)))
    rows = read(folder, type="webdataset", path="x.tar")
    assert list(bad(rows).values()) == ["no_image"] * 3
    assert "dotted_keys" in rows[0].detail  # type: ignore[union-attr]
    assert len(good(read(folder, type="webdataset", path="x.tar", dotted_keys=True))) == 3


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_a_tar_cut_in_the_middle_gives_its_complete_samples_and_one_bad_row(tmp_path: Path, suffix: str) -> None:
    keys = write_tar(tmp_path / "whole.tar")
    whole = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        ends = [info.offset_data + -(-info.size // 512) * 512 for info in tar]
    folder = Folder(str(tmp_path / "cut"))
    for cut in [*range(1, ends[-1], 5000), *ends]:
        data = gzip.compress(whole)[: -cut % 4000 or 1] if suffix == "tar.gz" else whole[:cut]
        folder.write_bytes(f"x.{suffix}", data)
        rows = read(folder, type="webdataset", path=f"x.{suffix}")
        complete = sum(end <= cut for end in ends) // 3
        assert bad(rows) == {f"x.{suffix}": "truncated_tar"}
        if suffix == "tar":
            assert list(good(rows)) == [f"x.tar::{key}" for key in keys[:complete]] or complete == 1 == len(rows)
        for i, row in enumerate(good(rows).values()):
            assert (row.image, row.captions.alt) == (jpeg("cat", 64 + 16 * i, 64), f"photo {i}")


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "truncated_tar"), (b"<html>no tar</html>" * 100, "corrupt_tar"), (bytes(1024), "")],
    ids=["empty file", "not a tar", "empty tar"],
)
def test_a_tar_that_is_none(folder: Folder, data: bytes, reason: str) -> None:
    folder.write_bytes("x.tar", data)
    assert bad(read(folder, type="webdataset", path="x.tar")) == ({"x.tar": reason} if reason else {})


def test_a_broken_header_in_the_middle_is_noticed(tmp_path: Path) -> None:
    """`tarfile` ends there as if the archive were over."""
    write_tar(tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar") as tar:
        header = [info.offset for info in tar if info.name.endswith("jpg")][3]
    data = bytearray((tmp_path / "x.tar").read_bytes())
    data[header : header + 512] = b"\xff" * 512
    (tmp_path / "x.tar").write_bytes(data)
    rows = read(Folder(str(tmp_path)), type="webdataset", path="x.tar")
    assert len(good(rows)) == 3
    assert bad(rows) == {"x.tar": "corrupt_tar"}


def test_parquet_written_by_datasets(tmp_path: Path) -> None:
    names = ["cat", "coffee", "china", "flower"]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = [{"image": photo(name), "text": f"a photo of {name}"} for name in names]
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(str(tmp_path / "train.parquet"), batch_size=2)
    items, _ = listing(Folder(str(tmp_path)), type="parquet", path=".", fields={"caption": "text"})
    assert [item.rows for item in items] == [
        pq.read_metadata(tmp_path / "train.parquet").row_group(i).num_rows for i in range(len(items))
    ]
    result = good(read(Folder(str(tmp_path)), type="parquet", path=".", fields={"caption": "text"}))
    assert [row.captions.long for row in result.values()] == [f"a photo of {name}" for name in names]
    for row, name in zip(result.values(), names, strict=True):
        assert normalise(row.image, 1 << 20).data == normalise(encode(photo(name), "PNG"), 1 << 20).data


def test_parquet_row_groups_bytes_columns_and_bad_rows(folder: Folder) -> None:
    table = pa.table(
        {
            "image": [jpeg("cat"), None, b"", jpeg("china"), jpeg("coffee")],
            "caption": [["short", "a longer one"], None, ["x" * 9000], ["c"], []],
            "license": ["CC0-1.0", None, None, None, "MIT"],
            "unrelated": [1, 2, 3, 4, 5],
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=2)
    folder.write_bytes("part/a.parquet", buffer.getvalue())
    items, _ = listing(folder, type="parquet", path="part", license="default")
    assert [(item.locator, item.rows) for item in items] == [
        ("a.parquet#0", 2),
        ("a.parquet#1", 2),
        ("a.parquet#2", 1),
    ]
    rows = read(folder, type="parquet", path="part", license="default")
    assert [row.input for row in rows] == [f"a.parquet#{i // 2}:{i % 2}" for i in range(5)]
    assert bad(rows) == {"a.parquet#0:1": "missing_file", "a.parquet#1:0": "caption_too_long"}
    assert [row.license for row in good(rows).values()] == ["CC0-1.0", "default", "MIT"]
    assert good(rows)["a.parquet#0:0"].captions.short == "short"
    alone = list(open_reader(config(type="parquet", path="part"), folder.url).read(items[1:2]))
    assert [row.input for row in alone] == ["a.parquet#1:0", "a.parquet#1:1"]


def test_parquet_text_that_is_not_utf8_is_one_bad_row(folder: Folder) -> None:
    text = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 2, 6], np.int32)), pa.py_buffer(b"okcaf\xe9"))
    folder.write_table("a.parquet", pa.table({"image": [jpeg(), jpeg()], "caption": text}))
    rows = read(folder, type="parquet", path="a.parquet")
    assert bad(rows) == {"a.parquet#0:1": "caption_encoding"}
    assert len(good(rows)) == 1


def test_a_corrupt_row_group_is_accounted_for_row_by_row(folder: Folder) -> None:
    table = pa.table({"image": [jpeg("cat", 32 + 16 * (i % 20), 48) for i in range(40)]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=20, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(buffer).metadata.row_group(0).column(0)
    data = bytearray(buffer.getvalue())
    data[column.data_page_offset + 20 : column.data_page_offset + 80] = bytes(60)
    folder.write_bytes("a.parquet", bytes(data))
    rows = read(folder, type="parquet", path="a.parquet")
    assert Counter(bad(rows).values()) == {"corrupt_row_group": 20}
    assert list(good(rows)) == [f"a.parquet#1:{i}" for i in range(20)]


def test_parquet_columns_must_fit(folder: Folder) -> None:
    folder.write_table("a.parquet", pa.table({"img": [jpeg()], "number": [1]}))
    with pytest.raises(SourceError, match=r"no column 'image', did you mean 'img'\?"):
        listing(folder, type="parquet", path=".")
    with pytest.raises(SourceError, match="'number' is int64"):
        listing(folder, type="parquet", path=".", fields={"image": "number"})
    assert len(good(read(folder, type="parquet", path=".", fields={"image": "img"}))) == 1
    folder.write_bytes("b.parquet", b"not parquet")
    with pytest.raises(SourceError, match=r"b\.parquet is not a Parquet file"):
        listing(folder, type="parquet", path=".", fields={"image": "img"})
