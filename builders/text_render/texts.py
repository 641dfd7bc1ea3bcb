"""What is written: words, phrases and paragraphs put together from a list of our own, with drawn numbers and names."""

from __future__ import annotations

import calendar

import numpy as np

from builders.templates import load_templates

_CODE_LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"  # no I, O or Q, which look like digits
_DAYS, _MONTHS = tuple(calendar.day_name), tuple(calendar.month_name)[1:]


def compose(kind: str, rng: np.random.Generator) -> str:
    """One text of a kind (`word`, `phrase`, `title`, `subtitle`, `sentence`, `heading`, `list_heading`, `item`)."""
    return _filled(str(rng.choice(load_templates("text_render_words")[kind])), kind in _TITLES, rng)


def compose_several(kind: str, count: int, rng: np.random.Generator) -> list[str]:
    """`count` texts of a kind made from different patterns."""
    patterns = rng.choice(load_templates("text_render_words")[kind], size=count, replace=False)
    return [_filled(str(pattern), kind in _TITLES, rng) for pattern in patterns]


_TITLES = ("title", "heading", "list_heading")


def _filled(pattern: str, capitalise: bool, rng: np.random.Generator) -> str:
    noun = str(rng.choice(load_templates("text_render_words")["nouns"]))
    return pattern.format(
        number=int(rng.integers(10, 100)),
        day=rng.choice(_DAYS),
        month=rng.choice(_MONTHS),
        time=f"{rng.integers(6, 23)}:{rng.choice(['00', '15', '30', '45'])}",
        code="".join(rng.choice(list(_CODE_LETTERS), 2)) + f"-{rng.integers(100, 10000)}",
        noun=noun.capitalize() if capitalise else noun,
    )
