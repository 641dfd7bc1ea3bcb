"""Image placeholders in instructions: `<img><|image_1|></img>`, numbered from 1 without gaps.

The rules are what the official OmniGen processor asserts (OmniGen/processor.py: ids contiguous from 1, number of
distinct ids equal to the number of input images; an id may repeat) plus the malformed tags found in public data.
"""

from __future__ import annotations

import re

_TAG = re.compile(r"<img><\|image_(\d+)\|></img>")
# Anything that looks like a piece of a tag once the well-formed ones are removed.
_FRAGMENT = re.compile(r"<\s*\\?/?\s*img\s*\\?/?\s*>|<?\|?\s*image_\d+\s*\|?>|<\|\s*image_?\d*", re.IGNORECASE)
_RESERVED = re.compile(r"<\|(?:user|assistant|end|endoftext|diffusion|system)\|>|<cfg>")


def placeholder(index: int) -> str:
    """The tag of input image `index` (1-based)."""
    return f"<img><|image_{index}|></img>"


def lint_instruction(instruction: str, inputs: int) -> list[str]:
    """Problems of an instruction for a sample with `inputs` input images; an empty list means it is valid."""
    problems = []
    if not instruction.strip():
        problems.append("instruction is empty")
    if "\x00" in instruction:
        problems.append("instruction contains NUL")
    ids = sorted({int(i) for i in _TAG.findall(instruction)})
    if ids != list(range(1, len(ids) + 1)):
        problems.append(f"placeholders {ids} are not contiguous from 1")
    if len(ids) != inputs:
        problems.append(f"{len(ids)} distinct placeholder(s) for {inputs} input image(s)")
    rest = _TAG.sub("", instruction)
    problems += [f"malformed tag {m.group(0)!r}" for m in _FRAGMENT.finditer(rest)]
    problems += [f"reserved token {m.group(0)!r}" for m in _RESERVED.finditer(rest)]
    return problems


def check_instruction(instruction: str, inputs: int) -> str:
    """Return the instruction unchanged, or raise ValueError with every problem found."""
    if problems := lint_instruction(instruction, inputs):
        raise ValueError(f"bad instruction {instruction!r}: {'; '.join(problems)}")
    return instruction
