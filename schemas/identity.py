"""Identities that depend on content alone: image uids, sample keys, and the random generator of a sample."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import numpy as np

KEY_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
UID_CHARS = 20  # 80 bits: at 10^9 images a collision has probability below 10^-6


def uid_of(data: bytes) -> str:
    """sha256 of the source bytes, 64 hexadecimal characters."""
    return hashlib.sha256(data).hexdigest()


def sample_key(uid: str, stream: str, subtask: str, variant: int = 0) -> str:
    """Corpus-wide unique key of a sample, e.g. `3f2a…-control-canny-0`.

    Raises:
        ValueError: the result would not match `[a-z0-9][a-z0-9_-]{0,63}`, which every WebDataset reader accepts.
    """
    return check_key(f"{uid[:UID_CHARS]}-{stream}-{subtask}-{variant}")


def check_key(key: str) -> str:
    """Return `key` unchanged, or raise ValueError when a reader could split or mangle it."""
    if not KEY_PATTERN.fullmatch(key):
        raise ValueError(f"key {key!r} does not match {KEY_PATTERN.pattern}")
    return key


def generator(seed: int, key: str, builder: str) -> np.random.Generator:
    """The only source of randomness for one (recipe seed, key, builder)."""
    digest = hashlib.sha256(f"{seed}\0{key}\0{builder}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


def digest_of(value: Any) -> str:
    """sha256 over the canonical JSON form of a plain value (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
