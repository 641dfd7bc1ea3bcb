"""Arrow columns as arrays."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def matrix(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """A column of vectors.

    Args:
        column: (fixed-size) lists of floats, all of one length; null where unknown.

    Returns:
        float32 [known, d], and bool [n]: which rows they are of.

    Raises:
        ValueError: vectors differ in length.
    """
    known = column.is_valid().to_numpy()
    vectors = column.drop_null().combine_chunks()
    flat = vectors.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    width = len(flat) // max(1, len(vectors))
    if len(vectors) and (width == 0 or (vectors.value_lengths().to_numpy() != width).any()):
        raise ValueError("vectors differ in length or are empty")
    return flat.reshape(len(vectors), width), known
