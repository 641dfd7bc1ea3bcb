"""Export to the JSONL that the trainers of OmniGen and OmniGen2 read, with images as files beside it.

Source of the fields: OmniGen/train_helper/data.py, which reads `output_image` (its documentation says
`output_images`), and omnigen2/dataset/omnigen2_train_dataset.py. `task_type` is `task/subtask`, which
`schemas.vocabulary.normalise_task` reads back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipelines.corpus import find_shards, iter_index, read_members
from pipelines.storage import Folder
from schemas.instructions import placeholder
from schemas.vocabulary import STREAMS

JSONL = "x2i.jsonl"
MIX = "mix.yml"
_COLUMNS = ("key", "shard", "offset", "size", "members", "stream", "task", "subtask", "instruction", "split")
_KINDS = {"text_to_image": "t2i", "text_render": "t2i", "edit": "edit", "style": "edit", "restore": "edit"}
_PICTURE = r"\b(?P<noun>photo|photograph|picture|image|shot)(?P<colon>:?) "


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
        for row in chosen(corpus, _with_inputs_first(streams_of(corpus, streams)), split):
            lines.write(_line(_export_sample(corpus, target, row)))
            count += 1
    return count


def export_omnigen2(
    corpus: Folder, out: Path | str, streams: Iterable[str] | None = None, split: str | None = None
) -> int:
    """Write `mix.yml`, one JSONL per stream under `jsonls/`, and the images, for OmniGen2's trainer.

    It opens all paths as they are, so it must be started in `out`. Instructions name images in words, and lines of
    tasks without input have no `input_images`, as in its own data. See `export_x2i` for the arguments.
    """
    target, count, entries = Folder(str(out)), 0, list[dict[str, Any]]()
    for stream in streams_of(corpus, streams):
        lines = []
        for row in iter_rows(corpus, [stream], split):
            sample = _export_sample(corpus, target, row)
            sample["instruction"] = in_words(row["instruction"], len(STREAMS[stream].inputs))
            lines.append(_line({name: value for name, value in sample.items() if value != []}))
        if lines:
            path = f"jsonls/{stream}.jsonl"
            target.write_bytes(path, "".join(lines).encode())
            entries.append({"path": path, "type": _KINDS.get(STREAMS[stream].task, "ic"), "ratio": 1.0})
            count += len(lines)
    if not count:
        raise nothing_left(corpus, split)
    target.write_bytes(MIX, yaml.safe_dump({"ratio_type": "inside_ratio", "data": entries}, sort_keys=False).encode())
    return count


def in_words(instruction: str, inputs: int) -> str:
    """The instruction for a model that takes images apart from the text: words in place of the tags.

    A single image that only stands before the request, or after its own noun (`Take the photo <tag> and ...`), needs
    no words.
    """
    if inputs > 1:
        for k in range(1, inputs + 1):
            instruction = instruction.replace(placeholder(k), f"image {k}")
    elif inputs:
        tag = re.escape(placeholder(1))
        instruction = re.sub(rf"^{tag}\s+(?=[^a-z])", "", instruction)
        instruction = re.sub(_PICTURE + tag, r"\g<noun>\g<colon>", instruction)
        instruction = re.sub(tag, "the image", instruction)
    return instruction[:1].upper() + instruction[1:]


def streams_of(corpus: Folder, wanted: Iterable[str] | None) -> list[str]:
    """Names of the wanted streams, or of all that the corpus has."""
    return sorted({shard.stream for shard in find_shards(corpus, wanted)})


def chosen(corpus: Folder, streams: Iterable[str], split: str | None) -> Iterator[dict[str, Any]]:
    """Index rows of samples to export.

    Raises:
        ValueError: after the last one, if there was none.
    """
    row = None
    for row in iter_rows(corpus, streams, split):
        yield row
    if row is None:
        raise nothing_left(corpus, split)


def iter_rows(corpus: Folder, streams: Iterable[str], split: str | None) -> Iterator[dict[str, Any]]:
    for stream in streams:
        for table in iter_index(corpus, [stream], _COLUMNS, split):
            yield from table.to_pylist()


def nothing_left(corpus: Folder, split: str | None) -> ValueError:
    return ValueError(f"{corpus.url} has no samples of split {split!r} to export")


def _line(sample: Mapping[str, Any]) -> str:
    return json.dumps(sample, ensure_ascii=False) + "\n"


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
