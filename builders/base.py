"""What a builder is: a deterministic function from one image to attempts, and from an attempt to samples.

An *attempt* is the unit of accounting: it ends as kept (its samples), dropped (a gate, with the value that decided)
or quarantined (an error, recorded by the engine). `attempts` must be cheap: it sees the record, never pixels.
"""

from __future__ import annotations

import difflib
import io
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat

from schemas.codec import decode_raw, decode_rgb
from schemas.identity import sample_key
from schemas.records import ImageRecord, Op, SampleRecord
from schemas.vocabulary import STREAMS

if TYPE_CHECKING:
    from builders.annotators.annotator import Artefact


class BuilderParams(BaseModel):
    """Base of a builder's recipe section: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _equal_weights(value: Any) -> Any:
    return dict.fromkeys(value, 1.0) if isinstance(value, list | tuple) else value


# In a recipe: names with weights, or a list of names that weigh alike.
Weights = Annotated[
    dict[str, PositiveFloat],
    BeforeValidator(_equal_weights, json_schema_input_type=dict[str, PositiveFloat] | list[str]),
    Field(min_length=1),
]


def check_names(weights: Weights, known: Collection[str], what: str) -> Weights:
    """Return `weights` unchanged, or raise ValueError with the unknown name and those that it may have meant."""
    for name in weights:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"unknown {what} {name!r}; {hint}")
    return weights


def draw_names(weights: Weights, count: int, rng: np.random.Generator) -> list[str]:
    """At most `count` different names, drawn by weight."""
    p = np.array(list(weights.values())) / sum(weights.values())
    return [str(name) for name in rng.choice(list(weights), size=min(count, len(weights)), replace=False, p=p)]


@dataclass(frozen=True)
class SourceImage:
    """One kept image: its record, its normalised JPEG bytes, its raw depth if the source has one, its artefacts.

    `artefacts` holds what annotators found, by annotator, of those that the recipe has; `others` the images that
    `record.pairs` name, by uid.
    """

    record: ImageRecord
    jpeg: bytes
    depth_png: bytes = b""
    artefacts: Mapping[str, Artefact] = field(default_factory=dict)
    others: Mapping[str, SourceImage] = field(default_factory=dict)

    @cached_property
    def pixels(self) -> np.ndarray:
        """uint8 [H, W, 3] RGB. Read-only: it is shared by all builders."""
        return _frozen(decode_rgb(self.jpeg))

    @cached_property
    def depth(self) -> np.ndarray | None:
        """uint16 [H, W] inverse depth (larger is nearer, 0 is unknown), or None."""
        if not self.depth_png:
            return None
        return _frozen(decode_raw(self.depth_png))


@dataclass(frozen=True)
class Sample:
    """A finished sample: its record and its image members (`{"input_1.jpg": ..., "output.jpg": ...}`)."""

    record: SampleRecord
    images: dict[str, bytes]

    @property
    def members(self) -> dict[str, bytes]:
        """All members, with the instruction and the record added."""
        return {**self.images, "txt": self.record.instruction.encode(), "json": self.record.to_json()}

    @property
    def image_sizes(self) -> dict[str, dict[str, int]]:
        """`{"width", "height"}` of every image member."""
        return {n: dict(zip(("width", "height"), image_size(d), strict=True)) for n, d in self.images.items()}


@dataclass(frozen=True)
class Rejected:
    """A gate said no. `reason` is a stable slug, `value` the number that was compared."""

    reason: str
    value: float = 0.0
    detail: str = ""


Outcome = list[Sample] | Rejected


class Builder(ABC):
    """One task family. `name` and `version` enter the spec digest: raise the version when outputs change."""

    name: ClassVar[str]
    version: ClassVar[str]
    Params: ClassVar[type[BuilderParams]]

    def __init__(self, params: BuilderParams) -> None:
        self.params = params

    def preflight(self) -> None:
        """Check, before a job starts and without loading weights, that everything this builder needs is there.

        Raises:
            filters.models.ModelMissing: names the parameter, the model, and the remedy.
        """
        return

    @property
    def num_gpus(self) -> float:
        """Share of a GPU that a worker reserves."""
        return 0.0

    def required_annotators(self) -> frozenset[str]:
        """Names of annotators without whose artefacts a part of this recipe section could never make a sample."""
        return frozenset()

    @abstractmethod
    def attempts(self, record: ImageRecord, rng: np.random.Generator) -> list[str]:
        """Names of the attempts to make for this image, unique within the image."""

    @abstractmethod
    def build(self, image: SourceImage, attempt: str, rng: np.random.Generator) -> Outcome:
        """Samples of one attempt, or why there are none. `rng` is seeded by (recipe seed, uid/attempt, name)."""


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) of an encoded image, from its header."""
    with Image.open(io.BytesIO(data)) as image:
        return image.size


def draft(image: ImageRecord, stream: str, subtask: str, *ops: Op, variant: int = 0, **fields: Any) -> SampleRecord:
    """A sample record of `image` with everything inherited from it filled in.

    Args:
        image: the parent.
        stream: stream name.
        subtask: exact subtask.
        ops: operations that made this sample, after those that made the image.
        variant: number of the sample among those of this image, stream and subtask.
        fields: further fields of `SampleRecord`.
    """
    inherited = image.model_dump(
        include={"scene_id", "split", "license", "license_url", "author", "source_url", "optout", "captions"}
    )
    return SampleRecord(
        **inherited,
        key=sample_key(image.uid, stream, subtask, variant),
        stream=stream,
        task=STREAMS[stream].task,
        subtask=subtask,
        parents=(image.uid,),
        ops=(*image.ops, *ops),
        **fields,
    )


def joint_rights(parents: Sequence[ImageRecord | SampleRecord]) -> dict[str, Any]:
    """Licence, authors, sources and opt-out of what is made of several records.

    Distinct values are joined in the order of the parents; licences as an SPDX expression in alphabetical order
    (`CC-BY-4.0 AND CC0-1.0`), so that the same ones are one value wherever they are counted.
    """

    def distinct(name: str, separator: str) -> list[str]:
        return list(dict.fromkeys(part for p in parents for part in getattr(p, name).split(separator) if part))

    return {
        "license": " AND ".join(sorted(distinct("license", " AND "))),
        **{name: "; ".join(distinct(name, "; ")) for name in ("license_url", "author", "source_url")},
        "optout": any(parent.optout for parent in parents),
    }


def _frozen(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array
