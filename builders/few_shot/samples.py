"""A group as a sample: streams `few_shot_1` and `few_shot_2`, whose images are PNG, so that none loses anything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from builders.base import Sample, joint_rights
from builders.few_shot.grouping import Contents, Group
from builders.templates import Phrasing, phrase
from schemas.codec import decode_rgb, encode_png
from schemas.instructions import placeholder
from schemas.records import Op, SampleRecord

VERSION = "1"
_PNG = b"\x89PNG"
VARIANTS = 2  # further phrasings kept beside the instruction
# What a group takes over from its query, whose input and output are its own.
_INHERITED = {
    *("direction", "output_kind", "real_input", "real_output", "edit_area_ratio", "aligned", "align", "change"),
    *("captions", "entities", "scores", "severity", "scene_id", "split"),
}


@dataclass(frozen=True)
class Member:
    """A finished sample of a group: its record, and its input and output as they are stored, JPEG or PNG."""

    record: SampleRecord
    images: tuple[bytes, bytes]

    @classmethod
    def of(cls, members: Mapping[str, bytes]) -> Member:
        """From the members of a sample by name (`input_1.jpg`, `output.jpg`, `json`, ...)."""
        stored = {name.partition(".")[0]: data for name, data in members.items()}
        return cls(SampleRecord.model_validate_json(stored["json"]), (stored["input_1"], stored["output"]))

    @property
    def contents(self) -> Contents:
        given, made = (hashlib.sha256(data).hexdigest() for data in self.images)
        return given, made


def make_sample(group: Group, members: Sequence[Member], rng: np.random.Generator) -> Sample:
    """The sample of a group.

    Args:
        group: as planned.
        members: its supports in order, then its query.
        rng: for the wording; equal generators give both groups of a contrast pair the same instruction.

    Raises:
        ValueError: the members are not those of the group.
    """
    *supports, query = (member.record for member in members)
    if [record.key for record in (*supports, query)] != [m.key for m in (*group.supports, group.query)]:
        raise ValueError(f"group {group.key} was given other members than its own")
    k = len(supports)
    record = SampleRecord(
        **{name: getattr(query, name) for name in _INHERITED},
        **joint_rights([query, *supports]),
        **vars(_wording(group, query, rng)),
        key=group.key,
        stream=group.stream,
        task="few_shot",
        subtask=f"{query.stream}_{query.subtask}",
        input_roles=(*("example_input", "example_output") * k, "query"),
        edit_source_index=2 * k if query.edit_source_index == 0 else -1,
        group=json.dumps(_described(group), sort_keys=True),
        parents=tuple(dict.fromkeys(uid for record in (query, *supports) for uid in record.parents)),
        ops=(*query.ops, Op.of("few_shot_group", VERSION, k=k)),
    )
    *inputs, output = (_as_png(image) for member in members for image in member.images)
    return Sample(record, {**{f"input_{i}.png": png for i, png in enumerate(inputs, start=1)}, "output.png": output})


def _as_png(image: bytes) -> bytes:
    """The same pixels; a PNG stays as it is."""
    return image if image.startswith(_PNG) else encode_png(decode_rgb(image))


def _described(group: Group) -> dict[str, object]:
    return {
        "signature": group.query.signature.to_json(),
        "k": len(group.supports),
        "explicit": group.explicit,
        "supports": [support.key for support in group.supports],
        "query": group.query.key,
        "contrast": group.contrast,
    }


def _wording(group: Group, query: SampleRecord, rng: np.random.Generator) -> Phrasing:
    """An explicit instruction holds that of the query, an implicit one leaves everything to the examples."""
    k = len(group.supports)
    if not group.explicit:
        return phrase("few_shot", f"implicit_{k}", rng, VARIANTS)
    asked = query.instruction.replace(placeholder(1), placeholder(2 * k + 1))
    return phrase("few_shot", f"explicit_{k}", rng, VARIANTS, instruction=asked)
