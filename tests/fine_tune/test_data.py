"""The order of samples, the packs, the batches, and what becomes of samples that cannot be used."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fine_tune.data import Loader, SampleSettings, SkipLimit, make_example, read_images
from fine_tune.index import Corpus, CorpusError, CountRule, Index, SampleError, SkipLog, StreamIndex, open_index
from fine_tune.order import AUTHORS_MIXTURE, Plan, StreamOrder, best_fit, block_counts, stream_shares
from fine_tune.tiny import TOKENIZER_DIR
from fine_tune.tokens import UNCONDITIONAL, Tokenizer
from schemas.shards import BLOCK


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(TOKENIZER_DIR)


def make_index(sizes: dict[str, int], longest: int = 900, seed: int = 0) -> Index:
    rng = np.random.default_rng(seed)
    streams = []
    for name, size in sizes.items():
        tables = (f"meta/samples/{name}-000000.parquet",)
        tokens = rng.integers(20, longest, size).astype(np.int32)
        streams.append(StreamIndex(name, tables, np.array([0, size]), np.arange(size, dtype=np.int32), tokens))
    return Index(tuple(streams), SkipLog(), sum(sizes.values()))


def make_plan(index: Index, seed: int = 0, budget: int = 1024, block: int = 64) -> Plan:
    return Plan(index, stream_shares(index, AUTHORS_MIXTURE), seed, budget, block, chunk=4, group=3)


SIZES = {"control": 30, "edit": 41, "perceive": 9, "subject_2": 17, "text_to_image": 73}


# The order.


@given(size=st.integers(1, 200), chunk=st.integers(1, 50), group=st.integers(1, 10), cuts=st.lists(st.integers(0, 600)))
def test_every_epoch_has_every_sample_once_however_it_is_read(
    size: int, chunk: int, group: int, cuts: list[int]
) -> None:
    order = StreamOrder("edit", size, 3, chunk, group)
    epochs, items = order.draws(0, 3 * size)
    assert epochs.tolist() == np.repeat([0, 1, 2], size).tolist()
    for epoch in range(3):
        assert sorted(items[epochs == epoch]) == list(range(size))
    bounds = sorted({0, 3 * size, *(cut for cut in cuts if cut < 3 * size)})
    pieces = [StreamOrder("edit", size, 3, chunk, group).draws(a, b)[1] for a, b in pairwise(bounds)]
    assert np.concatenate(pieces).tolist() == items.tolist()


def test_epochs_and_seeds_differ() -> None:
    orders = [StreamOrder("edit", 100, seed).draws(0, 200)[1] for seed in (0, 1)]
    assert (orders[0][:100] != orders[0][100:]).mean() > 0.9
    assert (orders[0] != orders[1]).mean() > 0.9


def test_reading_stays_within_a_few_chunks_of_consecutive_samples() -> None:
    order = StreamOrder("edit", 10_000, 0, chunk=100, group=4)
    _, items = order.draws(0, 10_000)
    for start in range(0, 10_000, 400):
        assert len(set(items[start : start + 400] // 100)) == 4


# The mixture.


def test_the_authors_mixture_is_rescaled_to_what_there_is() -> None:
    shares = stream_shares(
        make_index({"text_to_image": 50, "edit": 10, "subject_1": 30, "subject_2": 10}), AUTHORS_MIXTURE
    )
    expected = {"text_to_image": 0.5 / 0.8, "edit": 0.1 / 0.8, "subject_1": 0.15 / 0.8, "subject_2": 0.05 / 0.8}
    assert shares == pytest.approx(expected)


def test_a_stream_can_be_taken_out_of_its_task() -> None:
    shares = stream_shares(make_index({"subject_1": 90, "subject_2": 10}), {"subject": 1, "subject_2": 3})
    assert shares == pytest.approx({"subject_1": 0.25, "subject_2": 0.75})


@pytest.mark.parametrize(
    ("mixture", "message"),
    [({"edits": 1.0}, "did you mean edit"), ({"edit": -1.0}, "at least 0"), ({"style": 1.0}, "takes nothing")],
)
def test_a_wrong_mixture_is_refused(mixture: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream_shares(make_index(SIZES), mixture)


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=20), st.integers(20, 300))
def test_block_counts_are_within_one_of_the_share_unless_that_is_zero(weights: list[float], block: int) -> None:
    shares = {str(i): weight / sum(weights) for i, weight in enumerate(weights)}
    counts = block_counts(shares, block)
    assert sum(counts.values()) == block
    assert min(counts.values()) >= 1
    small = sum(share * block < 1 for share in shares.values())
    assert all(abs(counts[name] - share * block) <= 1 + small for name, share in shares.items())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), first=st.integers(0, 50))
def test_the_mixture_is_exact_in_every_block(seed: int, first: int) -> None:
    plan = make_plan(make_index(SIZES), seed)
    for block in (first, first + 1):
        drawn = Counter(draw.stream.name for pack in plan.block(block) for draw in pack)
        assert drawn == plan.counts
    for entry in plan.report(2).values():
        assert entry["realised"] == pytest.approx(entry["requested"], abs=1 / 64)


# Packs.


@given(st.lists(st.integers(1, 100), max_size=200))
def test_best_fit_packs_everything_and_never_opens_a_bin_too_early(lengths: list[int]) -> None:
    bins = best_fit(lengths, 100)
    assert sorted(i for items in bins for i in items) == list(range(len(lengths)))
    loads = sorted(sum(lengths[i] for i in items) for items in bins)
    assert all(load <= 100 for load in loads)
    assert len(loads) < 2 or loads[0] + loads[1] > 100


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 100), ranks=st.integers(1, 5), first=st.integers(0, 60))
def test_packs_do_not_depend_on_where_one_starts_or_on_the_number_of_ranks(seed: int, ranks: int, first: int) -> None:
    index = make_index(SIZES)
    whole = make_plan(index, seed)
    expected = [[(d.stream.name, d.epoch, d.item) for d in whole.pack(k)] for k in range(first + 12)]
    place = whole.place(first)
    for rank in range(ranks):
        plan = make_plan(make_index(SIZES), seed)
        if rank % 2:
            plan.go_to(place)
        for number in range(first + rank, first + 12, ranks):
            assert [(d.stream.name, d.epoch, d.item) for d in plan.pack(number)] == expected[number]
    for number in range(12):
        assert 0 < sum(draw.tokens for draw in whole.pack(number)) <= 1024


def test_a_place_in_another_plan_is_ignored() -> None:
    index = make_index(SIZES)
    plan = make_plan(index, seed=1)
    expected = plan.pack(5)
    plan.go_to(make_plan(index, seed=2).place(40))
    assert plan.pack(5) == expected


# The index.


def test_the_index_counts_exactly_what_packs_hold(photo_corpus: Path, tokenizer: Tokenizer) -> None:
    corpus = Corpus(str(photo_corpus))
    index = open_index(corpus, "train", CountRule(tokenizer, 64, 400))
    assert {stream.name: len(stream) for stream in index.streams} == dict.fromkeys(
        ("control", "edit", "few_shot_1", "perceive", "subject_2", "text_to_image"), 4
    )
    settings_ = SampleSettings(max_side=64).without_augmentation()
    for stream in index.streams:
        for item in range(len(stream)):
            row = corpus.row(stream, item)
            example = make_example(row, read_images(corpus, row), tokenizer, settings_, seed=0, epoch=0)
            assert len(example.sequence) == stream.tokens[item]
            assert row["split"] == "train"


def test_the_index_is_cached_until_the_corpus_or_the_settings_change(
    photo_corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "corpus"
    shutil.copytree(photo_corpus, path)
    cache = tmp_path / "cache"
    first = open_index(Corpus(str(path)), "train", CountRule(tokenizer, 64, 60), cache)
    again = open_index(Corpus(str(path)), "train", CountRule(tokenizer, 64, 60), cache)
    assert len(list(cache.glob("*.npz"))) == 1
    assert (again.digest, again.skips, again.samples_seen) == (first.digest, first.skips, first.samples_seen)
    assert open_index(Corpus(str(path)), "train", CountRule(tokenizer, 32, 60), cache).digest != first.digest
    table = pq.read_table(path / "meta/samples/edit-000000.parquet")
    pq.write_table(table.slice(1), path / "meta/samples/edit-000000.parquet")
    assert open_index(Corpus(str(path)), "train", CountRule(tokenizer, 64, 60), cache).digest != first.digest


def test_too_long_samples_are_counted_not_trained_on(photo_corpus: Path, tokenizer: Tokenizer) -> None:
    """Upstream's `max_input_length_limit` is never enforced (train_helper/data.py)."""
    index = open_index(Corpus(str(photo_corpus)), "train", CountRule(tokenizer, 64, 80))
    assert index.skips.counts["too long"] == index.skips.total > 0
    assert len(index) + index.skips.total == index.samples_seen == 24
    assert max(stream.tokens.max() for stream in index.streams) <= 80
    assert {skip.shard.split("/")[1] for skip in index.skips.examples} >= {"few_shot_1"}
    with pytest.raises(CorpusError, match="no usable sample"):
        open_index(Corpus(str(photo_corpus)), "train", CountRule(tokenizer, 64, 20))


