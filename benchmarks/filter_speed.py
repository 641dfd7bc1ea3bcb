"""Seconds and peak memory of decisions and of deduplication, and whether its pairs are those of comparing everything.

    python benchmarks/filter_speed.py decide   [--rows 1000000] [--repeats 5]
    python benchmarks/filter_speed.py dedup    [--sizes 10000 100000 1000000] [--radius 6 10] [--peers] [--plot g.png]
    python benchmarks/filter_speed.py semantic [--rows 100000] [--width 128] [--cluster-images 10000]

* **decide**: an allow-list, two quantiles, a bound, equal files and perceptual pairs over a table in memory.
* **dedup**: all pairs of 64-bit hashes within a radius, and the choice among them. The hashes: random ones, a tenth
  with a copy 0 to 12 bits away, and a clump of equal ones (a hundredth). Checked against brute force for 1,000 queries.
  Peers on the same hashes: faiss `IndexBinaryFlat` (comparing everything, in C++) and, where imagededup can be
  imported, its BK-tree and its brute force, in one process each. Peers stop at 100,000 hashes.
* **semantic**: pairs with a cosine of at least 0.95 within clusters, and the share of all such pairs that are found.

Each case runs in a fresh process with one thread; medians over `--repeats` are printed as rows of a Markdown table.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

PEER_LIMIT = 100_000
BLOCK = 256


def uids(count: int) -> pa.Array:
    return pa.array([hashlib.sha256(i.to_bytes(8, "big")).hexdigest() for i in range(count)])


def make_hashes(count: int, seed: int = 0) -> np.ndarray:
    """uint64 [count]: random, with near copies and a clump of equal ones, shuffled."""
    rng = np.random.default_rng(seed)
    clump, copies = count // 100, count // 10
    random = rng.integers(0, 2**64, count - clump - copies, dtype=np.uint64)
    near = rng.choice(random, copies)
    bits = rng.integers(0, 13, copies)
    for i in range(12):
        flip = np.uint64(1) << rng.integers(0, 64, copies).astype(np.uint64)
        near = np.where(i < bits, near ^ flip, near)
    return rng.permutation(np.concatenate([random, near, np.full(clump, 1 << 63, np.uint64)]))


def make_vectors(count: int, width: int, seed: int = 0) -> np.ndarray:
    """float32 [count, width] of length 1 around 200 themes, a tenth with a copy of cosine 0.9 to 1."""
    rng = np.random.default_rng(seed)
    themes = rng.standard_normal((200, width))
    vectors = themes[rng.integers(0, 200, count)] + 0.8 * rng.standard_normal((count, width))
    copies = count // 10
    noise = rng.uniform(0, 0.6, (copies, 1)) * rng.standard_normal((copies, width))
    vectors[:copies] = vectors[count - copies :] + noise
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def decide_case(rows: int) -> dict[str, float]:
    from filters.decide import decide
    from filters.dedup import PerceptualPairs
    from schemas.decide import Decide

    rng = np.random.default_rng(0)
    hashes = make_hashes(rows)
    images = pa.table(
        {
            "unit": np.repeat([f"u{i:06d}" for i in range(-(-rows // 1000))], 1000)[:rows],
            "row": np.arange(rows) % 1000,
            "input": [f"images/{i:08d}.jpg" for i in range(rows)],
            "uid": uids(rows),
            "width": rng.integers(32, 2000, rows).astype(np.int32),
            "height": rng.integers(32, 2000, rows).astype(np.int32),
            "license": rng.choice(["CC0-1.0", "CC-BY-4.0", ""], rows, p=[0.5, 0.45, 0.05]),
            "optout": rng.random(rows) < 0.01,
            "optout_reason": pa.array([""] * rows),
            "ready": pa.array([""] * rows),
            "sharpness": rng.gamma(2, 100, rows),
            "clip_score": pa.array(rng.normal(0.25, 0.05, rows), mask=rng.random(rows) < 0.02),
        }
    )
    filters = [
        {"column": "min_side", "min": 64},
        {"column": "sharpness", "min_quantile": 0.1},
        {"column": "clip_score", "min_quantile": 0.3},
    ]
    rules = {"licenses": ["CC0-1.0", "CC-BY-4.0"], "filters": filters, "dedup": {"perceptual": {"radius": 6}}}
    pairs = list(PerceptualPairs(images["uid"], pa.array(hashes), 6).part(0, 1))
    seconds: dict[str, float] = {}
    before = peak_mb()
    with timed(seconds, "seconds"):
        verdicts = decide(images, Decide.model_validate(rules), {"perceptual": pairs})
    kept = pa.compute.sum(pa.compute.equal(verdicts["reason"], "")).as_py()
    return seconds | {"added MB": peak_mb() - before, "kept": kept}


def dedup_case(count: int, radius: int) -> dict[str, float]:
    from filters.dedup import PerceptualPairs, keep

    hashes, names = make_hashes(count), uids(count)
    seconds: dict[str, float] = {}
    before = peak_mb()
    with timed(seconds, "index s"):
        finder = PerceptualPairs(names, pa.array(hashes), radius)
    with timed(seconds, "pairs s"):
        tables = list(finder.part(0, 1))
    with timed(seconds, "choice s"):
        result = keep(pa.table({"uid": names, "pixels": np.arange(count) % 1000}), ["pixels"], tables)
    added = peak_mb() - before
    missing, invented = compare_sample(hashes, names, tables, radius)
    counts = {"pairs": sum(map(len, tables)), "dropped": int((result.of >= 0).sum())}
    return seconds | {"added MB": added} | counts | {"missing": missing, "invented": invented}


def compare_sample(hashes: np.ndarray, names: pa.Array, tables: list[pa.Table], radius: int) -> tuple[int, int]:
    """Of 1,000 distinct hashes: neighbours that are missing, and pairs that are none."""
    rows = pa.concat_tables(tables).filter(~pa.compute.field("same")).unify_dictionaries().combine_chunks()
    a, b = (pa.compute.index_in(rows[name].cast(pa.string()), names).to_numpy() for name in ("uid_a", "uid_b"))
    a, b = hashes[a], hashes[b]
    invented = int((np.bitwise_count(a ^ b) > radius).sum() + len(a) - len(np.unique(np.stack([a, b]), axis=1).T))
    distinct = np.unique(hashes)
    sample = np.random.default_rng(1).choice(distinct, min(1000, len(distinct)), replace=False)
    true = sum(int((np.bitwise_count(distinct ^ query) <= radius).sum()) - 1 for query in sample)
    return true - int(np.isin(a, sample).sum() + np.isin(b, sample).sum()), invented


def faiss_case(count: int, radius: int) -> dict[str, float]:
    import faiss

    hashes = np.unique(make_hashes(count))
    seconds: dict[str, float] = {}
    with timed(seconds, "pairs s"):
        index = faiss.IndexBinaryFlat(64)
        index.add(hashes.view(np.uint8).reshape(-1, 8))
        limits, _, _ = index.range_search(hashes.view(np.uint8).reshape(-1, 8), radius + 1)
    return seconds | {"pairs": (int(limits[-1]) - len(hashes)) // 2}


def imagededup_case(count: int, radius: int, method: str) -> dict[str, float]:
    from imagededup.handlers.search.bktree import BKTree
    from imagededup.handlers.search.brute_force_cython import BruteForceCython

    hashes = {f"{i}": f"{h:016x}" for i, h in enumerate(np.unique(make_hashes(count)).tolist())}
    kind = {"bktree": BKTree, "brute_force_cython": BruteForceCython}[method]
    queries = list(hashes.items())[: 1000 if method == "brute_force_cython" else 200]
    seconds: dict[str, float] = {}
    with timed(seconds, "index s"):
        search = kind(hashes, lambda a, b: (int(a, 16) ^ int(b, 16)).bit_count())
    with timed(seconds, "some s"):
        for _, query in queries:
            search.search(query=query, tol=radius)
    share = len(hashes) / len(queries)  # the rest would take as long per query
    return {"index s": seconds["index s"], "pairs s": seconds["some s"] * share}


def semantic_case(rows: int, width: int, cluster_images: int) -> dict[str, float]:
    from filters.clusters import SAMPLES_PER_CLUSTER, assign, cluster_count, fit
    from filters.dedup import semantic_pairs
    from schemas.decide import SemanticDedup

    rule = SemanticDedup(column="e", threshold=0.95, cluster_images=cluster_images)
    vectors, names = make_vectors(rows, width), pa.array([f"{i:08d}" for i in range(rows)])
    order = np.random.default_rng(0).permutation(rows)
    seconds: dict[str, float] = {}
    before = peak_mb()
    with timed(seconds, "clusters s"):
        count = cluster_count(rows, rule)
        of = assign(vectors, fit(vectors[order[: SAMPLES_PER_CLUSTER * count]], count))
    found = 0
    with timed(seconds, "pairs s"):
        for cluster in range(count):
            members = np.flatnonzero(of == cluster)
            found += sum(map(len, semantic_pairs(names.take(pa.array(members)), vectors[members], 0.95)))
    added = peak_mb() - before
    with timed(seconds, "brute force s"):
        true = 0
        for start in range(0, rows, BLOCK):
            cosine = vectors[start : start + BLOCK] @ vectors[start:].T
            true += int((np.triu(cosine, 1) >= 0.95).sum())
    return seconds | {"added MB": added, "pairs": found, "recall": found / true}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure(case: Callable[..., dict[str, float]], *arguments: Any, repeats: int) -> dict[str, float]:
    """Medians over fresh processes."""
    results = []
    for _ in range(repeats):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results.append(pool.apply(case, arguments))
    return {name: statistics.median(r[name] for r in results) for name in results[0]}


def show(label: str, result: dict[str, float]) -> None:
    cells = [
        f"{name} {value:,.3g}" if isinstance(value, float) else f"{name} {value:,}" for name, value in result.items()
    ]
    print(f"| {label} | {' | '.join(cells)} |", flush=True)


def plot(path: Path, growth: dict[str, list[tuple[int, float]]]) -> None:
    """Seconds against hashes, both logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for label, points in growth.items():
        axes.loglog(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xlabel="hashes", ylabel="seconds, one core", title="All pairs within a Hamming radius")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(path, dpi=150)


