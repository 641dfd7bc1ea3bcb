"""Spherical k-means whose result is the same on every machine, with any number of threads and in any row order.

Floating-point sums depend on their order, which a linear-algebra library chooses by processor and thread count; one
vector that falls into another cluster would change a corpus. Here every product is a sum of integers below 2^24 in
magnitude, which float32 holds exactly in any order.
"""

from __future__ import annotations

import numpy as np

from schemas.decide import SemanticDedup

_SCALE = 2048  # |q| |c| <= (2048 + sqrt(d) / 2)^2 < 2^24 for d up to 10^7
_ITERATIONS = 20
SAMPLES_PER_CLUSTER = 256  # what centroids are fitted to, as in faiss


def unit_vectors(vectors: np.ndarray) -> np.ndarray:
    """float32 [n, d] of length 1. A vector that is zero or not finite becomes zero: it is like no other."""
    length = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    usable = np.isfinite(length) & (length > 0)
    return np.where(usable, vectors / np.where(usable, length, 1), 0).astype(np.float32)


def quantised(vectors: np.ndarray) -> np.ndarray:
    """float32 [n, d] of integers: unit vectors times 2048, rounded. Products of two are exact in any order of sums."""
    return np.rint(unit_vectors(vectors) * _SCALE).astype(np.float32)


def cluster_count(images: int, rule: SemanticDedup) -> int:
    return max(1, -(-images // rule.cluster_images))


def fit(sample: np.ndarray, count: int) -> np.ndarray:
    """Centroids by Lloyd's algorithm from the first `count` vectors, in a fixed number of rounds.

    Args:
        sample: float32 [n, d] unit vectors, in an order that does not depend on the source (by uid, say).
        count: clusters; at most n.

    Returns:
        float32 [count, d], integers: unit vectors times 2048, rounded.
    """
    points = np.rint(sample * _SCALE).astype(np.float32)
    centroids = points[:count].copy()
    for _ in range(_ITERATIONS if count > 1 else 0):
        nearest = _nearest(points, centroids)
        order = np.argsort(nearest, kind="stable")
        filled, starts = np.unique(nearest[order], return_index=True)
        sums = np.add.reduceat(points[order].astype(np.int64), starts, axis=0)
        means = np.rint(sums * 16 / np.diff(starts, append=len(order))[:, None]).astype(np.int64)
        length = np.sqrt((means**2).sum(axis=1))[:, None]  # of an exact sum
        centroids[filled] = np.rint(means * _SCALE / np.maximum(length, 1))
    return centroids


def assign(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The nearest centroid of each unit vector, int64 [n]; of equally near ones the first."""
    return _nearest(np.rint(vectors * _SCALE).astype(np.float32), centroids)


def _nearest(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    blocks = [points[i : i + 4096] @ centroids.T for i in range(0, len(points), 4096)]
    return np.concatenate([np.argmax(block, axis=1) for block in blocks]) if blocks else np.zeros(0, np.int64)
