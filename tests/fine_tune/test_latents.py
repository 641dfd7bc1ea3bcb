"""Training on cached latents is training on images, without the images."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL

from fine_tune.data import Batch, Loader, SampleSettings, fit_sample, read_images
from fine_tune.index import Corpus, CountRule, Index, SampleError, open_index
from fine_tune.latents import Coverage, LatentCache, open_latents
from fine_tune.metrics import read_metrics
from fine_tune.objective import compute_loss, encode, make_generators
from fine_tune.presets import Config, override
from fine_tune.state import TrainState, build_state
from fine_tune.tiny import TOKENIZER_DIR, VAE_DIR
from fine_tune.tokens import Tokenizer
from fine_tune.train import make_loader, train
from fine_tune.vae import FrozenVAE
from pipelines.run import encode_latents
from pipelines.storage import Folder
from schemas.latents import Dtype, Latents


@pytest.fixture(scope="module")
def exact(photo_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs with float32 latents at 64 px. Do not change it."""
    return cached(photo_corpus, tmp_path_factory.mktemp("exact") / "corpus", "float32")


@pytest.fixture(scope="module")
def rounded(photo_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in bfloat16."""
    return cached(photo_corpus, tmp_path_factory.mktemp("rounded") / "corpus", "bfloat16")


def cached(source: Path, target: Path, dtype: Dtype) -> Path:
    shutil.copytree(source, target)
    encode_latents(Folder(str(target)), Latents(vae="tiny", sides=(64,), dtype=dtype), workers=0)
    return target


@pytest.fixture(scope="module")
def vae() -> FrozenVAE:
    return FrozenVAE.from_pretrained(VAE_DIR)


def open_loader(state: TrainState) -> Loader:
    data = state.config.data
    corpus = Corpus(data.corpus)
    rule = CountRule(state.tokenizer, data.max_side, data.budget)
    index = open_index(corpus, "train", rule)
    return make_loader(corpus, index, state, open_latents(corpus, index, state.vae, rule.sides) if data.latents else [])


def batches(state: TrainState, number: int) -> list[Batch]:
    return list(islice(open_loader(state).batches(0), number))


def losses(run: str) -> list[float]:
    return [line["loss"] for line in read_metrics(Path(run) / "metrics.jsonl")]


def without_pixels(corpus: Path, path: Path) -> Path:
    """A copy whose images are all destroyed, but for edit masks."""
    shutil.copytree(corpus, path)
    for table in (path / "meta/samples").glob("*.parquet"):
        for row in pq.read_table(table).to_pylist():
            with (path / row["shard"]).open("r+b") as tar:
                for member in row["members"]:
                    if member["name"].startswith(("input_", "output.")):
                        tar.seek(member["offset"])
                        tar.write(b"\0" * member["size"])
    return path


# What is learned.


def test_a_run_learns_what_it_learns_without_a_cache(
    small_config: Callable[..., Config], exact: Path, tmp_path: Path
) -> None:
    """On shards without any image left, so that none can have been decoded; conditions are dropped as before."""
    blind = without_pixels(exact, tmp_path / "blind")
    shared = ("steps=3", "packs_per_step=2", "drop_all=0.2", "drop_text=0.1", "drop_images=0.2")
    without = small_config(*shared, "latents=false", f"folder={tmp_path / 'without'}")
    with_cache = small_config(*shared, f"corpus={blind}", f"folder={tmp_path / 'with'}")
    for config in (without, with_cache):
        train(config)
    ours, expected = losses(with_cache.run.folder), losses(without.run.folder)
    assert ours[0] == pytest.approx(expected[0], rel=1e-6)
    assert ours == pytest.approx(expected, rel=1e-5)  # Adam's first steps make more of a rounding error
    assert not list((tmp_path / "with").glob("skipped*"))


def pack_losses(state: TrainState, packs: list[Batch]) -> list[float]:
    """Weighted losses before any step."""
    found = []
    with torch.no_grad():
        for batch in packs:
            generators = make_generators(state, batch)
            loss, _ = compute_loss(state, batch, encode(state, batch, generators), generators)
            found.append(float(loss.loss))
    return found


@pytest.mark.parametrize("weights", ["latent", "mask"])
def test_latents_and_loss_weights_are_those_of_the_images(
    small_config: Callable[..., Config], exact: Path, rounded: Path, weights: str
) -> None:
    """What is shown, the targets, where an edit weighs more, and the losses of packs, exactly and in bfloat16."""
    state = build_state(small_config(f"corpus={exact}", f"weight_mode={weights}"))
    torch.nn.init.normal_(state.model.proj_out.weight, generator=torch.Generator().manual_seed(0))
    stored = batches(state, 6)
    state.config = override(state.config, [f"corpus={rounded}"])
    half = batches(state, 6)
    state.config = override(state.config, ["latents=false"])
    plain = batches(state, 6)
    assert all(e.encoded for b in stored for e in b.examples) and not any(e.encoded for b in plain for e in b.examples)
    weighted = 0
    for ours, theirs in zip(stored, plain, strict=True):
        assert [str(example.edit_mask) for example in ours.examples] == [str(e.edit_mask) for e in theirs.examples]
        a, b = (encode(state, batch, make_generators(state, batch)) for batch in (ours, theirs))
        for x, y in zip([*a.shown, *a.targets], [*b.shown, *b.targets], strict=True):
            assert torch.allclose(x, y, atol=1e-5)
        for weight, expected in zip(a.weights, b.weights, strict=True):
            assert (weight is None) == (expected is None)
            if weight is not None and expected is not None:
                differs = (weight - expected).abs() > 1e-4 * expected
                assert differs.float().mean() < 0.01  # at the threshold rounding decides
                weighted += 1
    assert weighted > 0
    expected_losses = pack_losses(state, plain)
    assert pack_losses(state, stored) == pytest.approx(expected_losses, rel=1e-6)
    assert pack_losses(state, half) == pytest.approx(expected_losses, rel=2**-7)
    assert pack_losses(state, half) != expected_losses


def test_a_pack_may_mix_cached_latents_and_images(
    small_config: Callable[..., Config], exact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One shard has no latents: the log and data.json say so, and the losses stay the same."""
    partial = changed(
        exact, tmp_path / "partial", lambda manifest: manifest["latents"][0]["shards"].pop("text_to_image-000000")
    )
    config = small_config(f"corpus={partial}", "steps=1")
    with caplog.at_level(logging.INFO):
        train(config)
    (line,) = [message for message in caplog.messages if message.startswith("latents at")]
    assert "21 of 24 samples cached in latents/" in line
    assert "3 are encoded as they come: their shards have no latents" in line
    (report,) = json.loads((Path(config.run.folder) / "data.json").read_text())["latents"]
    assert report["encoded"] == {"their shards have no latents": 3}
    assert (report["side"], report["samples"], report["cached"]) == (64, 24, 21)

    state = build_state(config)
    mixed = batches(state, 3)
    assert any(len({example.encoded for example in batch.examples}) == 2 for batch in mixed)
    state.config = override(config, [f"corpus={exact}"])
    assert pack_losses(state, mixed) == pytest.approx(pack_losses(state, batches(state, 3)), rel=1e-6)


def test_a_run_may_go_on_without_its_cache(small_config: Callable[..., Config], exact: Path) -> None:
    train(small_config(f"corpus={exact}", "steps=1"))
    assert train(small_config("steps=2")).name == "step-00000002"


# What is taken and what is refused.


def opened(corpus: Path | str, vae: FrozenVAE, *sides: int) -> list[Coverage]:
    found = Corpus(str(corpus))
    return open_latents(found, small_index(found), vae, sides)


def small_index(corpus: Corpus) -> Index:
    return open_index(corpus, "train", CountRule(Tokenizer.from_pretrained(TOKENIZER_DIR), 64, 320))


def changed(corpus: Path, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(corpus, path)
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_the_reason_for_encoding_is_given(exact: Path, photo_corpus: Path, vae: FrozenVAE, tmp_path: Path) -> None:
    other = AutoencoderKL.from_pretrained(VAE_DIR)
    next(other.encoder.parameters()).data += 0.01
    (fine,), (bare,), (side,), (revision,) = (
        opened(exact, vae, 64),
        opened(photo_corpus, vae, 64),
        opened(exact, vae, 128),
        opened(exact, FrozenVAE(other), 64),
    )
    assert (fine.cached, fine.reasons) == (24, {})
    for coverage, said in ((bare, "no latents"), (side, "latents at 64 px"), (revision, "another VAE or revision")):
        assert coverage.cache is None and coverage.cached == 0
        assert said in str(coverage)


def test_latents_of_a_rebuilt_shard_are_refused(exact: Path, vae: FrozenVAE, tmp_path: Path) -> None:
    def rebuild(manifest: dict[str, Any]) -> None:
        manifest["streams"]["edit"]["shards"][0]["sha256"] = "0" * 64

    (coverage,) = opened(changed(exact, tmp_path / "rebuilt", rebuild), vae, 64)
    assert (coverage.cached, list(coverage.reasons.values())) == (21, [3])
    assert "have changed since the latents were made" in str(coverage)
    assert coverage.cache is not None and "edit-000000" not in coverage.cache.shards


def test_latents_by_another_rule_or_without_their_files_are_refused(
    exact: Path, vae: FrozenVAE, tmp_path: Path
) -> None:
    (other_rule,) = opened(
        changed(exact, tmp_path / "rule", lambda manifest: manifest["latents"][0].update(rule="0")), vae, 64
    )
    assert other_rule.cached == 0 and "another rule" in str(other_rule)
    gone = changed(exact, tmp_path / "gone", lambda manifest: None)
    next(gone.glob("latents/*/edit-000000.safetensors")).unlink()
    (without,) = opened(gone, vae, 64)
    assert without.cached == 21 and "files are missing" in str(without)


def test_the_digest_is_that_of_the_encoder(vae: FrozenVAE, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline/vae"
    module = AutoencoderKL.from_pretrained(VAE_DIR, torch_dtype=torch.float32)
    for parameter in module.decoder.parameters():
        parameter.data.zero_()
    module.save_pretrained(pipeline)
    assert FrozenVAE.from_pretrained(tmp_path / "pipeline", subfolder="vae").digest == vae.digest
    next(module.quant_conv.parameters()).data += 1e-3
    assert FrozenVAE(module).digest != vae.digest
    rescaled = AutoencoderKL.from_pretrained(VAE_DIR)
    rescaled.register_to_config(scaling_factor=0.5)
    assert FrozenVAE(rescaled).digest != vae.digest


# Reading.


def cache_of(corpus: Corpus, vae: FrozenVAE) -> tuple[LatentCache, list[dict[str, Any]]]:
    index = small_index(corpus)
    (coverage,) = open_latents(corpus, index, vae, [64])
    assert coverage.cache is not None
    return coverage.cache, [corpus.row(stream, item) for stream in index.streams for item in range(len(stream))]


def test_an_object_store_gives_the_same_as_a_disk(exact: Path, vae: FrozenVAE, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(exact), f"/{tmp_path.name}", recursive=True)
    try:
        remote, rows = cache_of(Corpus(f"memory://{tmp_path.name}"), vae)
        local, _ = cache_of(Corpus(str(exact)), vae)
        for row in rows:
            a, b = remote.read(row), local.read(row)
            assert a is not None and b is not None
            assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))
            assert [tuple(side // 8 for side in size) for size in a.sizes] == [x.shape[1:] for x in a.tensors]
    finally:
        memory.rm(f"/{tmp_path.name}", recursive=True)


def test_damaged_latents_are_not_trained_on(exact: Path, vae: FrozenVAE, tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    shutil.copytree(exact, path)
    cache, rows = cache_of(Corpus(str(path)), vae)
    row = next(row for row in rows if row["shard"].endswith("edit-000000.tar") and row["index"] == 2)
    with pytest.raises(SampleError, match="other samples"):
        cache.read({**row, "index": 1})
    other = {**row, "members": [{**member, "width": 32} for member in row["members"]]}
    with pytest.raises(SampleError, match="other sizes"):
        cache.read({**other, "edit_source_index": -1})
    file = next(path.glob("latents/*/edit-000000.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SampleError, match="cut short"):
        cache.read(row)


def test_a_sample_that_could_not_be_encoded_is_read_from_its_shard(exact: Path, vae: FrozenVAE, tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    shutil.copytree(exact, path)
    file = next(path.glob("latents/*/edit-000000.parquet"))
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[1].update(offset=-1, shape=[])
    pq.write_table(type(table).from_pylist(rows, table.schema), file)
    cache, samples = cache_of(Corpus(str(path)), vae)
    missing = [row["key"] for row in samples if cache.read(row) is None]
    assert missing == [rows[1]["key"]]


def test_values_are_those_of_the_vae(exact: Path, rounded: Path, vae: FrozenVAE) -> None:
    """Against an encoding in this test; bfloat16 has 8 significant bits."""
    (cache, rows), (half, _) = (cache_of(Corpus(str(path)), vae) for path in (exact, rounded))
    for row in rows[::5]:
        fitted = fit_sample(row, read_images(cache.corpus, row), SampleSettings(max_side=64))
        stored, short = cache.read(row), half.read(row)
        assert stored is not None and short is not None
        for posterior, tensor, rough in zip(vae.encode(fitted.tensors), stored.tensors, short.tensors, strict=True):
            assert torch.allclose(posterior.moments, tensor, atol=1e-5)
            assert list(tensor.shape[1:]) == [side // 8 for side in fitted.sizes.pop(0)]
            assert rough.dtype == torch.bfloat16
            np.testing.assert_allclose(rough.float(), tensor, rtol=2**-8, atol=1e-30)
