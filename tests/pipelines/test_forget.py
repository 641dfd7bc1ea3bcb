"""A forgotten photograph is gone, from every file, and stays gone; everything else stays as it was."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pytest
import webdataset
from PIL import Image
from typer.testing import CliRunner

from pipelines import ledger
from pipelines.cli import app
from pipelines.corpus import find_shards, iter_index
from pipelines.engine import Context
from pipelines.forget import ForgetError, find_images, finish, forget, make_plan
from pipelines.lint import lint
from pipelines.recipes import load
from pipelines.run import build
from pipelines.stages import STAGES
from pipelines.storage import TEMPORARY, Folder
from pipelines.tombstones import PATH, add_tombstones, read_tombstones
from schemas.identity import uid_of
from tests.conftest import CAPTIONS
from tests.corpora import make_corpus, samples, where

NAMES = ("astronaut", "cat", "coffee", "rocket")
# Cat and coffee pass for one subject, so that samples descend from both; the small cat is a near duplicate.
RECIPE = """\
name: small
seed: 3
sources:
  - {name: photos, type: folder, path: photos, text_is: caption}
  - {name: finished, type: x2i, path: finished.jsonl}
ingest: {unit_rows: 2, max_pixels: 16384}
score: {phash: }
decide: {filters: [{column: min_side, min: 32}], dedup: {perceptual: {radius: 8}}}
annotate: {entities: {}, crop_features: {}}
pair: {}
build:
  captions: {}
  condition_maps: {maps: [luminance, boxes], per_image: 2}
  subject_crops: {}
group: {few_shot: {shots: [1], window_units: 3}}
pack: {shard_bytes: 64KiB}
"""


@pytest.fixture(scope="module")
def built(photographs: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("forget")
    (root / "photos").mkdir()
    for name in NAMES:
        Image.fromarray(photographs[name]).save(root / f"photos/{name}.jpg", quality=92)
        (root / f"photos/{name}.txt").write_text(CAPTIONS[name])
    small = Image.fromarray(photographs["cat"]).resize((180, 120))
    small.save(root / "photos/small.jpg", quality=92)
    for name in ("cat", "coffee"):
        height, width = photographs[name].shape[:2]
        outline = [[0.1 * width, 0.1 * height, 0.9 * width, 0.1 * height, 0.5 * width, 0.95 * height]]
        thing = {"phrase": f"the {name}", "label": name, "subject_id": "one", "mask": outline}
        thing["box"] = [0.1 * width, 0.05 * height, 0.9 * width, 0.95 * height]
        (root / f"photos/{name}.json").write_text(json.dumps({"entities": [thing], "license": f"of-{name}"}))
    small.convert("L").convert("RGB").save(root / "grey.png")
    edit = {"task_type": "image_edit", "instruction": "Take the colours away.", "output_image": "grey.png"}
    lines = [edit | {"input_images": [f"photos/{name}.jpg"]} for name in ("cat", "rocket")]
    (root / "finished.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "recipe.yaml").write_text(RECIPE)
    build(context(root, root / "corpus"), workers=0)
    return root


@pytest.fixture
def corpus(built: Path, tmp_path: Path) -> Folder:
    shutil.copytree(built / "corpus", tmp_path / "corpus")
    return Folder(str(tmp_path / "corpus"))


@pytest.fixture(scope="module")
def after(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The corpus without the cat. Do not change it."""
    path = tmp_path_factory.mktemp("after") / "corpus"
    shutil.copytree(built / "corpus", path)
    plan = forget(Folder(str(path)), {uid(built, "cat")}, "requested")
    assert len(plan.uids) == 2  # and the finished sample that shows it
    return Folder(str(path))


@pytest.fixture(scope="module")
def before(built: Path) -> Folder:
    """The corpus with it. Do not change it."""
    return Folder(str(built / "corpus"))


def context(root: Path, corpus: Path, recipe: str = "recipe.yaml") -> Context:
    return Context(Folder(str(corpus)), load(root / recipe), str(root))


def uid(root: Path, name: str) -> str:
    return uid_of((root / f"photos/{name}.jpg").read_bytes())


def digests(corpus: Folder, prefix: str = "") -> dict[str, str]:
    return {name: hashlib.sha256(corpus.read_bytes(name)).hexdigest() for name in corpus.list(prefix)}


