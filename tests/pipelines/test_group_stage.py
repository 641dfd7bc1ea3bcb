"""Few-shot groups from a real corpus: what they are made of, who is accounted for, and what runs again after what."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from PIL import Image

from builders.few_shot.signatures import STREAMS
from pipelines import ledger
from pipelines.corpus import find_shards, iter_index, read_members
from pipelines.engine import Context, run_stage
from pipelines.ledger import Marker
from pipelines.lint import lint
from pipelines.lint_groups import lint_groups
from pipelines.parts import part_rows
from pipelines.recipes import load
from pipelines.run import build
from pipelines.stages.group import GroupStage
from pipelines.storage import Folder
from schemas.arrow import SAMPLES
from schemas.codec import decode_rgb
from schemas.groups import Grouping
from schemas.recipe import RecipeError

FEW_SHOT = {"window_units": 8, "share": 0.6, "contrast": 0.3, "max_uses": 2}


@pytest.fixture(scope="module")
def photos(photographs: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen views of eight photographs, two of each scene; one photograph is there mirrored as well, as a scene."""
    folder = tmp_path_factory.mktemp("views")
    rows = []
    for name, pixels in photographs.items():
        height, width = pixels.shape[:2]
        for half, left in (("left", 0), ("right", width // 3)):
            view = Image.fromarray(pixels[: height - height // 4, left : left + 2 * width // 3])
            view.resize((128, 112)).save(folder / f"{name}_{half}.png")
            rows.append({"image": f"{name}_{half}.png", "scene_id": name, "license": "CC0-1.0"})
    Image.open(folder / "cat_left.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "tac.png")
    rows.append({"image": "tac.png", "scene_id": "another cat", "license": "CC-BY-4.0", "author": "Nobody"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def context(folder: Path, photos: Path, few_shot: dict[str, Any] | None = FEW_SHOT, name: str = "corpus") -> Context:
    recipe: dict[str, Any] = {
        "name": "grouped",
        "sources": [{"name": "photos", "type": "manifest", "path": str(photos / "manifest.jsonl")}],
        "ingest": {"unit_rows": 6},
        "score": {"phash": {}},
        "decide": {"splits": {"val": 0.5}},
        "build": {
            "condition_maps": {"maps": ["luminance", "palette"], "per_image": 2},
            "restoration": {"subtasks": ["contrast", "jpeg"], "per_image": 2},
            "edit_pairs": {"operations": ["mirror", "text_add"], "per_image": 2, "min_side": 64},
        },
    }
    recipe |= {} if few_shot is None else {"group": {"few_shot": few_shot}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return Context(Folder(str(folder / name)), load(path), str(folder))


@pytest.fixture(scope="module")
def published(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Context:
    """A whole corpus, built in this process. Do not change it."""
    here = context(tmp_path_factory.mktemp("grouped"), photos)
    build(here, workers=0)
    return here


@pytest.fixture
def built(published: Context, photos: Path, tmp_path: Path) -> Path:
    """A folder with a copy of the corpus and its recipe."""
    shutil.copytree(published.corpus.path(), tmp_path / "corpus")
    return tmp_path


def groups_of(corpus: Folder) -> list[dict[str, Any]]:
    """Index rows of all groups, with `group` as an object."""
    streams = {shard.stream for shard in find_shards(corpus) if shard.stream.startswith("few_shot")}
    rows = pa.concat_tables(iter_index(corpus, sorted(streams))).to_pylist()
    return [row | {"group": json.loads(row["group"])} for row in rows]


def samples_of(corpus: Folder) -> dict[str, dict[str, Any]]:
    """Index rows of everything that could be a member, by key."""
    present = {shard.stream for shard in find_shards(corpus)} & {*STREAMS}
    return {row["key"]: row for row in pa.concat_tables(iter_index(corpus, sorted(present))).to_pylist()}


def members_of(row: dict[str, Any]) -> list[str]:
    return [*row["group"]["supports"], row["group"]["query"]]


def run_group(here: Context, workers: int = 0) -> tuple[list[Marker], list[str]]:
    """Markers of all windows, and the names of those that were not made anew."""
    stage, fresh = GroupStage(here), list[str]()
    note = lambda marker, known: fresh.append(marker.unit) if known else None  # noqa: E731
    return run_stage(stage, here, stage.tasks(), workers, progress=note), fresh


def files(corpus: Folder) -> dict[str, bytes]:
    names = [n for n in corpus.list("work/parts") if "few_shot" in n] + corpus.list("meta/ledger/group")
    return {name: corpus.read_bytes(name) for name in names}


def test_the_corpus_is_sound_and_has_both_streams(published: Context) -> None:
    assert lint(published.corpus) == []
    groups = groups_of(published.corpus)
    assert len(groups) > 20
    assert {row["stream"] for row in groups} == {"few_shot_1", "few_shot_2"}
    assert {row["group"]["explicit"] for row in groups} == {True, False}
    assert {row["split"] for row in groups} == {"train", "val"}


def test_images_are_those_of_the_members(published: Context) -> None:
    samples = samples_of(published.corpus)
    for row in groups_of(published.corpus)[::5]:
        given = list(read_members(published.corpus, row).values())
        pairs = [list(read_members(published.corpus, samples[key]).values())[:2] for key in members_of(row)]
        for before, after in zip([image for pair in pairs for image in pair], given, strict=False):
            np.testing.assert_array_equal(decode_rgb(before), decode_rgb(after))


def test_no_scene_split_or_look_is_mixed(published: Context) -> None:
    samples, table = samples_of(published.corpus), ["uid", "phash", "phash_mirror"]
    scores = [published.corpus.read_table(n, table) for n in published.corpus.list("meta/scores/phash", ".parquet")]
    hashes = {row["uid"]: row for row in pa.concat_tables(scores).to_pylist()}
    for row in groups_of(published.corpus):
        members = [samples[key] for key in members_of(row)]
        assert len({m["scene_id"] for m in members}) == len(members) == len({m["parents"][0] for m in members})
        assert {m["split"] for m in members} == {row["split"]}
        for one, other in combinations([hashes[m["parents"][0]] for m in members], 2):
            assert (one["phash"] ^ other["phash"]).bit_count() > 10
            assert (one["phash"] ^ other["phash_mirror"]).bit_count() > 10
        assert set(row["parents"]) == {m["parents"][0] for m in members}
        assert all(m["license"] in row["license"] for m in members)


def test_samples_are_used_as_often_as_allowed(published: Context) -> None:
    groups = groups_of(published.corpus)
    assert max(Counter(row["group"]["query"] for row in groups).values()) == 1
    assert max(Counter(key for row in groups for key in row["group"]["supports"]).values()) == FEW_SHOT["max_uses"]


def test_contrast_pairs_have_one_query_and_two_targets(published: Context) -> None:
    pairs = defaultdict(list)
    for row in groups_of(published.corpus):
        pairs[row["group"]["contrast"]].append(row)
    del pairs[""]
    assert pairs
    for one, other in pairs.values():
        images = [read_members(published.corpus, row) for row in (one, other)]
        query = f"input_{2 * one['group']['k'] + 1}.png"
        assert images[0][query] == images[1][query]
        assert images[0]["output.png"] != images[1]["output.png"]
        assert one["instruction"] == other["instruction"]


def test_every_sample_is_accounted_for(published: Context) -> None:
    corpus, samples = published.corpus, samples_of(published.corpus)
    rows = [r for n in corpus.list("meta/ledger/group", ".parquet") for r in corpus.read_table(n).to_pylist()]
    assert sorted(row["input"] for row in rows) == sorted(samples)
    made = {row["key"]: {*members_of(row)} for row in groups_of(corpus)}
    for row in rows:
        assert set(row["outputs"]) == {key for key, members in made.items() if row["input"] in members}
        assert (row["status"] == "kept") == bool(row["outputs"])
    reasons = {row["reason"] for row in rows if row["status"] == "dropped"}
    assert "not_groupable" in reasons and reasons <= {"not_groupable", "no_partner", "not_drawn"}
    told = [row["detail"] for row in rows if row["reason"] == "not_groupable"]
    assert all(told)


def test_other_settings_do_not_build_again(published: Context, built: Path, photos: Path) -> None:
    before = ledger.read_markers(Folder(str(built / "corpus")), "build")
    changed = context(built, photos, FEW_SHOT | {"share": 0.1})
    build(changed, workers=0)
    assert ledger.read_markers(changed.corpus, "build") == before
    assert lint(changed.corpus) == []
    assert 0 < len(groups_of(changed.corpus)) < len(groups_of(published.corpus)) / 2
    build(context(built, photos, None), workers=0)
    assert not any(shard.stream.startswith("few_shot") for shard in find_shards(changed.corpus))
    assert lint(changed.corpus) == []


def test_windows_are_done_once_and_smaller_ones_hold_fewer(built: Path, photos: Path) -> None:
    small = context(built, photos, FEW_SHOT | {"window_units": 1})
    markers, fresh = run_group(small)
    assert [marker.unit for marker in markers] == [f"photos-00000{i}.group" for i in range(3)]
    assert not fresh
    assert run_group(small)[1] == [marker.unit for marker in markers]
    units = {row["uid"]: n for n in range(3) for row in small.corpus.read_table(
        f"meta/scores/phash/photos-00000{n}.parquet", ["uid"]).to_pylist()}  # fmt: skip
    for number, marker in enumerate(markers):
        for stream in ("few_shot_1", "few_shot_2"):
            if any(stream in name for name in marker.outputs):
                found = list(part_rows(small.corpus, stream, marker.unit))
                assert {units[uid] for row in found for uid in row["parents"]} == {number}


def test_any_number_of_workers_gives_the_same_bytes(built: Path, photos: Path) -> None:
    small = context(built, photos, FEW_SHOT | {"window_units": 2})
    build(small, workers=0, until="group")
    alone = files(small.corpus)
    assert any("few_shot_2" in name for name in alone)
    small.corpus.remove("meta/ledger/group")
    build(small, workers=2, until="group")
    assert files(small.corpus) == alone


def test_groups_need_perceptual_hashes(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    text = yaml.safe_dump(yaml.safe_load(Path(context(tmp_path, photos).base, "corpus.yaml").read_text()))
    path.write_text(text.replace("score:\n  phash: {}\n", ""))
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+: group.few_shot: this recipe has no column 'phash'.*phash"):
        load(path)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("{few_shot: {shots: [3]}}", r"recipe.yaml:\d+: group.few_shot.shots"),
        ("{few_shot: {windows: 3}}", r"unknown key; did you mean 'window_units'"),
        ("{fewshot: {}}", r"unknown key; did you mean 'few_shot'"),
    ],
)
def test_mistakes_are_told_with_their_line(group: str, message: str, photos: Path, tmp_path: Path) -> None:
    context(tmp_path, photos, None)
    path = tmp_path / "recipe.yaml"
    path.write_text((tmp_path / "corpus.yaml").read_text() + f"group: {group}\n")
    with pytest.raises(RecipeError, match=message):
        load(path)


@pytest.mark.parametrize("group", ["", "{few_shot: }"])
def test_an_empty_section_asks_for_the_defaults(group: str, photos: Path, tmp_path: Path) -> None:
    context(tmp_path, photos, None)
    path = tmp_path / "recipe.yaml"
    path.write_text((tmp_path / "corpus.yaml").read_text() + f"group: {group}\n")
    assert load(path).group == Grouping()


# --- lint ----------------------------------------------------------------------------------------------------------


def rewrite(corpus: Folder, key: str, /, **changes: Any) -> None:
    """Change the index row of one sample."""
    for shard in find_shards(corpus):
        rows = corpus.read_table(shard.sample_index).to_pylist()
        if any(row["key"] == key for row in rows):
            changed = [row | changes if row["key"] == key else row for row in rows]
            corpus.write_table(shard.sample_index, pa.Table.from_pylist(changed, SAMPLES))


def problems(corpus: Folder) -> str:
    return "\n".join(str(finding) for finding in lint_groups(corpus, find_shards(corpus)))


def described(row: dict[str, Any], **changes: Any) -> str:
    return json.dumps(row["group"] | changes)


@pytest.fixture
def damaged(built: Path) -> tuple[Folder, dict[str, Any], dict[str, Any]]:
    """A corpus to damage, a contrast group of it, and an example in that group."""
    corpus = Folder(str(built / "corpus"))
    group = next(row for row in groups_of(corpus) if row["group"]["contrast"])
    return corpus, group, samples_of(corpus)[group["group"]["supports"][0]]


MEMBER_DEFECTS = {
    "scene .* occurs more than once": lambda query: {"scene_id": query["scene_id"]},
    "is in .*, but has members of test": lambda query: {"split": "test"},
    "not all members show its mapping": lambda query: {"direction": "forward", "subtask": "other"},
    "its parents are not those of its members": lambda query: {"parents": ["0" * 64]},
    "is not in the corpus": lambda query: {"key": "renamed"},
}


@pytest.mark.parametrize("message", MEMBER_DEFECTS)
def test_lint_sees_a_wrong_member(message: str, damaged: tuple[Folder, dict[str, Any], dict[str, Any]]) -> None:
    corpus, group, example = damaged
    assert problems(corpus) == ""
    rewrite(corpus, example["key"], **MEMBER_DEFECTS[message](samples_of(corpus)[group["group"]["query"]]))
    assert re.search(f"{group['key']}: group: .*{message}", problems(corpus))


GROUP_DEFECTS: dict[str, Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]] = {
    "does not describe a group": lambda group, _: {"group": '{"k": 1}'},
    "k is 7": lambda group, _: {"group": described(group, k=7)},
    "is no contrast": lambda group, _: {"instruction": "Something else."},
    "among the query of 2 groups": lambda group, other: {"group": described(group, query=other["group"]["query"])},
}


@pytest.mark.parametrize("message", GROUP_DEFECTS)
def test_lint_sees_a_wrong_group(message: str, damaged: tuple[Folder, dict[str, Any], dict[str, Any]]) -> None:
    corpus, group, _ = damaged
    other = next(row for row in groups_of(corpus) if row["key"] != group["key"])
    rewrite(corpus, group["key"], **GROUP_DEFECTS[message](group, other))
    assert message in problems(corpus)


def test_lint_sees_an_example_used_too_often(damaged: tuple[Folder, dict[str, Any], dict[str, Any]]) -> None:
    corpus, _, _ = damaged
    recipe = corpus.read_bytes("recipe.yaml").decode()
    corpus.write_bytes("recipe.yaml", recipe.replace("max_uses: 2", "max_uses: 1").encode())
    assert "among the supports of 2 groups, more than 1" in problems(corpus)
