"""Progressive stages: what each trains on, what one hands to the next, and resuming in the middle of any."""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fine_tune.checkpoint import ResumeError, find_checkpoints, open_part
from fine_tune.index import Corpus, CountRule, Index, SkipLog, StreamIndex, open_index
from fine_tune.metrics import read_metrics
from fine_tune.order import Draw, Plan, sides_in_turn
from fine_tune.presets import Config, ConfigError, preset
from fine_tune.tiny import TOKENIZER_DIR
from fine_tune.tokens import Tokenizer
from fine_tune.train import train
from tests.fine_tune.conftest import SMALL_MODEL

SIZES = {"control": 30, "edit": 41, "text_to_image": 73}


def make_index(sizes: dict[str, int], longest: int, sides: tuple[int, ...] = ()) -> Index:
    """Samples whose tokens grow with `longest`, as they do with the side of a stage."""
    streams = []
    for name, size in sizes.items():
        tokens = np.random.default_rng(size).integers(longest // 4, longest, size).astype(np.int32)
        at = {side: tokens // (number + 2) for number, side in enumerate(sides)}
        tables, rows = (f"meta/samples/{name}-000000.parquet",), np.arange(size, dtype=np.int32)
        streams.append(StreamIndex(name, tables, np.array([0, size]), rows, tokens, at))
    return Index(tuple(streams), SkipLog(), sum(sizes.values()))


def drawn(plan: Plan, packs: int) -> list[Draw]:
    return [draw for number in range(packs) for draw in plan.pack(number)]


# What one stage hands to the next.


@settings(max_examples=25)
@given(
    stages=st.lists(st.tuples(st.integers(1, 40), st.integers(8, 40), st.integers(100, 900)), min_size=2, max_size=5),
    shares=st.lists(st.tuples(*[st.floats(0.1, 1)] * 3), min_size=5, max_size=5),
)
def test_no_sample_comes_again_before_its_epoch_is_over(
    stages: list[tuple[int, int, int]], shares: list[tuple[float, ...]]
) -> None:
    """Over stages of other lengths, blocks, sample sizes and mixtures, each cut off somewhere in a block."""
    seen, after, passed_over = Counter[tuple[str, int, int]](), None, 0
    for (packs, block, longest), weights in zip(stages, shares, strict=False):
        mixture = {name: weight / sum(weights) for name, weight in zip(SIZES, weights, strict=True)}
        plan = Plan(make_index(SIZES, longest), mixture, 3, 1024, block, after=after, chunk=4, group=3)
        seen.update((draw.stream.name, draw.epoch, draw.item) for draw in drawn(plan, packs))
        after, passed_over = plan.cursor(packs), passed_over + block
    assert max(seen.values()) == 1
    by_epoch = defaultdict(set)
    for name, epoch, item in seen:
        by_epoch[name, epoch].add(item)
    last = {name: max((epoch for stream, epoch in by_epoch if stream == name), default=0) for name in SIZES}
    missed = sum(SIZES[name] - len(items) for (name, epoch), items in by_epoch.items() if epoch < last[name])
    assert missed <= passed_over  # only what was left of a block at the end of a stage


def test_a_stream_with_other_samples_begins_a_new_epoch() -> None:
    plan = Plan(make_index(SIZES, 400), dict.fromkeys(SIZES, 1 / 3), 3, 1024, 30)
    before = drawn(plan, 8)
    fewer = {**SIZES, "edit": 39}
    following = drawn(Plan(make_index(fewer, 400), dict.fromkeys(SIZES, 1 / 3), 3, 1024, 30, after=plan.cursor(8)), 8)
    for name, same in {"control": True, "edit": False}.items():
        first, last = (draws for draws in (following, before))
        epochs = [
            min(d.epoch for d in first if d.stream.name == name),
            max(d.epoch for d in last if d.stream.name == name),
        ]
        assert (epochs[0] == epochs[1]) is same
        assert epochs[0] >= epochs[1]


def test_a_stream_that_rests_for_a_stage_goes_on_where_it_was() -> None:
    index, both = make_index(SIZES, 400), {"control": 0.5, "edit": 0.5}
    first = Plan(index, both, 3, 1024, 20)
    alone = Plan(index, {"control": 1.0}, 3, 1024, 20, after=first.cursor(2))
    assert alone.cursor(2)["edit"] == first.cursor(2)["edit"]


def test_the_cursor_is_part_of_what_a_plan_is() -> None:
    index, shares = make_index(SIZES, 400), dict.fromkeys(SIZES, 1 / 3)
    first = Plan(index, shares, 3, 1024, 30)
    assert Plan(index, shares, 3, 1024, 30, after=first.cursor(5)).identity != first.identity


# Several sides.


def test_a_sample_takes_every_side_once_in_as_many_epochs() -> None:
    stream = make_index({"edit": 4000}, 400, (32, 48, 64)).streams[0]
    items = np.arange(4000)
    sides = np.array([sides_in_turn(stream, np.full(4000, epoch), items) for epoch in range(4)])
    assert all(sorted(column) == [0, 32, 48, 64] for column in sides.T)
    for epoch in sides:
        for step in (1, 2, 3):  # samples that come in pairs or threes do not have their own side
            assert np.bincount(epoch[::step] // 16).tolist()[0] == pytest.approx(1000 / step, rel=0.15)


def test_packs_of_several_sides_are_filled_by_what_samples_take_there() -> None:
    index = make_index(SIZES, 900, (32, 48))
    plan = Plan(index, dict.fromkeys(SIZES, 1 / 3), 3, 1024, 60)
    draws = drawn(plan, 30)
    assert {draw.side for draw in draws} == {0, 32, 48}
    assert all(sum(draw.tokens for draw in plan.pack(number)) <= 1024 for number in range(30))
    assert plan.fill() > 0.8
    one_side = Plan(make_index(SIZES, 900), dict.fromkeys(SIZES, 1 / 3), 3, 1024, 60)
    assert len(plan.block(0)) < len(one_side.block(0))


def test_tokens_at_other_sides_are_those_of_an_index_of_that_side(photo_corpus: Path) -> None:
    corpus, tokenizer = Corpus(str(photo_corpus)), Tokenizer.from_pretrained(TOKENIZER_DIR)
    several = open_index(corpus, "train", CountRule(tokenizer, 96, 120, (64, 32)))
    for side in (64, 32):
        alone = open_index(corpus, "train", CountRule(tokenizer, side, 120))
        assert len(alone) > len(several)  # at 96 px some are too long
        for stream in several.streams:
            other = next(s for s in alone.streams if s.name == stream.name)
            expected = {other.locate(item): int(other.tokens[item]) for item in range(len(other))}
            for item in range(len(stream)):
                assert stream.tokens_at[side][item] == expected[stream.locate(item)]
    assert several.digest != open_index(corpus, "train", CountRule(tokenizer, 96, 120)).digest


# Settings.


def test_stages_are_those_of_the_paper() -> None:
    """arXiv:2409.11340, table 1; the batch in tokens of text-to-image samples."""
    config = preset("stages")
    stages = [config.at_stage(number) for number in range(1, 6)]
    assert [stage.data.max_side for stage in stages] == [256, 512, 1024, 2240, 2240]
    assert [stage.optim.lr for stage in stages] == [1e-4, 1e-4, 4e-5, 2e-5, 2e-5]
    assert [stage.run.steps for stage in stages] == [500_000, 800_000, 900_000, 930_000, 1_010_000]
    assert [stage.optim.warmup_steps for stage in stages] == [1000, 0, 0, 0, 0]
    for stage, batch in zip(stages[:4], (1040, 520, 208, 104), strict=True):
        tokens = batch * ((stage.data.max_side // 16) ** 2 + 128)
        assert 0 <= stage.data.packs_per_step * stage.data.budget - tokens < stage.data.budget
        assert (stage.optim.beta1, stage.optim.beta2) == (0.9, 0.999)
    assert stages[4].data.other_sides == (256, 512, 1024)
    for number in range(1, 6):
        alone = preset(f"stage{number}")
        assert alone.data == config.at_stage(number).data and alone.optim.warmup_steps == 1000


def test_the_batch_scales_the_rate_by_its_square_root_and_steps_scale_by_themselves() -> None:
    small = preset("stages", ["scale_batch=0.25", "scale_steps=0.01"])
    assert small.at_stage(1).data.packs_per_step == 6
    assert small.at_stage(1).optim.lr == pytest.approx(1e-4 / 2)
    assert (small.at_stage(1).run.steps, small.at_stage(1).optim.warmup_steps) == (5000, 10)
    ranks = preset("stages", ["stages.ranks=16"])
    assert [ranks.at_stage(n).data.packs_per_step for n in range(1, 6)] == [32, 32, 48, 96, 32]
    assert ranks.at_stage(1).optim.lr == pytest.approx(1e-4 * (32 / 24) ** 0.5)


def test_one_stage_can_be_changed() -> None:
    config = preset("stages", ["stages.table.2.steps=7", "stages.table.5.other_sides=[512]"])
    assert config.at_stage(2).run.steps == 500_007
    assert config.at_stage(5).data.other_sides == (512,)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("max_side=512", "give stages.table.<number>.max_side"),
        ("stages.table.6.lr=1e-5", "there is no 6"),
        ("stages.table.2.max_side=100", "not a multiple of 16"),
        ("stages.table.2.side=100", "side"),
        ("stages.table={}", None),
        ("scale_batch=0", "positive"),
        ("stages.table.1.other_sides=[256]", "below data.max_side"),
    ],
)
def test_wrong_stages_are_refused(assignment: str, said: str | None) -> None:
    if said is None:
        assert preset("stages", [assignment]).num_stages == 1
        return
    with pytest.raises(ConfigError, match=said):
        preset("stages", [assignment])


# A run.


@pytest.fixture(scope="module")
def staged(photo_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    folder = tmp_path_factory.mktemp("staged")

    def make(name: str) -> Config:
        return preset(
            "tiny_stages",
            (
                f"model.architecture={SMALL_MODEL}",
                f"data.corpus={photo_corpus}",
                f"run.folder={folder / name}",
                *("scale_steps=0.1", "block=24", "ema_decay=0.9", "save_every=3", "keep=100", "log_every=1"),
                *("device=cpu", "tensorboard=false", "held_out_samples=0"),
            ),
        )

    return make


@pytest.fixture(scope="module")
def whole(staged: Callable[..., Config]) -> Path:
    """A run of all five stages, two steps each, with a checkpoint every three steps and at the end of each stage."""
    config = staged("whole")
    assert train(config).name == "step-00000010"
    return Path(config.run.folder)


def state_of(run: Path) -> dict[str, torch.Tensor]:
    last = find_checkpoints(run)[-1]
    readers = {part: open_part(last, part) for part in ("transformer", "optimizer", "average")}
    return {f"{part}/{name}": reader.tensor(name) for part, reader in readers.items() for name in reader.pieces}


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run / "metrics.jsonl")]


def test_a_run_goes_through_all_stages(whole: Path) -> None:
    lines = read_metrics(whole / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["lr"] for line in lines[1::2]] == pytest.approx([1e-3, 1e-3, 4e-4, 2e-4, 2e-4])
    folders = [whole, *(whole / f"stage-{number}" for number in range(2, 6))]
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    assert [config["data"]["max_side"] for config in configs] == [32, 48, 64, 96, 96]
    assert configs[4]["data"]["other_sides"] == [32, 48, 64]
    assert all((folder / "data.json").is_file() for folder in folders)
    assert len(find_checkpoints(whole)) == len({3, 6, 9, 2, 4, 8, 10})


def test_optimizer_and_average_are_kept_from_stage_to_stage(whole: Path) -> None:
    """Adam's moments have seen all ten steps, and no average is the weights themselves again."""
    state = state_of(whole)
    assert {float(value) for name, value in state.items() if name.endswith(".step")} == {10.0}
    moved = [(state[f"average/{name}"] - state[f"transformer/{name}"]).abs().max() for name in ("proj_out.weight",)]
    assert all(distance > 1e-5 for distance in moved)


def test_no_sample_is_seen_again_before_its_epoch_is_over_in_a_run(whole: Path) -> None:
    """Where each stage's plan begins, by the checkpoints at the ends of the stages before."""
    begun = {}
    for folder in find_checkpoints(whole):
        about = (folder / "about.json").read_json()
        stage = about["data"]["stage"]
        begun[stage["number"]] = stage["after"]
        assert stage["first_step"] == 2 * (stage["number"] - 1)
    draws = [{name: stream["draws"] for name, stream in begun[number].items()} for number in range(2, 6)]
    for before, after in pairwise(draws):
        assert all(after[name] > before[name] for name in before)


@pytest.mark.parametrize("step", [4, 3, 9], ids=["between two stages", "in a stage", "in the mixed stage"])
def test_resumed_in_any_stage_is_the_same_run(staged: Callable[..., Config], whole: Path, step: int) -> None:
    config = staged(f"from-{step}")
    run = Path(config.run.folder)
    shutil.copytree(whole, run)
    for checkpoint in find_checkpoints(run):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    train(config)
    assert losses(run) == losses(whole)
    expected = state_of(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state_of(run).items())


def test_a_stage_that_has_changed_is_not_resumed_unnoticed(staged: Callable[..., Config], whole: Path) -> None:
    config = staged("changed")
    shutil.copytree(whole, config.run.folder)
    table = config.stages.table
    other = {**table, "5": replace(table["5"], lr=1.0)}
    with pytest.raises(ResumeError, match=r"optim.lr was 0.0002, now is 1.0"):
        train(replace(config, stages=replace(config.stages, table=other)))
