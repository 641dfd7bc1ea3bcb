"""Do examples teach? The same small model trained with right and with wrong examples, on several seeds; and speed.

    python benchmarks/few_shot.py --photos build/demo/photos [--seeds 3] [--steps 160] [--corpus build/demo/corpus]

Every mapping gives photographs another light and white balance, by the builders' own degradations with parameters drawn
for that mapping. Groups are drawn and made by `builders.few_shot`, one example each; all have one short implicit
wording, so nothing but the example tells which mapping is meant. In a *wrong* group the example shows another one. The
`tiny` preset is trained once per seed on right groups and once on wrong ones, equal in everything else. It is measured
by flow loss at fixed timesteps and noise, on mappings and photographs that it has not seen, with right and with wrong
examples.

With `--corpus`, also how many groups per second the `group` stage makes of a corpus that has its `work` folder.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, product
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import yaml
from PIL import Image

from builders.base import draft
from builders.degradations import DEGRADATIONS
from builders.few_shot.grouping import Candidate, Contents, Group, Window
from builders.few_shot.samples import Member, make_sample
from builders.few_shot.signatures import Signature
from filters.scorers.phash import gray_thumbnail, phash
from fine_tune.held_out import HeldOut
from fine_tune.index import Corpus, CountRule, open_index
from fine_tune.presets import preset
from fine_tune.state import TrainState, build_state
from fine_tune.train import check_records, make_loader, train_step
from pipelines import ledger
from pipelines.corpus import Shard
from pipelines.engine import Context
from pipelines.parts import PartWriter, part_index_path, part_path
from pipelines.recipes import RECIPE
from pipelines.stages.group import GroupStage
from pipelines.storage import Folder
from schemas.arrow import SAMPLES
from schemas.codec import encode_png
from schemas.groups import FewShot
from schemas.identity import generator, uid_of
from schemas.instructions import placeholder
from schemas.records import ImageRecord, Op, Split
from schemas.shards import END_OF_ARCHIVE

SIDE = 64
MAPPINGS: dict[Split, int] = {"train": 400, "val": 60}
PHOTOS_PER_MAPPING = 4
SETTINGS = FewShot(shots=(1,), share=1.0, implicit=1.0, contrast=0.1)
# Short, and one for all: this is about the examples.
WORDING = f"{placeholder(1)} -> {placeholder(2)} {placeholder(3)} ->"


def load_photos(folder: Path) -> list[np.ndarray]:
    """uint8 RGB [96, 96, 3] of every photograph: a little larger than the crops."""
    paths = sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".png") and "depth" not in path.name)
    return [np.asarray(Image.open(path).convert("RGB").resize((96, 96), Image.Resampling.BOX)) for path in paths]


def developed(pixels: np.ndarray, mapping: str) -> np.ndarray:
    """uint8 RGB [64, 64, 3] in the light and with the white balance that belong to the mapping."""
    rng = generator(0, mapping, "develop")
    light = DEGRADATIONS[str(rng.choice(["low_light", "over_exposure"]))]
    tinted = DEGRADATIONS["color_cast"](pixels.astype(np.float32) / 255, rng, 1.0).pixels
    return np.rint(light(tinted, rng, rng.random()).pixels * 255).astype(np.uint8)


def make_pairs(
    photos: Sequence[np.ndarray], split: Split, rng: np.random.Generator
) -> Iterator[tuple[Candidate, Member]]:
    """Random crops of different photographs before and after every mapping of a split."""
    for number in range(MAPPINGS[split]):
        mapping = f"{split}-{number}"
        for i in rng.permutation(len(photos))[:PHOTOS_PER_MAPPING]:
            top, left = rng.integers(96 - SIDE, size=2)
            crop = np.ascontiguousarray(photos[i][top : top + SIDE, left : left + SIDE])
            yield make_pair(crop, mapping, f"photo-{i}", split)


def make_pair(crop: np.ndarray, mapping: str, scene: str, split: Split) -> tuple[Candidate, Member]:
    images = encode_png(crop), encode_png(developed(crop, mapping))
    image = ImageRecord(uid=uid_of(images[1]), width=SIDE, height=SIDE, scene_id=scene, split=split)
    asked = f"Develop {placeholder(1)}."
    op = Op.of("develop", "1", mapping=mapping)
    record = draft(image, "perceive", "develop", op, instruction=asked, input_roles=("photo",))
    thumbnail = gray_thumbnail(crop)
    candidate = Candidate(
        key=record.key,
        signature=Signature("perceive", "develop", "forward", "", json.dumps({"mapping": mapping})),
        complete=True,
        uid=image.uid,
        is_photo=True,
        scene=scene,
        split=split,
        phash=phash(thumbnail),
        phash_mirror=phash(thumbnail[:, ::-1]),
        size=(SIDE, SIDE),
    )
    return candidate, Member(record, images)


def with_wrong_examples(groups: Sequence[Group]) -> list[Group]:
    """Every group with the example of another one, whose mapping and photograph are different."""
    wrong = []
    for i, group in enumerate(groups):
        others = (groups[(i + shift) % len(groups)] for shift in range(1, len(groups)))
        other = next(o for o in others if _is_wrong(o.supports[0], group.query))
        wrong.append(replace(group, supports=other.supports))
    return wrong


def _is_wrong(example: Candidate, query: Candidate) -> bool:
    return example.signature != query.signature and example.scene != query.scene


def write_corpora(photos: Sequence[np.ndarray], folder: Path) -> dict[str, str]:
    """Two corpora with the same queries: `right` and `wrong`; a fifth of the photographs is for validation alone."""
    corpora = {name: Folder(str(folder / name)) for name in ("right", "wrong")}
    parts: dict[Split, Sequence[np.ndarray]] = {"train": photos[len(photos) // 5 :], "val": photos[: len(photos) // 5]}
    for number, (split, of_split) in enumerate(parts.items()):
        rng = generator(0, split, "few_shot_benchmark")
        made = list(make_pairs(of_split, split, rng))
        members = {candidate.key: member for candidate, member in made}
        contents = {candidate.key: member.contents for candidate, member in made}
        right = Window([candidate for candidate, _ in made], SETTINGS, partial(_look_up, contents), rng).groups()
        for name, groups in (("right", right), ("wrong", with_wrong_examples(right))):
            write_groups(corpora[name], number, groups, members)
    return {name: corpus.url for name, corpus in corpora.items()}


def _look_up(contents: dict[str, Contents], candidate: Candidate) -> Contents:
    return contents[candidate.key]


def write_groups(corpus: Folder, number: int, groups: Sequence[Group], members: dict[str, Member]) -> None:
    """One shard with its index, which is all that training needs of a corpus."""
    shard, unit = Shard("few_shot_1", number), f"part-{number}"
    with PartWriter(corpus, unit) as writer:
        for group in groups:
            of_group = [members[member.key] for member in (*group.supports, group.query)]
            writer.write(make_sample(group, of_group, generator(0, group.key, "few_shot_benchmark")))
    corpus.write_bytes(shard.tar, corpus.read_bytes(part_path(shard.stream, unit)) + END_OF_ARCHIVE)
    rows = corpus.read_table(part_index_path(shard.stream, unit)).to_pylist()
    placed = [row | {"shard": shard.tar, "instruction": WORDING, "instruction_variants": []} for row in rows]
    corpus.write_table(shard.sample_index, pa.Table.from_pylist(placed, SAMPLES))


def train_once(corpus: str, steps: int, seed: int, folder: Path) -> TrainState:
    config = preset(
        "tiny",
        (
            f"data.corpus={json.dumps(corpus)}",
            *(f"max_side={SIDE}", "mixture={few_shot: 1}", "drop_all=0", f"data.seed={seed}"),
            *(f"steps={steps}", "schedule=cosine", "held_out_samples=64", "device=cpu"),
        ),
    )
    state = build_state(config)
    opened, rule = Corpus(corpus), CountRule(state.tokenizer, config.data.max_side, config.data.budget)
    loader = make_loader(opened, open_index(opened, "train", rule, folder / "index"), state)
    for batch in islice(loader.batches(0), steps):
        train_step(state, [batch])
    check_records(state)
    return state


def held_out_loss(state: TrainState, corpus: str, folder: Path) -> float:
    """Mean loss on the validation groups of a corpus, at fixed timesteps and noise."""
    opened = Corpus(corpus)
    rule = CountRule(state.tokenizer, state.config.data.max_side, state.config.data.budget)
    held_out = HeldOut.open(opened, rule, state, folder)
    assert held_out is not None
    return float(held_out.measure()["loss"])


def compare(photos: Path, seeds: int, steps: int) -> None:
    """Prints a row per kind of training groups: losses with either kind of example, medians over seeds."""
    losses: dict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpora = write_corpora(load_photos(photos), folder)
        for seed, (trained, corpus) in product(range(seeds), corpora.items()):
            state = train_once(corpus, steps, seed, folder / trained)
            for shown, measured in corpora.items():
                losses[trained, shown].append(held_out_loss(state, measured, folder / shown))
    print(f"{seeds} seeds, {steps} steps, {time.process_time():.0f} s of CPU; medians (range)\n")
    print("| trained on | loss with right examples | with wrong ones | wrong - right, every seed |\n|---|---|---|---|")
    for trained in corpora:
        right, wrong = losses[trained, "right"], losses[trained, "wrong"]
        gaps = ", ".join(f"{w - r:+.4f}" for r, w in zip(right, wrong, strict=True))
        print(f"| {trained} groups | {_summary(right)} | {_summary(wrong)} | {gaps} |")
    gains = [w - r for r, w in zip(losses["right", "right"], losses["wrong", "right"], strict=True)]
    print(f"\ngain of training on right groups, every seed: {', '.join(f'{gain:+.4f}' for gain in gains)}")


def _summary(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def measure_speed(corpus: Folder) -> None:
    """Prints how fast the stage is on the parts of a corpus; it writes the same groups again."""
    recipe = RECIPE.model_validate(yaml.safe_load(corpus.read_bytes("recipe.yaml")))
    stage = GroupStage(Context(corpus, recipe, "."))
    tasks, start, cpu = stage.tasks(), time.perf_counter(), time.process_time()
    markers = [stage.run(task) for task in tasks]
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    candidates = ledger.totals(marker.counts for marker in markers)["inputs"]
    made = [name for marker in markers for name in marker.outputs if re.search(r"/few_shot_.*parquet", name)]
    groups = sum(len(corpus.read_table(name, ["key"])) for name in made)
    print(f"{groups} groups of {candidates} samples in {seconds:.1f} s: {groups / seconds:.1f} groups/s", end=", ")
    print(f"{groups / cpu:.1f} per second of CPU\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Right against wrong examples, and the speed of the stage.")
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--corpus", help="built with a `group` section, and not cleaned up")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    if options.corpus:
        measure_speed(Folder(options.corpus))
    compare(options.photos, options.seeds, options.steps)


if __name__ == "__main__":
    main()
