"""Fixtures shared by all tests: real photographs, and one small corpus built from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import sklearn.datasets
from hypothesis import settings
from PIL import Image

# Machines differ in speed, so no example has a deadline; and a test run is the same wherever it runs.
settings.register_profile("x2i", deadline=None, derandomize=True)
settings.load_profile("x2i")

CAPTIONS = {
    "astronaut": "A smiling astronaut in an orange space suit in front of a flag and a model of a space shuttle.",
    "cat": "A close view of the face of a tabby cat with whiskers and green eyes.",
    "coffee": "A white cup of coffee on a saucer with a spoon, standing on a wooden table.",
    "rocket": "A rocket stands on a launch pad between lightning towers under a clear evening sky.",
    "china": "A Chinese pavilion with red columns and a curved roof in front of blue sky.",
    "flower": "A pink dahlia in bloom among dark green leaves.",
    "motorcycle": "A red motorcycle in a workshop beside shelves with tools.",
    "retina": "A photograph of the retina of a human eye with its blood vessels.",
}


@pytest.fixture(scope="session")
def photographs() -> dict[str, np.ndarray]:
    """uint8 RGB photographs by name, at most 256 px on the longer side."""
    full = {
        "astronaut": skimage.data.astronaut(),
        "cat": skimage.data.chelsea(),
        "coffee": skimage.data.coffee(),
        "rocket": skimage.data.rocket(),
        "china": sklearn.datasets.load_sample_image("china.jpg"),
        "flower": sklearn.datasets.load_sample_image("flower.jpg"),
        "motorcycle": skimage.data.stereo_motorcycle()[0],
        "retina": skimage.data.retina(),
    }
    small = {}
    for name, pixels in full.items():
        image = Image.fromarray(pixels)
        image.thumbnail((256, 256), Image.Resampling.LANCZOS)
        small[name] = np.asarray(image)
    return small


@pytest.fixture(scope="session")
def photo_folder(photographs: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs as JPEG files with captions in sidecars; the cat carries a box and a mask."""
    folder = tmp_path_factory.mktemp("photos")
    for name, pixels in photographs.items():
        Image.fromarray(pixels).save(folder / f"{name}.jpg", quality=92)
        (folder / f"{name}.txt").write_text(CAPTIONS[name])
    height, width = photographs["cat"].shape[:2]
    cat = {"phrase": "the tabby cat", "label": "cat", "box": [0.1 * width, 0.05 * height, 0.9 * width, 0.95 * height]}
    cat["mask"] = [[0.1 * width, 0.1 * height, 0.9 * width, 0.1 * height, 0.5 * width, 0.95 * height]]
    (folder / "cat.json").write_text(json.dumps({"caption": CAPTIONS["cat"], "entities": [cat], "license": "CC0-1.0"}))
    return folder


RECIPE = """\
name: small
seed: 3
sources:
  - {{name: photos, type: folder, path: "{photos}", text_is: caption}}
ingest: {{unit_rows: 3, max_pixels: 36864}}
decide: {{filters: [{{column: min_side, min: 32}}, {{column: aspect, max: 3}}], splits: {{val: 0.2, test: 0.2}}}}
build:
  captions: {{}}
  condition_maps: {{maps: [lines, luminance, palette, boxes, segmentation], per_image: 3}}
  restoration: {{per_image: 3}}
pack: {{shard_bytes: 128KiB}}
"""


@pytest.fixture(scope="session")
def recipe_file(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(RECIPE.format(photos=photo_folder))
    return path


@pytest.fixture(scope="session")
def corpus_path(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published corpus, built in this process. Do not change it."""
    from pipelines.engine import Context
    from pipelines.recipes import load
    from pipelines.run import build
    from pipelines.storage import Folder

    path = tmp_path_factory.mktemp("corpus") / "small"
    build(Context(Folder(str(path)), load(recipe_file), str(recipe_file.parent)), workers=0)
    return path
