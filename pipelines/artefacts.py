"""Artefacts on disk: what one annotator found in one unit, and how it is read again.

`artefacts/<annotator>/<unit>.parquet` has a row per image with the plain data and the places of the encoded files in
`artefacts/<annotator>/<unit>.tar`, which is only there if there are any.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from types import TracebackType
from typing import IO, Any

import pyarrow as pa

from builders.annotators.annotator import Artefact
from pipelines.engine import describe
from pipelines.storage import Folder
from schemas.records import Op
from schemas.shards import BLOCK, END_OF_ARCHIVE, encode_member

FOLDER = "artefacts"
SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("row", pa.int64()),
        ("seen", pa.string()),  # digest of what the annotator was shown
        ("data", pa.string()),  # JSON
        ("members", pa.string()),  # JSON: member -> [offset, size] in the tar
    ]
)


def table_path(annotator: str, unit: str) -> str:
    return f"{FOLDER}/{annotator}/{unit}.parquet"


def members_path(annotator: str, unit: str) -> str:
    return f"{FOLDER}/{annotator}/{unit}.tar"


class Artefacts:
    """The artefacts of one annotator and unit, by row of the unit. A context manager.

    Attributes:
        op: what made them.
        spec: digest of the annotator, its parameters, its model, and of the annotators that it needs.
    """

    def __init__(self, corpus: Folder, annotator: str, unit: str) -> None:
        table = corpus.read_table(table_path(annotator, unit))
        made_by = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        self.op, self.spec = Op.model_validate_json(made_by["op"]), made_by["spec"]
        self._rows = {row["row"]: row for row in table.to_pylist()}
        self._has_members = any(row["members"] != "{}" for row in self._rows.values())
        self._corpus, self._path = corpus, members_path(annotator, unit)
        self._tar: IO[bytes] | None = None

    def __enter__(self) -> Artefacts:
        self._tar = self._corpus.open(self._path) if self._has_members else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tar:
            self._tar.close()

    def get(self, row: int, seen: str | None = None) -> Artefact | None:
        """What was found in the image of a row; None if the annotator failed on it, or was shown something else."""
        found = self._rows.get(row)
        if found is None or seen not in (None, found["seen"]):
            return None
        places = json.loads(found["members"])
        return Artefact(json.loads(found["data"]), {name: self._read(*place) for name, place in places.items()})

    def _read(self, offset: int, size: int) -> bytes:
        assert self._tar is not None
        self._tar.seek(offset)
        return self._tar.read(size)


class ArtefactWriter:
    """Writes the artefacts of one annotator and unit. `outputs` describes the files after it closed."""

    def __init__(self, corpus: Folder, annotator: str, unit: str, op: Op, spec: str) -> None:
        self.corpus, self.annotator, self.unit = corpus, annotator, unit
        self.outputs: dict[str, dict[str, Any]] = {}
        self._made_by = {"op": op.model_dump_json(), "spec": spec}
        self._rows: list[dict[str, Any]] = []
        self._stack = ExitStack()
        self._tar: IO[bytes] | None = None

    def __enter__(self) -> ArtefactWriter:
        return self

    def write(self, row: int, uid: str, seen: str, artefact: Artefact) -> None:
        """Append the artefact of an image; rows come in order."""
        places = {name: self._append(f"{row:06d}.{name}", data) for name, data in sorted(artefact.members.items())}
        data = json.dumps(artefact.data, sort_keys=True, ensure_ascii=False, allow_nan=False)
        self._rows.append({"uid": uid, "row": row, "seen": seen, "data": data, "members": json.dumps(places)})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._tar:
            self._tar.write(END_OF_ARCHIVE)
        self._stack.__exit__(kind, error, trace)
        if kind is not None:
            return
        path = table_path(self.annotator, self.unit)
        self.corpus.write_table(path, pa.Table.from_pylist(self._rows, SCHEMA.with_metadata(self._made_by)))
        self.outputs[path] = describe(self.corpus, path)
        if self._tar:
            self.outputs[self._tar_path] = describe(self.corpus, self._tar_path)
        else:
            self.corpus.remove(self._tar_path)

    @property
    def _tar_path(self) -> str:
        return members_path(self.annotator, self.unit)

    def _append(self, name: str, data: bytes) -> list[int]:
        if self._tar is None:
            path = self._stack.enter_context(self.corpus.writing(self._tar_path))
            self._tar = self._stack.enter_context(path.open("wb"))
        start = self._tar.tell() + BLOCK
        self._tar.write(encode_member(name, data))
        return [start, len(data)]