def test_nothing_of_the_photograph_is_left(built: Path, before: Folder, after: Folder) -> None:
    cat, there = uid(built, "cat"), samples(before)
    lost = {key: sample for key, sample in there.items() if cat in sample[0]}
    kept_bytes = {data for key, (_, members) in there.items() if key not in lost for data in members.values()}
    images = [d for _, ms in lost.values() for n, d in ms.items() if n not in ("txt", "json") and d not in kept_bytes]
    for path in ("work/images/photos-000000", "artefacts/crop_features/photos-000000"):
        rows = [row for row in before.read_table(f"{path}.parquet").to_pylist() if row["uid"] == cat]
        places = [place for row in rows for place in json.loads(row["members"]).values()]
        images += [before.read_bytes(f"{path}.tar", start, start + size) for start, size in places]
    text = [cat.encode(), cat[:20].encode(), CAPTIONS["cat"].encode(), b"the cat", b"cat.jpg", b"of-cat"]
    assert len(lost) >= 6 and len(images) >= 8
    assert any("few_shot" in key for key in lost) and any(len(parents) > 1 for parents, _ in lost.values())
    assert all(where(before, [*text, *images]))
    assert set.union(*where(after, [*text, *images])) == {PATH}
    assert set(samples(after)) == set(there) - set(lost)
    assert set(read_tombstones(after).values()) == {"requested"}


def test_everything_else_stays_and_the_corpus_is_sound(built: Path, before: Folder, after: Folder) -> None:
    there, left = samples(before), samples(after)
    assert left == {key: there[key] for key in left}
    touched = {s.tar for s in make_plan(before, {uid(built, "cat")}).samples}
    shards, remaining = digests(before, "data"), set(digests(after, "data").values())
    tars = {name for name in shards if name.endswith(".tar")}
    assert touched < tars
    assert all(shards[name] in remaining for name in tars - touched)  # some have moved up to close a gap
    assert lint(after) == []
    counts = {stage: ledger.totals(m.counts for m in ledger.read_markers(after, stage).values()) for stage in STAGES}
    for stage, count in counts.items():
        ledger.check_conservation(stage, count)
    assert counts["ingest"] == {"inputs": 7, "kept": 5, "dropped": 2, "quarantined": 0}
    assert counts["score"]["inputs"] == counts["decide"]["inputs"] == counts["ingest"]["kept"]
    assert counts["pack"]["kept"] == len(left) == after.read_json("manifest.json")["samples"]
    dropped = after.read_table("meta/ledger/ingest/photos-000000.parquet").to_pylist()[1]
    assert {dropped[name] for name in ("input", "uid", "detail")} == {""} and dropped["reason"] == "forgotten"
    for name in (*after.list("work/images", ".tar"), *after.list("artefacts", ".tar")):
        with after.open(name) as file, tarfile.open(fileobj=file) as tar:  # blanks are members like others
            places = after.read_table(f"{name.removesuffix('.tar')}.parquet", ["members"])["members"].to_pylist()
            assert len(tar.getmembers()) >= sum(len(json.loads(members)) for members in places)


def test_readers_open_what_is_left(after: Folder, tmp_path: Path) -> None:
    manifest = after.read_json("manifest.json")["streams"]
    for stream, entry in manifest.items():
        paths = [after.path(f"data/{stream}/{shard['name']}") for shard in entry["shards"]]
        assert len(list(webdataset.WebDataset(paths, shardshuffle=False).decode("pil"))) == entry["samples"]
    loaded = datasets.load_dataset(after.path(), "control", split="train", cache_dir=str(tmp_path))
    assert len(loaded) == manifest["control"]["samples"]
    tars = {f["name"]: f["sha256"] for f in after.read_json("croissant.json")["distribution"] if "sha256" in f}
    assert tars == {shard["name"]: shard["sha256"] for entry in manifest.values() for shard in entry["shards"]}


def test_a_later_build_does_not_bring_it_back(built: Path, after: Folder, tmp_path: Path) -> None:
    shutil.copytree(after.url, tmp_path / "corpus")
    corpus, cat = Folder(str(tmp_path / "corpus")), uid(built, "cat")
    shards = digests(after, "data") | digests(after, "meta/samples")
    again = context(built, Path(corpus.url))
    build(again, workers=0)
    assert digests(corpus, "data") | digests(corpus, "meta/samples") == shards

    corpus.remove("work")
    build(again, workers=0)  # knows that nothing has changed
    assert not corpus.exists("work/images")
    (built / "other.yaml").write_text(RECIPE.replace("seed: 3", "seed: 4"))
    build(context(built, Path(corpus.url), "other.yaml"), workers=0)
    assert lint(corpus) == []
    assert where(corpus, [cat.encode(), cat[:20].encode(), CAPTIONS["cat"].encode()]) == [{PATH}, {PATH}, set()]
    assert ledger.reasons(corpus)["ingest"]["dropped"] == {"forgotten": 2}
    small = uid(built, "small")  # no near duplicate of anything any more
    assert any(small in parents for parents, _ in samples(corpus).values())


