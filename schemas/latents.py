"""Image latents that are stored beside the shards, so that no trainer encodes them: their place, their recipe section.

latents/<first 16 digits of the VAE's digest>-<longest side>/
    edit-000000.safetensors   a tensor [2C, h, w] of posterior moments per input image and target, `<key>.<member>`
    edit-000000.parquet       where each of them is (`schemas.arrow.LATENTS`); what they were made of, as metadata

`manifest.json` lists them with the sha256 of the shard that each file was made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from schemas.models import ModelParams

Dtype = Literal["bfloat16", "float16", "float32"]
FOLDER = "latents"
RULE = "1"
"""Raise it when `fine_tune.tokens.fit_images` brings an image to other pixels than before."""
FACTOR = 8  # pixels per latent and side
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_GRID = 16  # pixels per transformer token and side


def folder_of(vae_digest: str, side: int) -> str:
    """Where the moments by one VAE at one side are, relative to the corpus."""
    return f"{FOLDER}/{vae_digest[:16]}-{side}"


def stem_of(path: str) -> str:
    """`edit-000000` of a shard, of its sample index or of its latents."""
    return path.rsplit("/", 1)[-1].partition(".")[0]


def image_names(members: Iterable[Mapping[str, Any]]) -> list[str]:
    """The members of a sample that have latents: its input images, in order, and its target."""
    return [m["name"] for m in members if m["name"].startswith(("input_", "output."))]


class VAEParams(ModelParams):
    """A VAE as recipes name models; `tiny` is the one that comes with x2i."""

    plain_names: ClassVar[frozenset[str] | None] = frozenset({"tiny"})


class Latents(BaseModel):
    """Which latents there shall be. Nothing is encoded without this section.

    Attributes:
        vae: Hub id, absolute path, or `tiny`; that of the model to be trained.
        revision: commit of a Hub id.
        subfolder: where in it the VAE is; `vae` in a diffusers pipeline.
        sides: longest sides of an image in pixels, one set of latents each: the trainer's `data.max_side`.
        dtype: in which they are stored. They are computed in float32.
        device, num_gpus: where they are computed, as for other models.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    vae: str = Field(min_length=1)
    revision: str = ""
    subfolder: str = ""
    sides: tuple[int, ...] = Field(min_length=1)
    dtype: Dtype = "bfloat16"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    num_gpus: float = Field(default=0, ge=0)

    @field_validator("sides")
    @classmethod
    def _are_on_the_grid(cls, sides: tuple[int, ...]) -> tuple[int, ...]:
        if bad := [side for side in sides if side < _GRID or side % _GRID]:
            raise ValueError(f"{', '.join(map(str, bad))} is not a positive multiple of {_GRID}")
        return tuple(sorted(set(sides)))

    @model_validator(mode="before")
    @classmethod
    def _vae_is_pinned(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("vae"), str):
            VAEParams(model=values["vae"], revision=values.get("revision", ""))
        return values

    @property
    def checkpoint_name(self) -> str:
        """The VAE's id or path; "" for the one that comes with x2i."""
        return "" if self.vae == "tiny" else self.vae

    @property
    def params(self) -> VAEParams:
        """The encoder, and where it runs."""
        where: dict[str, Any] = {"device": self.device, "num_gpus": self.num_gpus}
        return VAEParams(model=self.vae, revision=self.revision, dtype="float32", **where)
