"""What holds for every scorer, checked on encoded photographs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from filters.scorers.base import Scorer, ScorerInput
from schemas.codec import encode_jpeg
from schemas.identity import uid_of
from schemas.records import Captions

Rows = dict[str, dict[str, Any]]


def as_inputs(photographs: Mapping[str, np.ndarray], captions: Mapping[str, str]) -> list[ScorerInput]:
    """The photographs as JPEG, each with its short caption if it has one."""
    encoded = {name: encode_jpeg(pixels) for name, pixels in photographs.items()}
    return [ScorerInput(uid_of(data), data, Captions(short=captions.get(n, ""))) for n, data in encoded.items()]


def score(scorer: Scorer, photographs: Mapping[str, np.ndarray], captions: Mapping[str, str] | None = None) -> Rows:
    """Rows by name of the photograph. They fit the columns, and a batch gives what its images give one by one."""
    items = as_inputs(photographs, captions or {})
    scorer.preflight()
    batch = scorer.score(items)
    singles = [scorer.score([item])[0] for item in items]
    assert all(set(row) == set(scorer.columns) for row in batch)
    together, alone = (pa.Table.from_pylist(rows, pa.schema(scorer.columns)) for rows in (batch, singles))
    for name, kind in scorer.columns.items():
        assert together[name].is_null().equals(alone[name].is_null())
        if pa.types.is_floating(kind):
            values, others = (column.drop_null().to_numpy() for column in (together[name], alone[name]))
            np.testing.assert_allclose(values, others, rtol=0, atol=2e-5)
        elif pa.types.is_fixed_size_list(kind):
            vectors, others = (np.stack([row[name] for row in rows]).astype(np.float32) for rows in (batch, singles))
            np.testing.assert_allclose(vectors, others, rtol=0, atol=1e-3)
            np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=2e-3)
        else:
            assert together[name].equals(alone[name])
    return dict(zip(photographs, batch, strict=True))
