"""How a recipe names a model, and where it is to run."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class ModelName(BaseModel):
    """A model in one of three spellings, told apart by how they are written:

    * a plain name (`efficientnet-lite0`): a model that an installed package brings along;
    * an absolute path (`/models/clip`, `~/models/clip`): its content is hashed, so it needs no revision. Relative paths
      are refused, because workers do not run in the folder in which the job was submitted;
    * a hub id (`facebook/dinov2-base`), always with the commit: branches and tags move, and the corpus with them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    # Plain names that mean something here; None where a library knows them.
    plain_names: ClassVar[frozenset[str] | None] = frozenset()

    model: str = Field(min_length=1, description="hub id, absolute path, or name of a packaged model")
    revision: str = Field(default="", description="commit of a hub model: 40 hexadecimal digits")

    @property
    def is_path(self) -> bool:
        return self.model.startswith(("/", "~"))

    @property
    def is_hub(self) -> bool:
        return "/" in self.model and not self.is_path

    @model_validator(mode="after")
    def _is_pinned(self) -> ModelName:
        if not self.is_hub:
            if self.revision:
                raise ValueError(f"revision: only a hub model has one, and {self.model!r} is none")
            if not self.is_path and self.plain_names is not None and self.model not in self.plain_names:
                known = "".join(f"{name!r}, " for name in sorted(self.plain_names))
                raise ValueError(f"model: {self.model!r} is not one of {known}a hub id (org/name) or an absolute path")
        elif self.model.startswith(".") or not _HUB_ID.fullmatch(self.model):
            raise ValueError(f"model: {self.model!r} is neither a hub id (org/name) nor an absolute path")
        elif not _COMMIT.fullmatch(self.revision):
            raise ValueError(
                f"revision: hub model {self.model!r} needs the commit to use, 40 hexadecimal digits as shown under "
                f"'History' on its page (got {self.revision!r}); a branch or tag may change what a build gives"
            )
        return self


class ModelParams(ModelName):
    """The part of a recipe section that every scorer or annotator with a model shares."""

    # Where a model runs is not what it computes: leave these out of a digest.
    resources: ClassVar[frozenset[str]] = frozenset({"device", "num_gpus"})

    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the model")
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: a GPU where the worker sees one"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of the arithmetic; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    batch_size: int = Field(default=16, ge=1, description="images at a time")
    num_gpus: float = Field(default=0, ge=0, description="GPUs that one worker reserves; 0.5: two workers share one")


class VisionLanguageParams(ModelParams):
    """A vision-language model: of transformers in this process, or behind a server that speaks OpenAI's protocol."""

    plain_names: ClassVar[frozenset[str] | None] = None  # a server calls its models as it likes
    resources: ClassVar[frozenset[str]] = ModelParams.resources | {"base_url", "api_key_env", "timeout_s"}

    max_pixels: int = Field(default=1 << 19, ge=64, description="the model sees larger images scaled down to this")
    base_url: str = Field(
        default="",
        pattern=r"^(https?://.+)?$",
        description="of an OpenAI-compatible server, e.g. http://gpu1:8000/v1",
    )
    api_key_env: str = Field(default="", description="environment variable of the workers with the server's key")
    timeout_s: float = Field(default=300, gt=0)

    @model_validator(mode="after")
    def _only_servers_name_freely(self) -> VisionLanguageParams:
        if not self.base_url and not self.is_path and not self.is_hub:
            raise ValueError(
                f"model: {self.model!r} is neither a hub id (org/name) nor an absolute path, and no base_url is given"
            )
        return self