def run_dedup(options: argparse.Namespace) -> None:
    growth: dict[str, list[tuple[int, float]]] = {}

    def record(label: str, size: int, result: dict[str, float]) -> None:
        show(f"{label}, {size:,}", result)
        growth.setdefault(label, []).append((size, result["pairs s"] + result.get("index s", 0)))

    for radius in options.radius:
        for size in options.sizes:
            record(f"x2i, radius {radius}", size, measure(dedup_case, size, radius, repeats=options.repeats))
            if not options.peers or size > PEER_LIMIT:
                continue
            record(f"faiss flat, radius {radius}", size, measure(faiss_case, size, radius, repeats=options.repeats))
            for method in ("bktree", "brute_force_cython"):
                result = measure(imagededup_case, size, radius, method, repeats=1)
                record(f"imagededup {method}, radius {radius}", size, result)
    if options.plot:
        plot(options.plot, growth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=("decide", "dedup", "semantic"))
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--cluster-images", type=int, default=10_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--radius", type=int, nargs="+", default=[6, 10])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ARROW_NUM_THREADS"):
        os.environ[name] = "1"  # for the processes that measure
    if options.section == "decide":
        rows = options.rows or 1_000_000
        show(f"decide, {rows:,} rows", measure(decide_case, rows, repeats=options.repeats))
    elif options.section == "semantic":
        rows = options.rows or 100_000
        case = (rows, options.width, options.cluster_images)
        show(f"semantic, {rows:,} x {options.width}", measure(semantic_case, *case, repeats=options.repeats))
    else:
        run_dedup(options)


if __name__ == "__main__":
    main()
