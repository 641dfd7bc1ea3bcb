"""Export to the two formats whose readers take one photograph and one text, or one photograph for another.

`instructpix2pix`: Parquet as Hugging Face writes it, with the columns that the InstructPix2Pix trainer of diffusers
looks for. `open_clip`: WebDataset tars of `jpg` and `txt` with `sizes.json`, as open_clip's own loader reads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus import read_members
from pipelines.export import chosen, in_words, streams_of
from pipelines.stages.pack import write_shard
from pipelines.storage import Folder
from schemas.shards import encode_member
from schemas.vocabulary import STREAMS

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_FEATURES = {
    "input_image": {"_type": "Image"},
    "edit_prompt": {"dtype": "string", "_type": "Value"},
    "edited_image": {"_type": "Image"},
}
_SCHEMA = pa.schema(
    [("input_image", _IMAGE), ("edit_prompt", pa.string()), ("edited_image", _IMAGE)],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)
_EDITS = ("edit", "style")
_ROW_GROUP = 100  # `datasets` recommends it for rows with images
_SPLITS = {"train": "train", "val": "validation", "test": "test"}  # names that `datasets` recognises


def export_instructpix2pix(
    corpus: Folder, out: Path | str, streams: Iterable[str] | None = None, split: str | None = None
) -> int:
    """Write `data/<split>-<shard>.parquet` with the columns `input_image`, `edit_prompt` and `edited_image`.

    Args:
        corpus: a published corpus.
        out: folder or fsspec URL to write to; equal corpora give equal files.
        streams: only these, which take one input image; None for edits and styles.
        split: only samples of this split.

    Returns:
        Number of samples written.

    Raises:
        ValueError: a stream takes no or several images, or no sample is left to export.
    """
    names = [s for s in streams_of(corpus, streams) if streams is not None or STREAMS[s].task in _EDITS]
    _require(names, inputs=1, what="InstructPix2Pix edits one image")
    target, count = Folder(str(out)), 0
    for shard, part, rows in _by_shard(corpus, names, split):
        stem = shard.rpartition("/")[2].removesuffix(".tar")
        with target.writing(f"data/{_SPLITS[part]}-{stem}.parquet") as path, pq.ParquetWriter(path, _SCHEMA) as table:
            for start in range(0, len(rows), _ROW_GROUP):
                batch = [_pair(corpus, row) for row in rows[start : start + _ROW_GROUP]]
                table.write_table(pa.Table.from_pylist(batch, _SCHEMA))
        count += len(rows)
    return count


def export_open_clip(
    corpus: Folder, out: Path | str, streams: Iterable[str] | None = None, split: str | None = None
) -> int:
    """Write `<split>/00000.tar` and so on, and `<split>/sizes.json`; a tar per shard.

    Args:
        streams: only these, which take no image; None for all such.
        corpus, out, split: as for `export_instructpix2pix`.

    Returns:
        Number of samples written.

    Raises:
        ValueError: a stream takes images, or no sample is left to export.
    """
    names = [s for s in streams_of(corpus, streams) if streams is not None or not STREAMS[s].inputs]
    _require(names, inputs=0, what="open_clip learns from single images with a text")
    target, sizes = Folder(str(out)), dict[str, dict[str, int]]()
    for _, part, rows in _by_shard(corpus, names, split):
        of_split = sizes.setdefault(part, {})
        name = f"{len(of_split):05d}.tar"
        write_shard(target, f"{part}/{name}", (_caption(corpus, row) for row in rows))
        of_split[name] = len(rows)
    for part, of_split in sizes.items():
        target.write_json(f"{part}/sizes.json", of_split)
    return sum(sum(of_split.values()) for of_split in sizes.values())


def _by_shard(
    corpus: Folder, streams: Iterable[str], split: str | None
) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Path of a shard, split, and index rows, none of which are empty."""
    for shard, of_shard in groupby(chosen(corpus, streams, split), key=lambda row: row["shard"]):
        rows = list(of_shard)
        for part in _SPLITS:
            if of_split := [row for row in rows if row["split"] == part]:
                yield shard, part, of_split


def _require(streams: Iterable[str], inputs: int, what: str) -> None:
    others = [stream for stream in streams if len(STREAMS[stream].inputs) != inputs]
    if others:
        raise ValueError(f"{what}, and {', '.join(others)} takes {len(STREAMS[others[0]].inputs)}: leave it out")
    if not streams:
        fitting = [s.name for s in STREAMS.values() if len(s.inputs) == inputs]
        raise ValueError(f"{what}, and the corpus has nothing of the kind; streams that fit are {', '.join(fitting)}")


def _pair(corpus: Folder, row: dict[str, Any]) -> dict[str, Any]:
    members = read_members(corpus, row)
    source, target = (next(name for name in members if name.startswith(kind)) for kind in ("input_1.", "output."))
    return {
        "input_image": {"bytes": members[source], "path": f"{row['key']}.{source}"},
        "edit_prompt": in_words(row["instruction"], 1),
        "edited_image": {"bytes": members[target], "path": f"{row['key']}.{target}"},
    }


def _caption(corpus: Folder, row: dict[str, Any]) -> bytes:
    members = read_members(corpus, row)
    image, text = encode_member(f"{row['key']}.jpg", members["output.jpg"]), members["txt"]
    return image + encode_member(f"{row['key']}.txt", text)
