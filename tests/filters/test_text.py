"""Text in images: a page of text, a sign in a photograph, and photographs without any."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import skimage.data

from filters.scorers.text import Line, Text, TextParams
from tests.filters.scoring import Rows, score

pytest.importorskip("rapidocr", reason="needs the extra `offline`")


@pytest.fixture(scope="module")
def rows(photographs: dict[str, np.ndarray]) -> Rows:
    lettered = cv2.resize(skimage.data.coffee(), None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
    cv2.putText(lettered, "STOCK PHOTO 2024", (20, 120), cv2.FONT_HERSHEY_SIMPLEX, 1.0, (255, 255, 255), 2)
    pictures = {name: photographs[name] for name in ("cat", "rocket", "china")}
    pictures["page"] = np.repeat(skimage.data.page()[..., None], 3, 2)
    pictures["motorcycle"] = skimage.data.stereo_motorcycle()[0]
    return score(Text(TextParams()), {**pictures, "lettered": lettered})


def test_photographs_without_text_have_none(rows: Rows) -> None:
    for name in ("cat", "rocket", "china"):
        assert rows[name] == {"text_area": 0.0, "text_chars": 0}


def test_a_page_is_mostly_text(rows: Rows) -> None:
    assert 0.3 < rows["page"]["text_area"] < 1
    assert rows["page"]["text_chars"] > 80


def test_a_word_in_a_photograph_is_small(rows: Rows) -> None:
    assert rows["motorcycle"]["text_chars"] == len("YAMAHA")
    assert 0 < rows["motorcycle"]["text_area"] < 0.01


def test_written_watermarks_are_read(rows: Rows) -> None:
    assert rows["lettered"]["text_chars"] == len("STOCKPHOTO2024")
    assert 0.03 < rows["lettered"]["text_area"] < 0.2


@pytest.mark.parametrize(
    ("text", "confidence", "is_text"),
    [("github", 0.6, True), ("OK", 0.95, True), ("TL", 0.66, False), ("鑫", 0.92, False), ("***", 0.93, False)],
)
def test_shapes_that_look_like_a_letter_or_two_are_no_text(text: str, confidence: float, is_text: bool) -> None:
    assert Line(np.zeros((4, 2)), text, confidence).is_text == is_text
