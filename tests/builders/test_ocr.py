"""What is written in an image, read by the real packaged model."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from builders.annotators.ocr import Ocr
from builders.base import SourceImage
from filters.packaged import RAPID_OCR
from filters.scorers.text import TextParams
from schemas.codec import encode_jpeg
from schemas.identity import uid_of
from schemas.records import ImageRecord

pytest.importorskip("rapidocr")


def _image(pixels: np.ndarray) -> SourceImage:
    jpeg = encode_jpeg(pixels)
    return SourceImage(ImageRecord(uid=uid_of(jpeg), width=pixels.shape[1], height=pixels.shape[0]), jpeg)


def test_words_are_read_where_they_stand_at_any_scale(photographs: dict[str, np.ndarray]) -> None:
    coffee = cv2.resize(photographs["coffee"], (1200, 800), interpolation=cv2.INTER_CUBIC)
    cv2.rectangle(coffee, (300, 500), (900, 640), (255, 255, 255), -1)
    cv2.putText(coffee, "FRESH COFFEE", (330, 600), cv2.FONT_HERSHEY_SIMPLEX, 2.4, (10, 10, 10), 6, cv2.LINE_AA)
    for side in (600, 1200):
        ocr = Ocr(TextParams(side=side))
        ocr.preflight()
        (found,) = ocr.annotate([_image(coffee)])
        (line,) = [line for line in found.data["lines"] if "COFFEE" in line["text"]]
        assert line["text"].replace(" ", "") == "FRESHCOFFEE" and line["confidence"] > 0.9
        (left, top), (right, bottom) = np.min(line["corners"], 0).tolist(), np.max(line["corners"], 0).tolist()
        assert 300 < left < 345 and 810 < right < 880 and 520 < top < 560 and 595 < bottom < 625


def test_nothing_written_is_an_empty_list_and_the_model_is_named(photographs: dict[str, np.ndarray]) -> None:
    ocr = Ocr(TextParams())
    assert ocr.annotate([_image(photographs["cat"])])[0].data == {"lines": []}
    op = ocr.op()
    assert (op.name, op.model, op.revision) == ("annotate:ocr", "rapidocr", RAPID_OCR.revision)
