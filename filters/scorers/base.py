"""What a scorer is: a deterministic function from a batch of images to one row of columns each.

A scorer names its columns and what made them (version, model, revision); a null means that the value does not exist
for this image (no caption to compare with, say). A scorer never drops an image and never guesses a value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from schemas.codec import decode_rgb
from schemas.records import Captions


class ScorerParams(BaseModel):
    """Base of a scorer's recipe section: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class ScorerInput:
    """One ingested image as a scorer sees it: encoded, 8-bit sRGB."""

    uid: str
    data: bytes
    captions: Captions

    @cached_property
    def pixels(self) -> np.ndarray:
        """uint8 [H, W, 3] RGB.

        Raises:
            ValueError: the bytes are not an image.
        """
        return decode_rgb(self.data)


class Scorer(ABC):
    """One scorer. Raise `version` when the same input gives other values than before.

    Constructing one is cheap and needs no model: models load on first use, in the worker that uses them.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    Params: ClassVar[type[ScorerParams]]

    def __init__(self, params: ScorerParams) -> None:
        self.params = params

    @property
    @abstractmethod
    def columns(self) -> dict[str, pa.DataType]:
        """The columns this scorer writes, each with a name that no other scorer uses."""

    @property
    def batch_size(self) -> int:
        """How many images to score at a time."""
        return 1

    @property
    def provenance(self) -> dict[str, str]:
        """Stored in the metadata of each column: `model` and `revision`, where a model made it."""
        return {}

    def preflight(self) -> None:
        """Check, before a job starts and without loading weights, that everything this scorer needs is there.

        Raises:
            filters.models.ModelMissing: names the parameter, the model, and the remedy.
        """
        return

    @abstractmethod
    def score(self, items: Sequence[ScorerInput]) -> list[dict[str, Any]]:
        """One row per item, in order, with a value or None for every column."""
