"""A folder per subject: its name is the subject's, wherever in the photograph that is."""

from __future__ import annotations

import json
import math

import pytest
from pydantic import ValidationError

from pipelines.sources.folder import subject_name
from pipelines.storage import Folder
from tests.bad_images import jpeg
from tests.reading import bad, config, good, read


@pytest.fixture
def subjects(folder: Folder) -> Folder:
    for name in ("red_cartoon/01.jpg", "red_cartoon/02.jpg", "Dog-2/beach/01.jpg", "lost.jpg"):
        folder.write_bytes(f"subjects/{name}", jpeg())
    box = {"phrase": "the red cartoon", "label": "Red cartoon", "box": [10, 10, 90, 90]}
    table = {"phrase": "a table", "label": "table", "box": [0, 90, 160, 112]}
    folder.write_bytes("subjects/red_cartoon/02.json", json.dumps({"entities": [table, box]}).encode())
    return folder


def test_subjects_have_the_names_of_their_folders(subjects: Folder) -> None:
    rows = read(subjects, type="folder", path="subjects", subjects=True)
    assert bad(rows) == {"lost.jpg": "no_subject"}
    found = good(rows)
    (cartoon,) = found["red_cartoon/01.jpg"].entities
    assert (cartoon.phrase, cartoon.label, cartoon.subject_id) == ("red cartoon", "red cartoon", "pool/red_cartoon")
    assert cartoon.box == (0, 0, math.inf, math.inf)
    (dog,) = found["Dog-2/beach/01.jpg"].entities
    assert (dog.label, dog.subject_id) == ("dog", "pool/Dog-2")


def test_all_photographs_of_a_subject_are_one_scene(subjects: Folder) -> None:
    rows = good(read(subjects, type="folder", path="subjects", subjects=True))
    assert {name: row.scene_id for name, row in rows.items()} == {
        "red_cartoon/01.jpg": "pool/red_cartoon",
        "red_cartoon/02.jpg": "pool/red_cartoon",
        "Dog-2/beach/01.jpg": "pool/Dog-2",
    }


def test_a_sidecar_may_say_where_the_subject_is(subjects: Folder) -> None:
    table, cartoon = good(read(subjects, type="folder", path="subjects", subjects=True))["red_cartoon/02.jpg"].entities
    assert (table.subject_id, cartoon.subject_id) == ("", "pool/red_cartoon")
    assert cartoon.box == (10, 10, 90, 90)


def test_other_folders_name_no_subjects(subjects: Folder) -> None:
    rows = good(read(subjects, type="folder", path="subjects"))
    assert len(rows) == 4 and rows["red_cartoon/01.jpg"].entities == ()


@pytest.mark.parametrize(
    ("folder", "name"),
    [("red_cartoon", "red cartoon"), ("Dog-2", "dog"), ("rc.car", "rc car"), ("café_07", "café"), ("42", "42")],
)
def test_names_are_words(folder: str, name: str) -> None:
    assert subject_name(folder) == name


def test_a_subject_is_its_own_scene() -> None:
    assert config(type="folder", path="x", subjects=True).scene_from == "folder"
    with pytest.raises(ValidationError, match="'uid' would tear subjects apart"):
        config(type="folder", path="x", subjects=True, scene_from="uid")
    again = config(type="folder", path="x", subjects=True)
    assert config(**again.model_dump(exclude={"name"})) == again  # as workers get it
