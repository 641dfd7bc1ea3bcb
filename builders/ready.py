"""Samples that a source brings ready-made (official X2I JSONL): they pass through in our record and streams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from builders.base import Outcome, Sample, draft, image_size
from schemas.codec import encode_mask
from schemas.records import ImageRecord, Op
from schemas.vocabulary import STREAMS, stream_for

VERSION = "1"


@dataclass(frozen=True)
class ReadyImage:
    """A ready sample: `record` describes its target; `images` are the inputs in order, then the target."""

    record: ImageRecord
    task: str
    subtask: str
    instruction: str
    images: tuple[bytes, ...]
    parents: tuple[str, ...]
    variants: tuple[str, ...] = ()

    @classmethod
    def of(cls, record: ImageRecord, ready: dict[str, Any], members: dict[str, bytes]) -> ReadyImage:
        """From the ingest row's `ready` column, whose `images` name the members in order."""
        names, uids = zip(*((i["member"], i["uid"]) for i in ready["images"]), strict=True)
        images = tuple(members[name] for name in names)
        text = (ready["task"], ready["subtask"], ready["instruction"])
        return cls(record, *text, images, uids, tuple(ready["variants"]))


def build_ready(ready: ReadyImage) -> Outcome:
    """The sample, in the stream of its task and number of inputs.

    The source says nothing of what an edit changed, so its `edit_mask` is all ones and `aligned` stays false.

    Raises:
        ValueError: the instruction's placeholders do not fit the images, or no stream takes this many.
    """
    *inputs, output = ready.images
    stream = STREAMS[stream_for(ready.task, len(inputs)).name]
    images = dict(zip(stream.image_members, (*inputs, output), strict=False))
    if stream.edit_mask:
        width, height = image_size(output)
        images["edit_mask.png"] = encode_mask(np.ones((height, width), bool))
    record = draft(
        ready.record,
        stream.name,
        ready.subtask,
        Op.of("x2i_import", VERSION),
        instruction=ready.instruction,
        instruction_variants=ready.variants,
        input_roles=("input",) * len(inputs),
        output_kind="photo" if stream.output == "jpg" else f"map:{ready.subtask}",
        edit_source_index=0 if stream.edit_mask else -1,
        edit_area_ratio=1.0 if stream.edit_mask else -1.0,
    )
    return [Sample(record.model_copy(update={"parents": tuple(dict.fromkeys(ready.parents))}), images)]
