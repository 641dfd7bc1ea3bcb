"""The demo annotations fit the photographs, and collecting them is repeatable and verified."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from recipes.demo import collect_photos
from recipes.demo.collect_photos import collect, collect_with_captions, inverse_depth_png, read_photos, read_verified
from schemas.masks import decode_mask
from schemas.records import Entity

PHOTOS = read_photos()
REQUIRED = ("image", "package", "file", "sha256", "caption_short", "caption", "tags")
PROVENANCE = ("license", "license_url", "source_url", "scene_id")
OPTIONAL = {"entities", "author", "depth", "depth_sha256", "depth_offset"}
each_photo = pytest.mark.parametrize("photo", PHOTOS, ids=[photo["image"] for photo in PHOTOS])


def open_original(photo: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(read_verified(photo["package"], photo["file"], photo["sha256"])))


def iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)]
    return both / (sum(areas) - both)


def test_there_is_enough_to_build_from() -> None:
    entities = [photo.get("entities", []) for photo in PHOTOS]
    assert len(PHOTOS) >= 40
    assert len({photo["image"] for photo in PHOTOS}) == len(PHOTOS)
    assert len({photo["sha256"] for photo in PHOTOS}) == len(PHOTOS)
    assert sum(bool(found) for found in entities) >= 25
    assert sum("mask" in entity for found in entities for entity in found) >= 15
    assert collect_photos.PHOTOS.stat().st_size <= 400_000


@each_photo
def test_line_is_complete(photo: dict[str, Any]) -> None:
    assert all(isinstance(photo[key], str) and photo[key].strip() for key in REQUIRED + PROVENANCE)
    assert set(photo) <= {*REQUIRED, *PROVENANCE, *OPTIONAL}
    assert ("depth" in photo) == ("depth_sha256" in photo) == ("depth_offset" in photo)
    assert all(photo.values())
    assert Path(photo["image"]).suffix == Path(photo["file"]).suffix
    assert len(photo["caption_short"].split()) <= 12
    assert 30 <= len(photo["caption"].split()) <= 80
    assert all(tag and tag == tag.strip() for tag in photo["tags"].split(", "))


@each_photo
def test_entities_fit_the_photograph(photo: dict[str, Any]) -> None:
    width, height = open_original(photo).size
    entities = photo.get("entities", [])
    assert len(entities) <= 4
    assert len({entity["phrase"] for entity in entities}) == len(entities)
    for entity in entities:
        x0, y0, x1, y1 = Entity(**entity).box
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
        if "mask" in entity:
            check_mask(entity["mask"], entity["box"], width, height)


def check_mask(rle: dict[str, Any], box: list[float], width: int, height: int) -> None:
    h, w = rle["size"]
    assert w / width == pytest.approx(h / height, rel=2e-3)
    assert (w, h) == (width, height) or (width * height > 1_000_000 and w < width)
    mask = decode_mask(rle, h, w)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x0, x1 = columns[0] * width / w, (columns[-1] + 1) * width / w
    y0, y1 = rows[0] * height / h, (rows[-1] + 1) * height / h
    assert iou([x0, y0, x1, y1], box) >= 0.5


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    assert collect(PHOTOS, folder) == len(PHOTOS)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_collecting_again_changes_nothing(collected: Path, tmp_path: Path) -> None:
    before = contents(collected)
    collect(PHOTOS, collected)
    collect(PHOTOS, tmp_path)
    assert contents(collected) == contents(tmp_path) == before


def test_manifest_names_the_collected_files(collected: Path) -> None:
    lines = [json.loads(line) for line in (collected / "manifest.jsonl").read_text("utf-8").splitlines()]
    named = {line[key] for line in lines for key in ("image", "depth") if key in line}
    assert named | {"manifest.jsonl"} == {path.name for path in collected.iterdir()}
    for line, photo in zip(lines, PHOTOS, strict=True):
        assert not collect_photos.SOURCE_KEYS & set(line)
        assert all(line[key] == photo[key] for key in line if key != "depth")
        assert (collected / line["image"]).read_bytes()[:2] in (b"\xff\xd8", b"\x89P")


def test_captions_lie_beside_the_photographs(collected: Path, tmp_path: Path) -> None:
    assert collect_with_captions(PHOTOS[:3], tmp_path) == 3
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".txt"}
    for photo in PHOTOS[:3]:
        image = tmp_path / photo["image"]
        assert image.read_bytes() == (collected / photo["image"]).read_bytes()
        assert image.with_suffix(".txt").read_text("utf-8").strip() == photo["caption"]


def test_depth_of_the_motorcycle_is_nearer_larger(collected: Path) -> None:
    depth = np.asarray(Image.open(collected / "motorcycle_left_depth.png"))
    assert depth.dtype == np.uint16
    assert depth.shape == (500, 741)
    assert depth.max() == 65535
    front_wheel, wall = depth[380:440, 600:660], depth[20:80, 200:260]
    assert np.median(front_wheel[front_wheel > 0]) > 1.5 * np.median(wall[wall > 0])


def test_inverse_depth_is_in_proportion_and_marks_the_unknown() -> None:
    buffer = io.BytesIO()
    np.savez(buffer, np.array([[1.0, 2.0, np.inf], [np.nan, 3.0, 1.2]], np.float32))
    image = np.asarray(Image.open(io.BytesIO(inverse_depth_png(buffer.getvalue(), 1.0))))
    assert image.tolist() == [[32768, 49151, 0], [0, 65535, 36044]]


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"chelsea\.png has sha256 .*pip install --force-reinstall"):
        collect([next(p for p in PHOTOS if p["image"] == "chelsea.png") | {"sha256": "0" * 64}], tmp_path)
    assert not (tmp_path / "manifest.jsonl").exists()


def test_a_missing_package_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no-such-package is not installed; run: pip install --no-deps"):
        collect([PHOTOS[0] | {"package": "no-such-package"}], tmp_path)


def test_a_missing_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"scikit-image is installed without .*nothing\.png"):
        collect([PHOTOS[0] | {"file": "skimage/data/nothing.png"}], tmp_path)
