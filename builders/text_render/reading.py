"""Does a picture say what it should? It is read (see filters/scorers/text.py) and compared."""

from __future__ import annotations

from functools import cache

import numpy as np

from filters.scorers.text import Text, TextParams

SIDE = 1536  # longer side in px above which a picture is scaled down before it is read


def read_text(pixels: np.ndarray) -> str:
    """All text in uint8 RGB [H, W, 3], one found line per line, in reading order."""
    reader = _reader()
    return "\n".join(line.text for line in reader.lines(reader.scaled_down(pixels)))


def character_error_rate(read: str, written: str) -> float:
    """Levenshtein distance over the number of characters written; white space does not count, letter case does."""
    a, b = "".join(read.split()), "".join(written.split())
    distances = list(range(len(b) + 1))
    for i, mine in enumerate(a, start=1):
        diagonal, distances[0] = distances[0], i
        for j, theirs in enumerate(b, start=1):
            best = min(distances[j] + 1, distances[j - 1] + 1, diagonal + (mine != theirs))
            diagonal, distances[j] = distances[j], best
    return round(distances[-1] / max(1, len(b)), 4)


@cache
def _reader() -> Text:
    return Text(TextParams(side=SIDE))
