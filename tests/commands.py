"""Command lines of x2i as its own parser reads them, without running them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from pipelines.cli import app

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def parse(words: Sequence[str]) -> dict[str, Any]:
    """What each parameter gets from `x2i COMMAND ...`.

    Raises:
        AssertionError: there is no such command or option, or a value that it cannot have.
    """
    program, name, *arguments = words
    assert program == "x2i" and name in COMMANDS, f"{' '.join(words)}: x2i has no command {name}"
    try:
        return dict(COMMANDS[name].make_context(name, arguments).params)
    except typer.TyperException as error:
        raise AssertionError(f"{' '.join(words)}: {error}") from error
