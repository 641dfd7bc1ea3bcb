"""ocr: what is written in an image, and where."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

from pydantic import BaseModel

from builders.annotators.annotator import Annotator, Artefact
from builders.base import SourceImage
from filters.models import rounded
from filters.scorers.text import Text, TextParams
from schemas.records import Op


class Ocr(Annotator):
    """Data: `lines`, in reading order: `text`, `confidence` (0..1) and `corners` (x, y in pixels, clockwise from the
    upper left). PP-OCRv6 (small) by rapidocr, with the rules of the scorer `text`.
    """

    name: ClassVar[str] = "ocr"
    version: ClassVar[str] = "1"
    Params: ClassVar[type[BaseModel]] = TextParams
    params: TextParams

    def op(self) -> Op:
        op = Op.of(f"annotate:{self.name}", self.version, **self.params.model_dump(mode="json"))
        return op.model_copy(update=self._text.provenance)

    def preflight(self) -> None:
        self._text.preflight()

    def annotate(self, images: Sequence[SourceImage]) -> list[Artefact]:
        return [Artefact({"lines": self._lines(image)}) for image in images]

    def _lines(self, image: SourceImage) -> list[dict[str, Any]]:
        small = self._text.scaled_down(image.pixels)
        scale = image.pixels.shape[1] / small.shape[1]
        return [
            {
                "text": line.text,
                "confidence": rounded(line.confidence),
                "corners": [[round(float(x), 1), round(float(y), 1)] for x, y in line.corners * scale],
            }
            for line in self._text.lines(small)
        ]

    @cached_property
    def _text(self) -> Text:
        return Text(self.params)
