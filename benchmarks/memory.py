"""Peak memory of a build against the number of images: it must stay flat, because units bound it.

    python benchmarks/memory.py [--images 1000 10000] [--workers 1]

Runs one build per size in a process tree of its own and samples the resident memory of the driver and of the largest
worker process every 50 ms.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import yaml
from PIL import Image


def make_images(folder: Path, count: int) -> None:
    """Distinct 128 x 128 crops of one photograph."""
    import skimage.data

    photo = skimage.data.astronaut()
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(count):
        y, x = rng.integers(0, 512 - 128, 2)
        Image.fromarray(photo[y : y + 128, x : x + 128]).save(folder / f"{i:06d}.jpg", quality=90 + i % 7)


def peak_memory(command: list[str]) -> dict[str, float]:
    """MB: of the driver, and of the largest process below it that runs units."""
    driver = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = {"driver": 0.0, "worker": 0.0}
    while driver.poll() is None:
        try:
            peak["driver"] = max(peak["driver"], driver.memory_info().rss / 1e6)
            for child in driver.children(recursive=True):
                if child.cmdline() and "_run_batch" in child.cmdline()[0]:
                    peak["worker"] = max(peak["worker"], child.memory_info().rss / 1e6)
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.05)
    if driver.returncode:
        raise SystemExit(f"build failed: {' '.join(command)}")
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    print("| images | driver MB | worker MB |\n|---|---|---|")
    for count in options.images:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            make_images(root / "photos", count)
            recipe = {
                "name": "memory",
                "sources": [{"name": "photos", "type": "folder", "path": str(root / "photos")}],
                "ingest": {"unit_rows": 250},
                "build": {"condition_maps": {"maps": ["luminance"], "per_image": 1}},
            }
            (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
            command = [sys.executable, "-m", "pipelines.cli", "build", str(root / "recipe.yaml")]
            peak = peak_memory([*command, "-c", str(root / "corpus"), "--workers", str(options.workers)])
            print(f"| {count:,} | {peak['driver']:,.0f} | {peak['worker']:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
