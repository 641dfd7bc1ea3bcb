"""Tombstones: images that a corpus has forgotten, and that no later build takes in again.

A uid is a sha256 of the photograph's bytes, so the list says nothing of what was in it. The manifest names the list
that was carried out; while it names another one, `x2i forget` has begun and not ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pyarrow as pa

from pipelines.engine import describe
from pipelines.storage import Folder

PATH = "meta/tombstones.parquet"
REASON = "forgotten"  # of ledger rows
_SCHEMA = pa.schema([("uid", pa.string()), ("reason", pa.string())])


def read_tombstones(corpus: Folder) -> dict[str, str]:
    """Reason by uid of everything forgotten."""
    if not corpus.exists(PATH):
        return {}
    return {row["uid"]: row["reason"] for row in corpus.read_table(PATH).to_pylist()}


def add_tombstones(corpus: Folder, uids: Iterable[str], reason: str) -> dict[str, str]:
    """Add what is new to the list, and return all of it."""
    before = read_tombstones(corpus)
    after = dict(sorted((dict.fromkeys(uids, reason) | before).items()))
    if after != before:
        rows = [{"uid": uid, "reason": why} for uid, why in after.items()]
        corpus.write_table(PATH, pa.Table.from_pylist(rows, _SCHEMA))
    return after


def tombstones_digest(corpus: Folder) -> str:
    """sha256 of the list, "" if there is none."""
    return str(describe(corpus, PATH)["sha256"]) if corpus.exists(PATH) else ""


def is_pending(corpus: Folder) -> bool:
    """Whether a published corpus has yet to lose images of the list."""
    if not corpus.exists("manifest.json"):
        return False
    manifest: Mapping[str, str] = corpus.read_json("manifest.json")
    return manifest.get("tombstones_sha256", "") != tombstones_digest(corpus)
