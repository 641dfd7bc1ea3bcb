"""Images/s of ingest + canny + one restoration + shards, beside the limit and beside the obvious way.

    python benchmarks/corpus_speed.py [--images 600] [--repeats 5] [--workers 2]

* **x2i**: `pipelines.run.build` into an empty corpus: all stages, ledgers, indexes and publishing.
* **limit**: the pure kernels of the same work (hash, one decode, Canny, degradation, encodings, alignment, tar bytes)
  in one process per core, on the same files, without Ray, records or bookkeeping.
* **obvious**: `ray.data.read_images -> map -> write_webdataset` with the same kernels, without the alignment.

The start of Ray and of a worker pool (a build of one image) are measured alone and reported apart. All three run in
turn, `--repeats` times; medians and ratios are printed as a Markdown table row.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.pool import Pool
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from builders.alignment import measure_pair
from builders.annotators.maps import Canny
from builders.degradations import DEGRADATIONS
from pipelines import engine
from pipelines.engine import Context
from pipelines.recipes import RECIPE
from pipelines.run import build
from pipelines.storage import Folder
from schemas.codec import decode_rgb, encode_jpeg, encode_mask, encode_png
from schemas.identity import generator, uid_of
from schemas.shards import END_OF_ARCHIVE, encode_member

SIDE = 512
MAPS, RESTORE = ["canny"], ["denoise"]


def make_images(folder: Path, count: int) -> None:
    """Distinct 512 x 512 crops of real photographs, as JPEG q90."""
    import skimage.data
    import sklearn.datasets

    photos = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.rocket(), skimage.data.retina()]
    photos += [sklearn.datasets.load_sample_image(n) for n in ("china.jpg", "flower.jpg")]
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(count):
        photo = photos[i % len(photos)]
        side = int(rng.integers(300, min(photo.shape[:2])))
        y, x = (int(rng.integers(0, limit - side + 1)) for limit in photo.shape[:2])
        crop = Image.fromarray(photo[y : y + side, x : x + side]).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        crop.save(folder / f"{i:06d}.jpg", quality=90)


def recipe(photos: Path) -> object:
    return RECIPE.model_validate(
        {
            "name": "speed",
            "sources": [{"name": "photos", "type": "folder", "path": str(photos)}],
            "ingest": {"unit_rows": 50},
            "build": {
                "condition_maps": {"maps": MAPS, "per_image": 1},
                "restoration": {"subtasks": RESTORE, "per_image": 1},
            },
        }
    )


def run_x2i(photos: Path, out: Path, workers: int) -> None:
    build(Context(Folder(str(out)), recipe(photos), ""), workers)


def kernels(pixels: np.ndarray, rng: np.random.Generator) -> dict[str, bytes]:
    """Canny and one degradation of a photograph, encoded: what any way of building has to compute."""
    edges = Canny().render(pixels, Canny().draw(rng))
    noisy = DEGRADATIONS[RESTORE[0]](pixels.astype(np.float32) / 255, rng, 0.5)
    mask = np.ones(pixels.shape[:2], bool)
    return {
        "canny.png": encode_png(edges.image),
        "degraded.jpg": encode_jpeg(np.rint(noisy.pixels * 255).astype(np.uint8)),
        "mask.png": encode_mask(mask),
    }


def limit_members(data: bytes) -> list[tuple[str, bytes]]:
    """The three samples of one file: hash, one decode, the kernels, and the alignment of the pair."""
    rng = generator(0, uid_of(data), "limit")
    pixels = decode_rgb(data)
    made = kernels(pixels, rng)
    measure_pair(decode_rgb(made["degraded.jpg"]), pixels, np.ones(pixels.shape[:2], bool))
    return [
        ("control.input_1.png", made["canny.png"]),
        ("control.output.jpg", data),
        ("perceive.input_1.jpg", data),
        ("perceive.output.png", made["canny.png"]),
        ("restore.input_1.jpg", made["degraded.jpg"]),
        ("restore.output.jpg", data),
        ("restore.edit_mask.png", made["mask.png"]),
    ]


def _limit_part(files: list[Path], out: Path) -> None:
    cv2.setNumThreads(1)
    with out.open("wb") as tar:
        for file in files:
            for name, data in limit_members(file.read_bytes()):
                tar.write(encode_member(f"{file.stem}-{name}", data))
        tar.write(END_OF_ARCHIVE)


def _warm_up() -> None:
    kernels(np.zeros((64, 64, 3), np.uint8), np.random.default_rng(0))


def run_limit(pool: Pool, photos: Path, out: Path, workers: int) -> None:
    files = sorted(photos.iterdir())
    out.mkdir(parents=True)
    jobs = [(files[i::workers], out / f"{i}.tar") for i in range(workers)]
    pool.starmap(_limit_part, jobs)


def _obvious_row(row: dict) -> dict:
    cv2.setNumThreads(1)
    made = kernels(row["image"], np.random.default_rng(0))
    return {"__key__": Path(row["path"]).stem, "output.jpg": encode_jpeg(row["image"]), **made}


def run_obvious(photos: Path, out: Path, workers: int) -> None:
    import ray.data

    images = ray.data.read_images(str(photos), include_paths=True)
    images.map(_obvious_row).write_webdataset(str(out), encoder=None)


def timed(run: Callable[[Path, Path, int], None], photos: Path, workers: int) -> float:
    out = Path(tempfile.mkdtemp()) / "out"
    start = time.perf_counter()
    run(photos, out, workers)
    seconds = time.perf_counter() - start
    shutil.rmtree(out.parent)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    # Spawned and warm before Ray starts: forking a driver with its threads can hang.
    pool = multiprocessing.get_context("spawn").Pool(options.workers, initializer=_warm_up)
    with pool, tempfile.TemporaryDirectory() as folder:
        photos, one = Path(folder) / "photos", Path(folder) / "one"
        make_images(photos, options.images)
        make_images(one, 1)
        start = time.perf_counter()
        engine.connect(None, options.workers)
        ray_start = time.perf_counter() - start
        ways = {"x2i": run_x2i, "limit": partial(run_limit, pool), "obvious": run_obvious}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        starts = [timed(run_x2i, one, options.workers) for _ in range(options.repeats)]
        for _ in range(options.repeats):
            for name, way in ways.items():
                seconds[name].append(timed(way, photos, options.workers))
    report(options, ray_start, statistics.median(starts), seconds)


def report(options: argparse.Namespace, ray_start: float, pool_start: float, seconds: dict[str, list[float]]) -> None:
    """Medians as a Markdown table; x2i with and without the start of its worker pools."""
    median = {name: statistics.median(s) for name, s in seconds.items()}
    median["x2i without pool start"] = median["x2i"] - pool_start
    print(f"{options.images} images of {SIDE}x{SIDE}, {options.workers} workers, medians of {options.repeats}")
    print(f"{platform.processor() or platform.machine()}, Ray start {ray_start:.1f} s, pool start {pool_start:.1f} s")
    print("\n| way | seconds | images/s | of the limit | times obvious |\n|---|---|---|---|---|")
    for name, value in median.items():
        of_limit, times = median["limit"] / value, median["obvious"] / value
        print(f"| {name} | {value:.1f} | {options.images / value:.1f} | {of_limit:.0%} | {times:.2f} |")


if __name__ == "__main__":
    main()
