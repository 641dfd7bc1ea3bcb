"""Block lists: what each kind bans, that it names the line, and that a bad list is refused with its line."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from filters.blocklists import BlockListError, ban, ban_report, read_blocklist
from schemas.decide import AnyBlockList

HASH = "ab" * 32
PROMPT = "A photo of a red car parked beside two blue bicycles in front of an old brick house."
CAPTIONS = {"short": "", "long": "", "alt": "", "tags": ""}


def section(kind: str, **more: object) -> dict:
    return {"kind": kind, "path": "bench/list.txt", **more}


def opened(data: bytes | str, **rule: object):
    data = data.encode() if isinstance(data, str) else data
    return read_blocklist(TypeAdapter(AnyBlockList).validate_python(section(**rule)), data)


def npy(vectors: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, vectors)
    return file.getvalue()


def images(*captions: dict, **columns: object) -> pa.Table:
    rows = [CAPTIONS | c for c in captions]
    table = pa.table({"captions": rows, "ready": [""] * len(rows)})
    return table if not columns else pa.table(columns)


def details(table: pa.Table, *lists: object) -> list[str | None]:
    return ban(table, lists)["ban_detail"].to_pylist()


def test_sha256_bans_equal_files_whatever_stands_behind_the_hash():
    bans = opened(f"# COCO val2017\n\n{HASH.upper()}  000000000139.jpg\r\n{'cd' * 32}\n", kind="sha256")
    assert details(images(uid=[HASH, "ef" * 32, "cd" * 32]), bans) == ["bench/list.txt:3", None, "bench/list.txt:4"]


@pytest.mark.parametrize("radius", [0, 3, 10])
def test_phash_bans_up_to_its_radius_and_names_the_nearest(radius):
    entry = 0x0123456789ABCDEF
    near = entry ^ ((1 << radius) - 1)
    far = entry ^ ((1 << (radius + 1)) - 1)
    bans = opened(f"{entry ^ (0xFFFF << 40):016x}\n{entry:016X}\n", kind="phash", radius=radius)
    table = images(phash=pa.array([near, None, far, entry], pa.uint64()))
    assert details(table, bans) == ["bench/list.txt:2", None, None, "bench/list.txt:2"]
    assert ban(table, [bans])["ban_value"].to_pylist() == [radius, -1, -1, 0]


def test_phash_agrees_with_brute_force_on_many():
    rng = np.random.default_rng(0)
    entries = rng.integers(0, 2**64, 400, dtype=np.uint64)
    queries = rng.choice(entries, 500)
    for _ in range(8):
        queries = queries ^ (np.uint64(1) << rng.integers(0, 64, 500).astype(np.uint64))
    bans = opened("\n".join(f"{e:016x}" for e in entries), kind="phash", radius=6)
    distance = np.bitwise_count(queries[:, None] ^ entries[None])
    line, value = bans.match(images(phash=queries))
    banned = distance.min(1) <= 6
    assert 20 < banned.sum() < 480 and ((line > 0) == banned).all()
    assert (line[banned] == distance.argmin(1)[banned] + 1).all() and (value[banned] == distance.min(1)[banned]).all()


@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_embeddings_ban_by_cosine(form):
    vectors = np.array([[3, 0, 0], [0, 5, 0]], np.float32)
    rule = {"kind": "embedding", "column": "features", "threshold": 0.9, "path": f"v.{form}"}
    data = npy(vectors)
    if form == "parquet":
        file = io.BytesIO()
        pq.write_table(pa.table({"name": ["a", "b"], "vector": list(vectors)}), file)
        data = file.getvalue()
    bans = read_blocklist(TypeAdapter(AnyBlockList).validate_python(rule), data)
    column = pa.array([[0.1, 1, 0], None, [1, 1, 0], [9, 0, 0.1], [0, 0, 0]], pa.list_(pa.float32()))
    assert details(images(features=column), bans) == [f"v.{form}:2", None, None, f"v.{form}:1", None]
    with pytest.raises(BlockListError, match="have 3 values, those of column 'features' have 2"):
        bans.match(images(features=pa.array([[1.0, 2.0]])))


def test_ngrams_ban_shared_prompts_whatever_the_case_and_punctuation():
    bans = opened(f"two dogs\n{PROMPT}\n", kind="ngram")
    spoiled = "so: A PHOTO of a red car, parked beside two blue   bicycles -- in front of, well, nothing"
    short_by_one = "photo of a red car parked beside two blue bicycles in front"
    table = images(
        {"long": PROMPT},
        {"alt": spoiled},
        {"short": short_by_one},
        {"short": "Two dogs!"},
        {"short": "two dogs on a lawn"},
        {},
        {"short": short_by_one, "long": "of an old brick house"},  # n-grams do not reach across captions
    )
    assert details(table, bans) == ["bench/list.txt:2"] * 2 + [None, "bench/list.txt:1", None, None, None]


def test_ngrams_do_not_reach_into_the_next_image_and_every_window_counts():
    bans = opened("one two three\nfour five six seven", kind="ngram", n=3)
    rows = ["one two", "three", "five six seven", "x one two three y", "one two three", "ONE, two; THREE four"]
    expected = [None, None, 2, 1, 1, 1]
    assert details(images(*({"short": r} for r in rows)), bans) == [e and f"bench/list.txt:{e}" for e in expected]


def test_ngrams_agree_with_a_direct_search():
    rng = np.random.default_rng(0)
    prompts = [" ".join(f"w{i}" for i in rng.integers(0, 4, rng.integers(1, 9))) for _ in range(30)]
    captions = [" ".join(f"w{i}" for i in rng.integers(0, 5, rng.integers(0, 12))) for _ in range(400)]
    bans = opened("\n".join(prompts), kind="ngram", n=5)

    def shared(caption: str) -> bool:
        if caption in prompts:
            return True
        grams = {tuple(p.split()[i : i + 5]) for p in prompts for i in range(len(p.split()) - 4)}
        return any(tuple(caption.split()[i : i + 5]) in grams for i in range(len(caption.split()) - 4))

    found = [d is not None for d in details(images(*({"short": c} for c in captions)), bans)]
    assert found == [shared(c) for c in captions] and 10 < sum(found) < 390


def test_canaries_are_found_in_all_that_is_written_about_an_image():
    bans = opened("MagicBrush canary GUID 26b5c67b\nzebra.*", kind="canary")
    table = images({"alt": "x magicbrush CANARY guid 26B5C67B y"}, {"tags": "zebras"}, {"tags": "a zebra.*"}, {})
    ready = json.dumps({"task": "edit", "instruction": "MagicBrush canary GUID 26b5c67b: add a hat"})
    table = table.set_column(1, "ready", pa.array(["", "", "", ready]))
    assert details(table, bans) == ["bench/list.txt:1", None, "bench/list.txt:2", "bench/list.txt:1"]


def test_the_first_list_gives_the_reason_and_the_report_counts_every_list():
    first, second = opened(HASH, kind="sha256"), opened(f"zebra\n{'yak'}", kind="canary")
    table = images({"short": "a zebra"}, {"short": "a zebra"}, {"short": "a yak"}, {}).append_column(
        "uid", pa.array([HASH, "x", "y", "z"])
    )
    bans = ban(table, [first, second])
    assert bans["ban"].to_pylist() == ["sha256", "canary", "canary", None]
    reason = [f"blocklist:{kind}" if kind else "" for kind in bans["ban"].to_pylist()]
    ledger = pa.table({"reason": reason, "detail": [d or "" for d in bans["ban_detail"].to_pylist()]})
    unused = opened("q", kind="canary", path="other:1.txt")
    assert ban_report(ledger, [m.rule for m in (first, second, unused)]).to_pylist() == [
        {"kind": "sha256", "path": "bench/list.txt", "images": 1, "entries": 1},
        {"kind": "canary", "path": "bench/list.txt", "images": 2, "entries": 2},
        {"kind": "canary", "path": "other:1.txt", "images": 0, "entries": 0},
    ]


@pytest.mark.parametrize(
    ("rule", "data", "message"),
    [
        ({"kind": "sha256"}, f"{HASH}\nabc\n".encode(), "list.txt:2: expected 64 hexadecimal digits, found 'abc'"),
        ({"kind": "sha256"}, b"# nothing\n\n", "list.txt:1: the list is empty"),
        ({"kind": "phash"}, b"0123456789abcdeg", "list.txt:1: expected 16 hexadecimal digits"),
        ({"kind": "canary"}, b"ok\n\xff\xfe", "list.txt:2: not UTF-8"),
        ({"kind": "ngram"}, b"ok\n...\n", "list.txt:2: no words"),
        ({"kind": "embedding", "column": "e"}, b"\x93NUMPY", "list.txt:1: expected vectors"),
        ({"kind": "embedding", "column": "e"}, b"", "list.txt:1: expected vectors"),
        ({"kind": "embedding", "column": "e"}, npy(np.ones(3)), r"list.txt:1: expected floats \[n, d\]"),
        ({"kind": "embedding", "column": "e"}, npy(np.eye(3)[[0, 1]] * [1, 0, 0]), "list.txt:2: the vector is zero"),
    ],
)
def test_a_bad_list_names_its_line(rule, data, message):
    with pytest.raises(BlockListError, match=message):
        opened(data, **rule)
