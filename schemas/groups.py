"""The `group` section of a recipe: finished samples put together to samples with examples."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class FewShot(BaseModel):
    """Groups of examples and a query that show the same mapping; see `builders.few_shot`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shots: tuple[Literal[1, 2], ...] = Field(
        default=(1, 2), min_length=1, description="numbers of examples; OmniGen takes 1, OmniGen2 takes 2 as well"
    )
    window_units: int = Field(default=8, ge=1, description="consecutive units within which samples find each other")
    share: float = Field(default=0.1, gt=0, le=1, description="groups per sample that could be in one, at most")
    implicit: float = Field(
        default=0.5, ge=0, le=1, description="share of instructions that leave the task to the examples, where they can"
    )
    contrast: float = Field(
        default=0.1, ge=0, le=1, description="share of groups in pairs with one query and two targets"
    )
    phash_distance: int = Field(
        default=10, ge=0, le=63, description="photographs of a group differ in more than so many of 64 bits"
    )
    max_uses: int = Field(default=3, ge=1, description="in how many groups a sample is an example")

    @field_validator("shots")
    @classmethod
    def _shots_differ(cls, shots: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(shots)) < len(shots):
            raise ValueError("each number of examples can be given once")
        return shots


class Grouping(BaseModel):
    """What is put together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    few_shot: FewShot = FewShot()

    @field_validator("few_shot", mode="before")
    @classmethod
    def _empty_means_defaults(cls, section: Any) -> Any:
        return {} if section is None else section
