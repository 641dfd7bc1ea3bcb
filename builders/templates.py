"""Instruction templates: `templates/<builder>.yaml` maps a name to at least ten paraphrases.

`{image}` (or `{image_1}`, `{image_2}`, …) stands for an image placeholder; other fields are filled by the caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import yaml

from schemas.instructions import placeholder

MAX_INPUTS = 5


@dataclass(frozen=True)
class Phrasing:
    """One chosen instruction and further ways to say the same."""

    instruction: str
    instruction_variants: tuple[str, ...]
    template_id: str


@cache
def load_templates(builder: str) -> Mapping[str, list[str]]:
    """All templates of a builder by name.

    Raises:
        FileNotFoundError: the builder has no template file.
    """
    return yaml.safe_load((Path(__file__).parent / "templates" / f"{builder}.yaml").read_text("utf-8"))


def phrase(builder: str, name: str, rng: np.random.Generator, /, variants: int = 2, **fields: str) -> Phrasing:
    """Draw one template and `variants` others, all filled with the same fields.

    Raises:
        KeyError: there is no such template, or a field that it needs was not given.
    """
    templates = load_templates(builder)[name]
    chosen = rng.permutation(len(templates))[: variants + 1]
    tags = {f"image_{i}": placeholder(i) for i in range(1, MAX_INPUTS + 1)} | {"image": placeholder(1)}
    texts = [templates[i].format(**tags, **fields) for i in chosen]
    return Phrasing(texts[0], tuple(texts[1:]), f"{builder}/{name}/{chosen[0]}")
