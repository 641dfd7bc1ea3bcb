"""How well image and caption agree, without CLIP: ConSE on two small packaged models.

It hears about objects that ImageNet has a class for, and little about people, scenes, attributes or relations: on 55
captioned photographs, the own caption beats another one's in three of four cases (AUC 0.76). Use it as a quantile.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import pyarrow as pa

from filters.models import rounded
from filters.packaged import EFFICIENTNET_LITE0, MINILM, EfficientNetLite0, ImageNetConcepts, MiniLM
from filters.scorers.base import Scorer, ScorerInput, ScorerParams
from schemas.models import ModelParams


class ConseParams(ModelParams, ScorerParams):
    """Parameters of the `conse` scorer."""

    plain_names: ClassVar[frozenset[str] | None] = frozenset({"efficientnet-lite0+all-minilm-l6-v2"})

    model: str = "efficientnet-lite0+all-minilm-l6-v2"


class Conse(Scorer):
    """`conse_score`: cosine, -1..1, of the caption and what EfficientNet-Lite0 sees; null without caption."""

    name = "conse"
    version = "1"
    Params = ConseParams
    params: ConseParams

    @property
    def columns(self) -> dict[str, pa.DataType]:
        return {"conse_score": pa.float32()}

    @property
    def batch_size(self) -> int:
        return self.params.batch_size

    @property
    def provenance(self) -> dict[str, str]:
        return {"model": self.params.model, "revision": f"{EFFICIENTNET_LITE0.revision}, {MINILM.revision}"}

    def preflight(self) -> None:
        for model in (EFFICIENTNET_LITE0, MINILM):
            _ = model.path

    @cached_property
    def _models(self) -> tuple[EfficientNetLite0, MiniLM, ImageNetConcepts]:
        text = MiniLM(self.params)
        return EfficientNetLite0(self.params), text, ImageNetConcepts(text)

    def score(self, items: Sequence[ScorerInput]) -> list[dict[str, Any]]:
        captioned = [item for item in items if item.captions.best()]
        if not captioned:
            return [{"conse_score": None} for _ in items]
        classify, embed, concepts = self._models
        _, logits = classify(captioned)
        texts = concepts.text_vectors(embed([item.captions.best() for item in captioned]))
        cosines = iter((concepts.image_vectors(logits) * texts).sum(1))
        return [{"conse_score": rounded(next(cosines)) if item.captions.best() else None} for item in items]
