"""Export to the format that OmniGen's own trainer reads: one JSON object per line, images as files beside it.

Source of the fields: OmniGen/train_helper/data.py, which reads `output_image` (its documentation says
`output_images`). `task_type` is `task/subtask`, which `schemas.vocabulary.normalise_task` reads back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines.corpus import find_shards, iter_index, read_members
from pipelines.storage import Folder
from schemas.vocabulary import STREAMS

JSONL = "x2i.jsonl"
_COLUMNS = ("key", "shard", "offset", "size", "members", "stream", "task", "subtask", "instruction")


def export_x2i(corpus: Folder, out: Path | str, streams: Iterable[str] | None = None, split: str | None = None) -> int:
    """Write `x2i.jsonl` and, under `images/`, every input and output image of the samples.

    Image paths are relative to `out`, which is OmniGen's `--image_path`. Each shard has a folder of its own.

    Args:
        corpus: a published corpus.
        out: folder or fsspec URL to write to; equal corpora give equal files.
        streams: only these; None for all.
        split: only samples of this split.

    Returns:
        Number of samples written.

    Raises:
        ValueError: no sample is left to export.
    """
    target = Folder(str(out))
    count = 0
    with target.writing(JSONL) as path, path.open("w", encoding="utf-8", newline="\n") as lines:
        for stream in _with_inputs_first({shard.stream for shard in find_shards(corpus, streams)}):
            for table in iter_index(corpus, [stream], _COLUMNS, split):
                for row in table.to_pylist():
                    lines.write(json.dumps(_export_sample(corpus, target, row), ensure_ascii=False) + "\n")
                count += len(table)
        if not count:
            raise ValueError(f"{corpus.url} has no samples of split {split!r} to export")
    return count


def _with_inputs_first(streams: Iterable[str]) -> list[str]:
    """The trainer loads the lines with `datasets`, which gives `input_images` no type if the first lists are empty."""
    return sorted(streams, key=lambda stream: (not STREAMS[stream].inputs, stream))


def _export_sample(corpus: Folder, out: Folder, row: Mapping[str, Any]) -> dict[str, Any]:
    members = read_members(corpus, row)
    folder = row["shard"].removeprefix("data/").removesuffix(".tar")
    images = {name: f"images/{folder}/{row['key']}.{name}" for name in members if _is_image_of_pair(name)}
    for name, path in images.items():
        out.write_bytes(path, members[name])
    return {
        "task_type": f"{row['task']}/{row['subtask']}",
        "instruction": row["instruction"],
        "input_images": [path for name, path in images.items() if name.startswith("input_")],
        "output_image": next(path for name, path in images.items() if name.startswith("output.")),
    }


def _is_image_of_pair(name: str) -> bool:
    return name.startswith(("input_", "output."))
