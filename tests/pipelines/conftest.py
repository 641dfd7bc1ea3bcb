"""Folders for the tests of this directory: each test runs on a disk and on an object store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from pipelines.storage import Folder
from schemas.codec import encode_mask, encode_png
from tests.bad_images import jpeg


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    if request.param == "local":
        yield Folder(str(tmp_path))
        return
    yield Folder(f"memory://{tmp_path.name}")
    fsspec.filesystem("memory").rm("/", recursive=True)


@pytest.fixture
def images(folder: Folder) -> Folder:
    mask = np.zeros((112, 160), bool)
    mask[20:100, 10:90] = True
    folder.write_bytes("images/cat.jpg", jpeg())
    folder.write_bytes("images/coffee.jpg", jpeg("coffee"))
    folder.write_bytes("masks/cat.png", encode_mask(mask))
    folder.write_bytes("depth/cat.png", encode_png(np.full((112, 160), 900, np.uint16)))
    return folder
