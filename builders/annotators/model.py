"""What annotators with a model share: the recipe's parameters, provenance, and the check before a job starts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

from builders.annotators.annotator import Annotator, Artefact
from filters.models import Checkpoint, Choice
from schemas.models import ModelParams
from schemas.records import Op


class ModelAnnotator(Annotator):
    """An annotator with one model. `files` are what the model has to hold, checked before a job starts."""

    Params: ClassVar[type[ModelParams]]
    params: ModelParams

    @property
    def batch_size(self) -> int:
        return self.params.batch_size

    @property
    def num_gpus(self) -> float:
        return self.params.num_gpus

    @property
    def files(self) -> tuple[Choice, ...]:
        """File name patterns of the model; one of each choice is needed."""
        return ()

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.params)

    def preflight(self) -> None:
        self.checkpoint.check(*self.files)

    def op(self) -> Op:
        return self._op

    @cached_property
    def _op(self) -> Op:
        elsewhere = {"model", "revision", "batch_size", *self.params.resources}
        params = self.params.model_dump(mode="json", exclude=elsewhere)
        plain = json.dumps(params, sort_keys=True)
        name, revision = f"annotate:{self.name}", self.checkpoint.revision
        return Op(name=name, version=self.version, params=plain, model=self.params.model, revision=revision)

    def found(self, members: Mapping[str, bytes], **data: Any) -> Artefact:
        """An artefact that says what made it: `data["op"]` is `op()`."""
        return Artefact({**data, "op": self.op().model_dump(mode="json")}, dict(members))


def load_part(auto: Any, checkpoint: Checkpoint, params: ModelParams, **options: Any) -> Any:
    """`auto.from_pretrained` of what comes beside a model of transformers: its image processor, its tokenizer.

    Raises:
        ModelMissing: the model has none.
    """
    pinned = {"revision": params.revision} if params.is_hub else {}
    try:
        return auto.from_pretrained(
            str(checkpoint.root or params.model), trust_remote_code=params.trust_remote_code, **pinned, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise checkpoint.missing(f"{auto.__name__} cannot load it: {error}") from error
