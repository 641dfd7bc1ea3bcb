"""Shared by the tests of sources: list and read one as the engine does."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from pipelines.sources import BadRow, Item, ReadySample, Row, SourceRow, open_reader
from pipelines.storage import Folder
from schemas.sources import Source


def config(**section: Any) -> Source:
    return TypeAdapter(Source).validate_python({"name": "pool", **section})


def listing(folder: Folder, **section: Any) -> tuple[list[Item], list[str]]:
    reader = open_reader(config(**section), folder.url)
    return list(reader.list()), reader.warnings


def read(folder: Folder, **section: Any) -> list[Row]:
    """List, send the items through JSON as a plan does, and read them with a reader that has listed nothing."""
    items, _ = listing(folder, **section)
    planned = [Item(**item) for item in json.loads(json.dumps([asdict(item) for item in items]))]
    reader = pickle.loads(pickle.dumps(open_reader(config(**section), folder.url)))
    rows = list(reader.read(planned))
    assert len({row.input for row in rows}) == len(rows)
    expected = [item.rows for item in items]
    if -1 not in expected:
        assert sum(expected) == len(rows)  # every listed row is accounted for
    return rows


def good(rows: list[Row]) -> dict[str, SourceRow]:
    return {row.input: row for row in rows if isinstance(row, SourceRow)}


def bad(rows: list[Row]) -> dict[str, str]:
    return {row.input: row.reason for row in rows if isinstance(row, BadRow)}


def ready(rows: list[Row]) -> dict[str, ReadySample]:
    return {row.input: row for row in rows if isinstance(row, ReadySample)}
