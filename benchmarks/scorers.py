"""Images/s of each scorer beside its kernel: the same work on images that are decoded already.

    python benchmarks/scorers.py [--images 32] [--repeats 3] [--scorers pixels phash]

The images are distinct 512 x 512 crops of real photographs as JPEG q90 (see `corpus_speed.py`), with a caption. One
process, one thread of OpenCV; what a scorer loads, it has loaded before. A scorer that lacks a model is listed with
what it needs. The difference of the two columns is the decoding of a JPEG.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import cv2
from corpus_speed import make_images

from filters.models import ModelMissing
from filters.scorers.base import Scorer, ScorerInput
from filters.scorers.registry import SCORERS
from schemas.identity import uid_of
from schemas.records import Captions

CAPTION = Captions(long="A white cup of coffee on a saucer with a spoon, standing on a wooden table in the morning.")


def inputs(folder: Path, count: int) -> list[ScorerInput]:
    make_images(folder, count)
    files = [path.read_bytes() for path in sorted(folder.iterdir())]
    return [ScorerInput(uid_of(data), data, CAPTION) for data in files]


def fresh(items: list[ScorerInput], decoded: bool) -> list[ScorerInput]:
    """Inputs that have not been decoded yet, or all have."""
    copies = [ScorerInput(item.uid, item.data, item.captions) for item in items]
    if decoded:
        for copy in copies:
            _ = copy.pixels
    return copies


def seconds(scorer: Scorer, items: list[ScorerInput]) -> float:
    start = time.perf_counter()
    for i in range(0, len(items), scorer.batch_size):
        scorer.score(items[i : i + scorer.batch_size])
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scorers", nargs="+", choices=sorted(SCORERS), default=list(SCORERS))
    options = parser.parse_args()
    cv2.setNumThreads(1)
    print(f"{options.images} images of 512x512, one process, medians of {options.repeats}\n")
    print("| scorer | images/s | kernel images/s |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        items = inputs(Path(folder) / "photos", options.images)
    for name in options.scorers:
        try:
            scorer = SCORERS[name](SCORERS[name].Params())
            scorer.preflight()
            scorer.score(items[:1])
        except (ModelMissing, ValueError) as error:
            print(f"| {name} | needs {str(error).splitlines()[0]} | |")
            continue
        runs = {decoded: [seconds(scorer, fresh(items, decoded)) for _ in range(options.repeats)] for decoded in (0, 1)}
        rates = [options.images / statistics.median(runs[decoded]) for decoded in (0, 1)]
        print(f"| {name} | {rates[0]:.1f} | {rates[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