def test_a_corpus_without_an_index_or_its_fields_is_refused(
    photo_corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rule = CountRule(tokenizer, 64, 400)
    with pytest.raises(CorpusError, match="not a corpus"):
        open_index(Corpus(str(tmp_path)), "train", rule)
    path = tmp_path / "corpus"
    shutil.copytree(photo_corpus, path)
    file = path / "meta/samples/edit-000000.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["edit_source_index"]), file)
    with pytest.raises(CorpusError, match="edit_source_index"):
        open_index(Corpus(str(path)), "train", rule)


def test_memory_file_systems_are_read_like_disks(photo_corpus: Path, tokenizer: Tokenizer) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(f"{photo_corpus}/", "/photo-corpus/", recursive=True)
    rule = CountRule(tokenizer, 64, 400)
    local, remote = Corpus(str(photo_corpus)), Corpus("memory://photo-corpus")
    index = open_index(remote, "train", rule)
    assert index.digest == open_index(local, "train", rule).digest
    row = remote.row(index.streams[0], 0)
    for name, image in read_images(remote, row).items():
        assert image.tobytes() == read_images(local, row)[name].tobytes()


# Batches.


def make_loader(path: Path, tokenizer: Tokenizer, **settings_: float) -> Loader:
    corpus = Corpus(str(path))
    index = open_index(corpus, "train", CountRule(tokenizer, 64, 320))
    plan = Plan(index, stream_shares(index, AUTHORS_MIXTURE), 5, 320, block=32)
    return Loader(corpus, plan, tokenizer, SampleSettings(max_side=64, **settings_), 5, workers=2, prefetch=2)


def test_two_ranks_see_together_what_one_sees(photo_corpus: Path, tokenizer: Tokenizer) -> None:
    one = list(islice(make_loader(photo_corpus, tokenizer).batches(3), 8))
    two = [list(islice(make_loader(photo_corpus, tokenizer).batches(3, rank, 2), 4)) for rank in range(2)]
    assert max(draw.epoch for k in range(3, 11) for draw in make_loader(photo_corpus, tokenizer).plan.pack(k)) > 0
    for position, batch in enumerate(one):
        other = two[position % 2][position // 2]
        assert batch.number == other.number == 3 + position
        assert torch.equal(batch.pack.token_ids, other.pack.token_ids)
        assert [example.seed for example in batch.examples] == [example.seed for example in other.examples]
        for a, b in zip(batch.examples, other.examples, strict=True):
            assert torch.equal(a.target, b.target)
            assert all(torch.equal(x, y) for x, y in zip(a.inputs, b.inputs, strict=True))


def test_the_same_sample_is_drawn_anew_in_every_epoch(photo_corpus: Path, tokenizer: Tokenizer) -> None:
    loader = make_loader(photo_corpus, tokenizer)
    corpus, stream = loader.corpus, loader.plan.streams[0]
    row = corpus.row(stream, 0)
    seeds = {
        make_example(row, read_images(corpus, row), tokenizer, loader.settings, seed=0, epoch=e).seed for e in range(9)
    }
    assert len(seeds) == 9


def test_dropping_the_condition_drops_its_images_and_the_edit_source(photo_corpus: Path, tokenizer: Tokenizer) -> None:
    loader = make_loader(photo_corpus, tokenizer, drop_all=1.0)
    examples = [example for batch in islice(loader.batches(0), 4) for example in batch.examples]
    unconditional = tokenizer.encode(UNCONDITIONAL).token_ids
    for example in examples:
        assert torch.equal(torch.as_tensor(example.sequence.token_ids), unconditional)
        assert (example.inputs, example.shown, example.edit_source_index) == ([], [], -1)


def test_edit_pairs_stay_aligned_and_masks_lie_over_them(photo_corpus: Path, tokenizer: Tokenizer) -> None:
    loader = make_loader(photo_corpus, tokenizer, drop_all=0.0, edit_masks=True)
    found = [e for batch in islice(loader.batches(0), 8) for e in batch.examples if e.task == "edit"]
    assert found
    for example in found:
        source = example.inputs[example.edit_source_index]
        assert example.edit_mask is not None
        assert source.shape[1:] == example.target.shape[1:] == example.edit_mask.shape
        # Resizing spreads an edit by a pixel or two, and JPEG by its blocks.
        change = (source - example.target).abs().amax(0)
        assert change[example.edit_mask].mean() > 10 * change[~example.edit_mask].mean()


def test_instruction_variants_are_drawn(photo_corpus: Path, tokenizer: Tokenizer) -> None:
    corpus = Corpus(str(photo_corpus))
    rows = [row for table in corpus.list_indexes() for row in corpus.table(table).to_pylist()]
    row = next(row for row in rows if row["instruction_variants"])
    images = read_images(corpus, row)
    plain = SampleSettings(max_side=64, drop_all=0.0)
    drawn = {
        tuple(make_example(row, images, tokenizer, plain, seed=0, epoch=epoch).sequence.token_ids.tolist())
        for epoch in range(20)
    }
    assert len(drawn) == 1 + len(row["instruction_variants"])


# Samples that went bad after they were indexed.


@pytest.fixture
def bad_corpus(photo_corpus: Path, tmp_path: Path) -> Callable[[str], tuple[Path, str]]:
    """Damage the first edit sample on disk; returns the corpus and the key of the sample."""

    def make(damage: str) -> tuple[Path, str]:
        path = tmp_path / "damaged"
        shutil.copytree(photo_corpus, path)
        row = pq.read_table(path / "meta/samples/edit-000000.parquet").slice(0, 1).to_pylist()[0]
        shard = path / row["shard"]
        data = bytearray(shard.read_bytes())
        offset = row["members"][1]["offset"]
        if damage == "undecodable image":
            data[offset + 200 : offset + 2000] = bytes(1800)
            data[offset : offset + 4] = b"GIF8"
        elif damage == "truncated":
            data = data[: offset + 100]
        elif damage == "shard changed":
            data = data[BLOCK:]
        shard.write_bytes(data)
        return path, row["key"]

    return make


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("undecodable image", "undecodable image"),
        ("truncated", "undecodable image"),
        ("shard changed", "shard changed"),
    ],
)
def test_bad_samples_are_left_out_by_name(
    bad_corpus: Callable[[str], tuple[Path, str]], tokenizer: Tokenizer, damage: str, reason: str
) -> None:
    """Upstream returns before its retry loop, so one bad image ends the run (train_helper/data.py:62)."""
    path, key = bad_corpus(damage)
    batches = list(islice(make_loader(path, tokenizer).batches(0), 12))
    skips = [skip for batch in batches for skip in batch.skips]
    assert {(skip.key, skip.reason) for skip in skips} >= {(key, reason)}
    assert all(skip.shard == "data/edit/edit-000000.tar" and skip.key in str(skip) for skip in skips)
    assert all(batch.examples for batch in batches)
    assert key not in {example.key for batch in batches for example in batch.examples}


