"""A corpus seen from a notebook: tables, SQL, pictures, figures and traces agree with what is on disk."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.corpus import Shard, read_index, read_members, summary
from pipelines.ledger import LedgerRow, ledger_path, ledger_table
from pipelines.preview import sample_strip
from pipelines.storage import Folder
from pipelines.viewing import Corpus, ViewingError, open_corpus, progress
from schemas.records import SampleRecord
from tests.corpora import make_corpus


@pytest.fixture(scope="module")
def corpus(corpus_path: Path) -> Corpus:
    return open_corpus(str(corpus_path))


@pytest.fixture(scope="module")
def restored(corpus: Corpus) -> list[str]:
    """Keys of restored photographs."""
    return read_index(corpus.folder, Shard("restore", 0), ["key"])["key"].to_pylist()


def test_what_is_not_published_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ViewingError, match=r"no manifest\.json"):
        open_corpus(str(tmp_path))


def test_sql_sees_samples_ledger_and_images(corpus: Corpus) -> None:
    counted = corpus.sql("select stream, count(*) as n from samples group by stream").to_pylist()
    streams = corpus.summary()["streams"]
    assert {row["stream"]: row["n"] for row in counted} == {name: s["samples"] for name, s in streams.items()}
    fates = corpus.sql("select stage, count(*) as n from ledger group by stage order by stage").to_pylist()
    assert {row["stage"] for row in fates} == {"ingest", "decide", "build"}
    assert fates == [{"stage": s, "n": n} for s, n in sorted(Counter(corpus.ledger["stage"].to_pylist()).items())]
    joined = corpus.sql(
        "select s.key, i.width from samples s join images i on s.parents[1] = i.uid where s.stream = 'text_to_image'"
    )
    assert len(joined) == streams["text_to_image"]["samples"]


def test_images_have_the_columns_of_every_scorer_beside_each_other(tmp_path: Path) -> None:
    """The second scorer lacks one image, as if its row had been quarantined."""
    for name, values in (("ingest", [10, 20, 30]), ("blur", [1, 3])):
        rows = [0, 1, 2] if len(values) == 3 else [0, 2]
        table = pa.table({"unit": ["u"] * len(rows), "row": rows, "uid": [f"{r}" for r in rows], name: values})
        (tmp_path / f"meta/scores/{name}").mkdir(parents=True)
        pq.write_table(table, tmp_path / f"meta/scores/{name}/u.parquet")
    images = Corpus(Folder(str(tmp_path))).images
    assert images.select(["uid", "ingest", "blur"]).to_pylist() == [
        {"uid": "0", "ingest": 10, "blur": 1},
        {"uid": "1", "ingest": 20, "blur": None},
        {"uid": "2", "ingest": 30, "blur": 3},
    ]


def test_rows_and_members_are_those_of_the_shard(corpus: Corpus, restored: list[str]) -> None:
    wanted = [restored[2], restored[0]]
    assert [row["key"] for row in corpus.rows(wanted)] == wanted
    members = corpus.members(restored[0])
    assert json.loads(members["json"])["key"] == restored[0]
    assert Image.open(io.BytesIO(members["output.jpg"])).size == Image.open(io.BytesIO(members["edit_mask.png"])).size
    with pytest.raises(ViewingError, match="no sample 'nobody'"):
        corpus.rows([restored[0], "nobody"])


def test_pictures_of_a_sample_are_its_image_files(corpus: Corpus, restored: list[str]) -> None:
    pictures, members = corpus.pictures(restored[0]), corpus.members(restored[0])
    assert {"input_1", "output"} <= set(pictures)
    assert len(pictures) == sum(name.endswith((".jpg", ".png")) for name in members)
    with Image.open(io.BytesIO(members["output.jpg"])) as output:
        assert np.array_equal(np.asarray(pictures["output"]), np.asarray(output))


def test_progress_counts_the_units_and_inputs_of_every_stage(corpus: Corpus, tmp_path: Path) -> None:
    rows = {row.pop("stage"): row for row in progress(corpus.folder.url).to_pylist()}
    inputs = Counter(corpus.ledger["stage"].to_pylist())
    assert {stage: row["inputs"] for stage, row in rows.items() if stage in inputs} == inputs
    assert rows["ingest"]["units"] == len(set(corpus.images["unit"].to_pylist()))
    assert all(row["inputs"] == row["kept"] + row["dropped"] + row["quarantined"] for row in rows.values())
    assert not any(row["units"] for row in progress(str(tmp_path)).to_pylist()), "nothing has begun there"


def test_show_takes_keys_rows_tables_and_frames(corpus: Corpus, restored: list[str]) -> None:
    keys = restored[:2]
    table = corpus.sql(f"select key from samples where key in ('{keys[0]}', '{keys[1]}')")
    in_order = table["key"].to_pylist()
    shown = corpus.show(in_order)
    for same in (table, table.to_pandas(), table.to_pylist(), corpus.rows(in_order), table["key"]):
        np.testing.assert_array_equal(np.asarray(corpus.show(same)), np.asarray(shown))
    row = corpus.rows(in_order)[0]
    strip = np.asarray(sample_strip(row, read_members(corpus.folder, row)))
    (top,) = (
        y for y in range(80) if np.array_equal(np.asarray(shown)[y : y + len(strip), 12:][:, : strip.shape[1]], strip)
    )
    assert 20 < top < 80
    for wrong in ([], restored[:1] * 65):
        with pytest.raises(ViewingError, match="samples to show; give 1 to 64"):
            corpus.show(wrong)


def test_a_trace_leads_to_the_photograph_and_to_nothing_else(corpus: Corpus, restored: list[str]) -> None:
    trace = corpus.trace(restored[0])
    assert SampleRecord.model_validate(trace.record).key == restored[0]
    (photograph,) = trace.photographs
    assert [photograph.uid] == trace.record["parents"]
    assert photograph.columns["width"] > 0
    assert [row["stage"] for row in trace.ledger] == ["ingest", "decide", "build"]
    assert {row["uid"] for row in trace.ledger} == {photograph.uid}
    assert restored[0] in trace.ledger[-1]["outputs"]
    assert [op["name"] for op in trace.operations] == [op["name"] for op in trace.record["ops"]]
    assert trace.operations[0]["params"]["input"] == trace.ledger[0]["input"]
    assert trace.models == {}
    said = str(trace)
    for part in (restored[0], photograph.uid, trace.record["instruction"], trace.ledger[0]["input"], "decide"):
        assert part in said


def test_a_trace_of_a_group_leads_to_the_samples_it_is_made_of(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path, ["few_shot_1"])
    row = read_index(folder, Shard("few_shot_1", 0), ["key", "parents"]).to_pylist()[0]
    key, (uid,) = row["key"], row["parents"]
    entries = [
        ("group", "query-1", "kept", [key]),
        ("group", "query-2", "kept", ["another-group"]),
        ("build", f"{uid}/edit_pairs/recolor", "kept", ["query-1", "query-2"]),
        ("build", f"{uid}/edit_pairs/remove", "dropped", []),
        ("build", f"{uid}/captions/caption", "kept", ["caption-1"]),
        ("decide", "photo.jpg", "kept", []),
    ]
    for number, (stage, tried, status, outputs) in enumerate(entries):
        made = LedgerRow("u", number, tried, uid, status, outputs=tuple(outputs))
        folder.write_table(ledger_path(stage, f"u{number}"), ledger_table([made]))
    folder.write_table("meta/scores/ingest/u.parquet", pa.table({"unit": ["u"], "row": [0], "uid": [uid]}))
    trace = open_corpus(folder.url).trace(key)
    assert [(e["stage"], e["input"]) for e in trace.ledger] == [
        ("decide", "photo.jpg"),
        ("build", f"{uid}/edit_pairs/recolor"),
        ("group", "query-1"),
    ]


def test_figures_show_the_same_numbers_as_the_summary(corpus: Corpus) -> None:
    counts = summary(corpus.folder)
    (axes,) = corpus.plot_mixture().axes
    widths = [bar.get_width() for bar in axes.patches]
    assert sum(widths) == pytest.approx(1)
    assert widths[0] == pytest.approx(counts["streams"]["text_to_image"]["samples"] / counts["samples"])

    (axes,) = corpus.plot_funnel().axes
    names = [label.get_text().split()[0] for label in axes.get_yticklabels()]
    assert names == ["ingest", "optout", "min_side", "aspect", "duplicate"]
    assert [bar.get_width() for bar in axes.patches] == [8, 8, 8, 8, 8, 0, 0, 0, 0, 0]

    figure = corpus.plot_distributions("severity", "instruction length")
    assert [a.get_title(loc="left").partition(":")[0] for a in figure.axes] == ["restore", *counts["streams"]]
    assert len(corpus.plot_filter("min_side").axes) == 1


def test_unknown_columns_are_named_with_those_that_there_are(corpus: Corpus) -> None:
    with pytest.raises(ViewingError, match="'sharpness'; there are min_side, aspect"):
        corpus.plot_filter("sharpness")
    with pytest.raises(ViewingError, match="'beauty'; there are output size, instruction length"):
        corpus.plot_distributions("beauty")
