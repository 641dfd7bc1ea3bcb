"""Instructions of edits, put together from clauses and frames.

An entry of `templates/edit_pairs.yaml` that holds `{image}` is a whole instruction. Any other is a clause ("remove
{thing}") that goes into one of the `frames` ("In {image}, {clause}."), and two of them into one of the `frames_of_two`.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from builders.edit_pairs.edit import Wording
from builders.templates import Phrasing, load_templates
from schemas.instructions import placeholder

_FILE = "edit_pairs"


def say(wordings: list[Wording], rng: np.random.Generator, variants: int = 2) -> Phrasing:
    """An instruction for one edit, or for two at once, and `variants` other ways to say it.

    Raises:
        KeyError: there is no such entry, or a field that it needs is missing.
        ValueError: more than two edits.
    """
    said = dict(_draw(wordings, rng, 3 * (variants + 1)))
    texts = list(said)[: variants + 1]
    return Phrasing(texts[0], tuple(texts[1:]), said[texts[0]])


def _draw(wordings: list[Wording], rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    templates = load_templates(_FILE)
    if len(wordings) > 2:
        raise ValueError(f"one instruction asks for at most two edits, not {len(wordings)}")
    name = "+".join(w.name for w in wordings)
    drawn = []
    for _ in range(count):
        entries = [_pick(templates[w.name], rng, clauses_only=len(wordings) > 1) for w in wordings]
        clauses = [
            text.format(image=placeholder(1), **w.fields) for (_, text), w in zip(entries, wordings, strict=True)
        ]
        numbers = ",".join(str(i) for i, _ in entries)
        if len(wordings) == 1 and "{image}" in entries[0][1]:
            drawn.append((clauses[0], f"{_FILE}/{name}/{numbers}"))
            continue
        frames = "frames" if len(wordings) == 1 else "frames_of_two"
        i, frame = _pick(templates[frames], rng)
        parts = dict(zip(("clause", "second"), clauses, strict=False))
        capitals = {part.capitalize(): _upper_first(text) for part, text in parts.items()}
        text = frame.format(image=placeholder(1), **parts, **capitals)
        drawn.append((text, f"{_FILE}/{name}/{numbers}+{frames}/{i}"))
    return drawn


def _pick(entries: list[str], rng: np.random.Generator, clauses_only: bool = False) -> tuple[int, str]:
    usable = [i for i, text in enumerate(entries) if not (clauses_only and "{image}" in text)]
    i = usable[int(rng.integers(len(usable)))]
    return i, entries[i]


def _upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def plain(wordings: list[Wording]) -> str:
    """What is asked for in one plain sentence without placeholders, for a model that edits or judges."""
    templates, texts = load_templates(_FILE), []
    for wording in wordings:
        entries = templates[wording.name]
        entry = next((text for text in entries if "{image}" not in text), entries[0])
        texts.append(entry.format(image="the picture", **wording.fields).rstrip("."))
    return f"{_upper_first(' and '.join(texts))}."


def all_instructions(name: str, fields: dict[str, str]) -> list[str]:
    """Everything that can be said with one entry, for the tests and for whoever reviews the templates."""
    templates = load_templates(_FILE)
    texts = []
    for entry, frame in product(templates[name], templates["frames"]):
        clause = entry.format(image=placeholder(1), **fields)
        whole = "{image}" in entry
        texts.append(
            clause if whole else frame.format(image=placeholder(1), clause=clause, Clause=_upper_first(clause))
        )
    return list(dict.fromkeys(texts))
