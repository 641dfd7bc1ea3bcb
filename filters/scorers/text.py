"""How much of an image is text: screenshots, slides, memes and watermarks of the written kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from pydantic import Field

from filters.models import decode_batch, rounded
from filters.packaged import RAPID_OCR
from filters.scorers.base import Scorer, ScorerInput, ScorerParams

# Of 55 photographs, a roof was read as one character with confidence 0.9, and furniture as two with up to 0.8; both
# boxes covered more than a third of the picture.
_MIN_LETTERS = 2
_SURE_OF_TWO = 0.9


@dataclass(frozen=True)
class Line:
    """A line of text: its four corners, float [4, 2] (x, y) clockwise from the upper left, and how it reads."""

    corners: np.ndarray
    text: str
    confidence: float

    @property
    def letters(self) -> int:
        """Letters and digits."""
        return sum(character.isalnum() for character in self.text)

    @property
    def is_text(self) -> bool:
        """Whether it is text at all, and not a shape that looks like a letter or two."""
        return self.letters > _MIN_LETTERS or (self.letters == _MIN_LETTERS and self.confidence >= _SURE_OF_TWO)


class TextParams(ScorerParams):
    """Parameters of the `text` scorer."""

    side: int = Field(default=736, ge=64, description="larger images are scaled down to this longer side first")
    min_confidence: float = Field(default=0.5, ge=0, le=1, description="of a line's recognition, to count as text")


class Text(Scorer):
    """`text_area`: share, 0..1, of the image covered by lines of text; `text_chars`: letters and digits in them.

    PP-OCRv6 (small) by rapidocr. A line counts if at least three letters or digits were recognised in it, or two with
    certainty, so a sign with a single Chinese character does not. Text below about 10 px after scaling down is
    not found.
    """

    name = "text"
    version = "1"
    Params = TextParams
    params: TextParams

    @property
    def columns(self) -> dict[str, pa.DataType]:
        return {"text_area": pa.float32(), "text_chars": pa.int32()}

    @property
    def batch_size(self) -> int:
        return 16

    @property
    def provenance(self) -> dict[str, str]:
        return RAPID_OCR.provenance

    def preflight(self) -> None:
        _ = RAPID_OCR.path

    @cached_property
    def _engine(self) -> Any:
        from rapidocr import RapidOCR

        onnx = "EngineConfig.onnxruntime"
        return RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.text_score": self.params.min_confidence,
                # By default, small images are enlarged to 736 px on the shorter side: 4 times slower, and it finds
                # more text where there is none.
                "Det.limit_type": "max",
                "Det.limit_side_len": self.params.side,
                f"{onnx}.intra_op_num_threads": 1,
                f"{onnx}.inter_op_num_threads": 1,
            }
        )

    def score(self, items: Sequence[ScorerInput]) -> list[dict[str, Any]]:
        return [self._measure(pixels) for pixels in decode_batch(items, self.scaled_down)]

    def scaled_down(self, pixels: np.ndarray) -> np.ndarray:
        """The uint8 RGB image as it is read: at most `side` pixels on the longer side."""
        scale = self.params.side / max(pixels.shape[:2])
        if scale >= 1:
            return pixels
        size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
        return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)

    def lines(self, pixels: np.ndarray) -> list[Line]:
        """The lines that count as text in an image from `scaled_down`, in rapidocr's reading order."""
        found = self._engine(np.ascontiguousarray(pixels[..., ::-1]))  # BGR
        if found.boxes is None:
            return []
        lines = [Line(*line) for line in zip(found.boxes, found.txts, map(float, found.scores), strict=True)]
        return [line for line in lines if line.is_text]

    def _measure(self, pixels: np.ndarray) -> dict[str, Any]:
        lines = self.lines(pixels)
        covered = np.zeros(pixels.shape[:2], np.uint8)  # overlapping boxes count once
        for line in lines:
            cv2.fillPoly(covered, [np.rint(line.corners).astype(np.int32)], 1)
        return {"text_area": rounded(covered.mean()), "text_chars": sum(line.letters for line in lines)}