def test_a_pack_of_bad_samples_is_replaced_by_the_next_one(
    photo_corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "damaged"
    shutil.copytree(photo_corpus, path)
    loader = make_loader(path, tokenizer)
    packs = [{(d.stream.name, d.item) for d in loader.plan.pack(k)} for k in range(40)]
    number = next(k for k in range(40) if len(packs[k]) <= 3 and packs[k + 1] - packs[k])
    for draw in loader.plan.pack(number):
        row = loader.corpus.row(draw.stream, draw.item)
        shard, offset = path / row["shard"], row["offset"]
        data = bytearray(shard.read_bytes())
        data[offset : offset + BLOCK] = bytes(BLOCK)
        shard.write_bytes(data)
    batch = next(loader.batches(number))
    assert batch.number == number
    assert len(batch.skips) >= len(loader.plan.pack(number))
    assert batch.examples


def test_an_image_of_another_size_than_indexed_is_left_out(photo_corpus: Path) -> None:
    corpus = Corpus(str(photo_corpus))
    row = corpus.table("meta/samples/edit-000000.parquet").slice(0, 1).to_pylist()[0]
    row["members"][0]["width"] += 1
    with pytest.raises(SampleError, match=r"shard changed.*input_1\.jpg"):
        read_images(corpus, row)


def test_too_many_bad_samples_stop_the_run(bad_corpus: Callable[[str], tuple[Path, str]], tokenizer: Tokenizer) -> None:
    path, key = bad_corpus("undecodable image")
    patient, strict = SkipLimit(0.5), SkipLimit(0.01, least=20)
    with pytest.raises(CorpusError, match=f"more than data.max_skip_rate=0.01 allows.*{key}"):
        for batch in islice(make_loader(path, tokenizer).batches(0), 40):
            patient.count(batch)
            strict.count(batch)
    assert patient.skipped == strict.skipped == 1


def test_edit_pairs_of_different_shape_are_left_out_of_the_index(
    photo_corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "corpus"
    shutil.copytree(photo_corpus, path)
    file = path / "meta/samples/edit-000000.parquet"
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[0]["members"][0]["width"] //= 2
    pq.write_table(type(table).from_pylist(rows, table.schema), file)
    index = open_index(Corpus(str(path)), "train", CountRule(tokenizer, 64, 320))
    assert index.skips.counts == {"edit pair of different shapes": 1}
    assert index.skips.examples[0].key == rows[0]["key"]


def test_image_objects_are_rgb_in_the_range_of_the_vae(photo_corpus: Path, tokenizer: Tokenizer) -> None:
    batch = next(make_loader(photo_corpus, tokenizer).batches(0))
    for example in batch.examples:
        for image in (*example.inputs, example.target):
            assert image.dtype == torch.float32 and image.shape[0] == 3
            assert -1 <= image.min() < image.max() <= 1
