"""What an annotator is: a deterministic function from images to artefacts, computed once per image and stored.

Task samples are cheap views over artefacts, so a model runs once per image however many builders use what it found.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel

from builders.base import SourceImage
from schemas.records import ImageRecord, Op


@dataclass(frozen=True)
class Artefact:
    """What an annotator found in one image.

    Attributes:
        data: plain JSON: captions, boxes, keypoints, parameters.
        members: encoded files by name, lossless: `{"depth.png": ...}`.
    """

    data: dict[str, Any] = field(default_factory=dict)
    members: dict[str, bytes] = field(default_factory=dict)


class Annotator(ABC):
    """One role (captioner, entity grounder, map detector, ...). Raise `version` when outputs change.

    Constructing one is cheap and needs no model: models load on first use, in the worker that uses them.

    Attributes:
        needs: annotators whose artefacts this one reads if the recipe has them; they run first.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    Params: ClassVar[type[BaseModel]]
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, params: BaseModel) -> None:
        self.params = params

    @property
    def batch_size(self) -> int:
        """How many images to annotate at a time."""
        return 1

    @property
    def num_gpus(self) -> float:
        """Share of a GPU that a worker reserves."""
        return 0.0

    @abstractmethod
    def op(self) -> Op:
        """The provenance entry of everything made with this annotator: its name, version, model and revision."""

    def preflight(self) -> None:
        """Check, before a job starts and without loading weights, that everything this annotator needs is there.

        Raises:
            filters.models.ModelMissing: names the parameter, the model, and the remedy.
        """
        return

    @abstractmethod
    def annotate(self, images: Sequence[SourceImage]) -> list[Artefact]:
        """One artefact per image, in order; an empty one where there is nothing to find."""

    def enrich(self, record: ImageRecord, artefact: Artefact) -> ImageRecord:
        """The record with what was found added to it (captions, entities). The engine adds `op()`."""
        return record