class Killed(BaseException):
    pass


@contextmanager
def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Die at a write or removal, and leave a half-written file behind."""
    steps, writing, remove = iter(range(step)), Folder.writing, Folder.remove

    @contextmanager
    def dying_write(self: Folder, name: str) -> Iterator[Path]:
        if next(steps, None) is None:
            Path(self.path(name)).with_name(f"{TEMPORARY}killed").write_bytes(b"tabby cat with whiskers")
            raise Killed
        with writing(self, name) as path:
            yield path

    def dying_remove(self: Folder, name: str) -> None:
        if next(steps, None) is None:
            raise Killed
        remove(self, name)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Folder, "writing", dying_write)
        patch.setattr(Folder, "remove", dying_remove)
        yield


@pytest.mark.parametrize("step", [27, 52, 72])
def test_killed_at_any_point_it_ends_the_same_when_called_again(
    built: Path, corpus: Folder, after: Folder, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with killed_at(step, monkeypatch):
        forget(corpus, {uid(built, "cat")}, "requested")
    assert any(finding.rule == "forgotten" for finding in lint(corpus))
    ended = CliRunner().invoke(app, ["forget", corpus.url])
    assert ended.exit_code == 0 and "ended what was interrupted" in ended.output
    assert digests(corpus) == digests(after)


def test_lint_flags_what_descends_from_a_tombstone(built: Path, corpus: Folder) -> None:
    rocket = uid(built, "rocket")
    add_tombstones(corpus, [rocket], "by hand")
    findings = [finding for finding in lint(corpus) if finding.rule == "forgotten"]
    descended = {key for key, (parents, _) in samples(corpus).items() if rocket in parents}
    assert {finding.path.partition("::")[2] for finding in findings} == {"", *descended}


def test_images_are_named_by_uid_key_or_licence(built: Path, corpus: Folder) -> None:
    cat, small = uid(built, "cat"), uid(built, "small")
    key = next(key for key, (parents, _) in samples(corpus).items() if parents == [cat] and key.startswith(cat[:20]))
    assert find_images(corpus, [cat]) == find_images(corpus, [cat[:20]]) == find_images(corpus, [key]) == {cat}
    assert find_images(corpus, [cat], near_duplicates=True) == {cat, small}
    assert find_images(corpus, license="of-coffee") == {uid(built, "coffee")}
    with pytest.raises(ForgetError, match="no image of the corpus has a uid that begins so"):
        find_images(corpus, ["cat.jpg"])
    with pytest.raises(ForgetError, match="no image has the licence 'MIT'; there are '', 'of-cat', 'of-coffee'"):
        find_images(corpus, license="MIT")
    with pytest.raises(ForgetError, match="every sample"):
        forget(corpus, {uid(built, name) for name in NAMES}, "all")
    assert not corpus.exists(PATH)


def test_the_command_says_what_it_does(built: Path, corpus: Folder, tmp_path: Path) -> None:
    before = digests(corpus)
    listed = tmp_path / "list.txt"
    listed.write_text(f"# complaints\n{uid(built, 'cat')}  # 17\n\n{'0' * 64}\n")
    dry = CliRunner().invoke(app, ["forget", corpus.url, "--file", str(listed), "--dry-run"])
    assert dry.exit_code == 0 and "would forget 3 image(s)" in dry.output and "1 of them were not in" in dry.output
    assert "--near-duplicates" in dry.output and digests(corpus) == before
    done = CliRunner().invoke(app, ["forget", corpus.url, "--licence", "of-cat"])
    assert done.exit_code == 0 and set(read_tombstones(corpus).values()) == {"licence of-cat"}
    bad = CliRunner().invoke(app, ["forget", corpus.url, "nonsense"])
    assert bad.exit_code == 2 and "the key of a sample" in " ".join(bad.output.split())
    assert CliRunner().invoke(app, ["forget", corpus.url]).exit_code == 2


def test_a_corpus_without_its_ledger_forgets_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(tmp_path, ["control", "edit"], per_shard=1)
    first = str(next(iter_index(corpus))["parents"][0][0].as_py())
    (tmp_path / "latents/vae-32").mkdir(parents=True)
    for number in range(6):
        (tmp_path / f"latents/vae-32/edit-{number:06d}.safetensors").write_bytes(b"moments")
    with killed_at(35, monkeypatch):  # while shards are renamed to close the gap
        forget(corpus, {first}, "requested")
    finish(corpus)
    assert [shard.number for shard in find_shards(corpus, ["edit"])] == [0, 1, 2, 3, 4]
    assert corpus.list("latents") == []  # all shards of the stream have moved
    assert not any(first in parents for parents, _ in samples(corpus).values())
    assert lint(corpus) == []
