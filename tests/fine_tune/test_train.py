"""The training step and the loop around it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from builders.base import Sample
from fine_tune import packing
from fine_tune.checkpoint import NonFiniteError, find_checkpoints
from fine_tune.data import Batch, Loader
from fine_tune.held_out import HeldOut, image_grid, to_image
from fine_tune.index import Corpus, CountRule, open_index
from fine_tune.metrics import read_metrics
from fine_tune.objective import compute_loss, encode, make_generators
from fine_tune.parallel import World
from fine_tune.presets import Config, ConfigError
from fine_tune.sample import Pipeline
from fine_tune.state import TrainState, build_state
from fine_tune.storage import Location
from fine_tune.tokens import to_tensor
from fine_tune.train import OutOfMemoryError, check_records, explain_out_of_memory, make_loader, train, train_step
from pipelines.storage import Folder
from schemas.instructions import placeholder
from tests.corpora import make_samples, write_stream


def open_loader(state: TrainState) -> Loader:
    data = state.config.data
    corpus = Corpus(data.corpus)
    return make_loader(
        corpus, open_index(corpus, "train", CountRule(state.tokenizer, data.max_side, data.budget)), state
    )


def take(state: TrainState, number: int) -> list[Batch]:
    return list(islice(open_loader(state).batches(0), number))


def total_loss(state: TrainState, batches: list[Batch]) -> float:
    """Weighted loss per token over all batches, without dropout of anything."""
    with torch.no_grad():
        total = elements = 0.0
        for batch in batches:
            generators = make_generators(state, batch)
            loss, _ = compute_loss(state, batch, encode(state, batch, generators), generators)
            number = sum(h * w for h, w in batch.pack.target_sizes)
            total += float(loss.loss) * number
            elements += number
    return total / elements


# One step.


def test_it_does_not_matter_how_a_step_is_split_into_packs(small_config: Callable[..., Config]) -> None:
    """Packs differ in size; a mean over each would weigh the samples of small ones more."""
    moments = []
    for parts in ([slice(None)], [slice(0, 1), slice(1, None)]):
        state = build_state(small_config("max_grad_norm=1e9", "budget=640"))
        batch = take(state, 1)[0]
        groups = [batch.examples[part] for part in parts]
        assert len({sum(e.sequence.num_target_tokens for e in group) for group in groups}) == len(parts)
        packs = [packing.pack([example.sequence for example in group]) for group in groups]
        train_step(state, [Batch(0, *pair, skips=[]) for pair in zip(packs, groups, strict=True)])
        moments.append([state.optimizer.state[parameter]["exp_avg"] for parameter in state.trained.values()])
    assert any(moment.abs().max() > 1e-3 for moment in moments[0])
    for one, two in zip(*moments, strict=True):
        assert torch.allclose(one, two, atol=1e-6)


def test_every_parameter_gets_a_gradient_from_text_to_image_alone(small_config: Callable[..., Config]) -> None:
    """Upstream's DDP run stops at the first micro-batch without input images (unused parameters)."""
    state = build_state(small_config("mixture={text_to_image: 1}"))
    batch = take(state, 1)[0]
    assert not any(example.inputs for example in batch.examples)
    generators = make_generators(state, batch)
    compute_loss(state, batch, encode(state, batch, generators), generators)[0].loss.backward()
    assert [name for name, parameter in state.trained.items() if parameter.grad is None] == []


def test_losses_are_reported_per_sample_of_the_step(small_config: Callable[..., Config]) -> None:
    state = build_state(small_config())
    batches = take(state, 3)
    train_step(state, batches)
    report = state.losses.read()
    assert report["samples"] == sum(len(batch.examples) for batch in batches)
    assert set(report["loss_by_task"]) == {example.task for batch in batches for example in batch.examples}
    # The first prediction is 0, so the loss is that of the velocity itself: about the variance of data plus noise.
    assert 0.5 < report["loss_unweighted"] < 4


def test_edits_are_weighted(small_config: Callable[..., Config]) -> None:
    losses = {}
    for mode in ("latent", "mask", "none"):
        state = build_state(small_config(f"weight_mode={mode}", "mixture={edit: 1}", "drop_all=0"))
        train_step(state, take(state, 1))
        report = state.losses.read()
        losses[mode] = report["loss"] / report["loss_unweighted"]
    assert losses["none"] == pytest.approx(1.0)
    assert losses["latent"] > 1.2
    assert losses["mask"] > 1.2


def test_a_weight_that_is_not_finite_is_named_and_stops_the_run(small_config: Callable[..., Config]) -> None:
    state = build_state(small_config())
    with torch.no_grad():
        state.model.proj_out.bias[0] = float("nan")
    before = {name: tensor.detach().clone() for name, tensor in state.trained.items()}
    batches = take(state, 1)
    train_step(state, batches)
    for name, tensor in state.trained.items():
        assert torch.equal(tensor.nan_to_num(7), before[name].nan_to_num(7)), name
    with pytest.raises(NonFiniteError, match=f"step 1: the loss of .*{batches[0].examples[0].key}"):
        check_records(state)


def test_zero_gradients_are_an_error(small_config: Callable[..., Config]) -> None:
    state = build_state(small_config())
    with torch.no_grad():
        state.model.proj_out.weight.zero_()
    for parameter in state.model.parameters():
        parameter.requires_grad_(False)
    state.trained = {"norm.weight": state.model.norm.weight.requires_grad_()}
    state.optimizer = torch.optim.AdamW(state.trained.values(), fused=True)
    train_step(state, take(state, 1))
    with pytest.raises(NonFiniteError, match="every gradient is 0"):
        check_records(state)


def test_out_of_memory_says_what_to_do(small_config: Callable[..., Config]) -> None:
    state = build_state(small_config())
    batches = take(state, 1)
    with pytest.raises(OutOfMemoryError) as caught, explain_out_of_memory(batches):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert str([[len(example.sequence) for example in batches[0].examples]]) in str(caught.value)
    for knob in ("data.budget", "model.gradient_checkpointing=full", "model.adapter=lora"):
        assert knob in str(caught.value)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_an_adapter_starts_as_nothing_and_learns(small_config: Callable[..., Config], adapter: str) -> None:
    plain = build_state(small_config())
    generator = torch.Generator().manual_seed(0)
    state = build_state(small_config(f"adapter={adapter}", "adapter_rank=4", "lr=0.01"))
    with torch.no_grad():  # away from the zero initialisation, where no gradient reaches the blocks
        for model in (plain.model, state.model):
            generator.manual_seed(0)
            model.proj_out.weight.normal_(std=0.1, generator=generator)
    batches = take(state, 2)
    start = total_loss(state, batches)
    assert start == pytest.approx(total_loss(plain, batches), rel=1e-5)
    assert all("lora_" in name for name in state.trained)
    frozen = state.model.layers[0].mlp.down_proj.base_layer.weight.clone()
    for _ in range(5):
        train_step(state, batches)
    check_records(state)
    assert total_loss(state, batches) < start
    assert torch.equal(state.model.layers[0].mlp.down_proj.base_layer.weight, frozen)


def test_bfloat16_with_stochastic_rounding_trains(small_config: Callable[..., Config]) -> None:
    state = build_state(small_config("dtype=bfloat16", "name=adamw_sr", "lr=0.003"))
    batches = take(state, 2)
    start = total_loss(state, batches)
    for _ in range(8):
        train_step(state, batches)
    check_records(state)
    assert total_loss(state, batches) < 0.95 * start


# The loop.


def test_a_run_leaves_what_it_promises(small_config: Callable[..., Config]) -> None:
    config = small_config(
        *("steps=5", "log_every=2", "eval_every=4", "sample_every=4", "save_every=2", "keep=2", "sample_steps=2"),
        *("held_out_samples=6", "sample_images=2", "tensorboard=true"),
    )
    run = Path(config.run.folder)
    assert train(config) == find_checkpoints(run)[-1] == Location.of(run / "checkpoints" / "step-00000005")
    # The last step is saved though 5 is no multiple of 2; upstream saves nothing then.
    assert [path.name for path in find_checkpoints(run)] == ["step-00000004", "step-00000005"]
    lines = read_metrics(run / "metrics.jsonl")
    assert [(line["step"], line["kind"]) for line in lines] == [
        *((0, "held_out"), (2, "train"), (4, "train"), (4, "held_out"), (5, "train"), (5, "held_out"))
    ]
    assert lines[1]["tokens_per_second"] > 0 and 0 <= lines[1]["data_wait"] < 1
    assert set(lines[0]["loss_unweighted_by_task"]) >= {"edit", "text_to_image", "subject"}
    assert sorted(path.name for path in (run / "samples").iterdir()) == [
        *("step-00000000.png", "step-00000004.png", "step-00000005.png")
    ]
    assert (run / "loss.png").is_file() and list((run / "tensorboard").iterdir())
    mixture = json.loads((run / "data.json").read_text())["mixture"]
    assert mixture["text_to_image"]["realised"] == pytest.approx(0.5, abs=0.01)
    assert Config.from_dict(json.loads((run / "config.json").read_text())) == config


def test_held_out_loss_is_the_same_whenever_it_is_measured(small_config: Callable[..., Config], tmp_path: Path) -> None:
    state = build_state(small_config("held_out_samples=6"))
    corpus = Corpus(state.config.data.corpus)
    rule = CountRule(state.tokenizer, state.config.data.max_side, state.config.data.budget)
    held_out = HeldOut.open(corpus, rule, state, tmp_path)
    assert held_out is not None and len({example.key for example in held_out.examples}) == 6
    first = held_out.measure()
    state_of_rng = torch.get_rng_state()
    assert held_out.measure() == first
    assert torch.equal(torch.get_rng_state(), state_of_rng)
    by_t = first["loss_by_t"]["text_to_image"]
    assert [t for t, loss in enumerate(by_t) if loss is not None] == [1, 3, 5, 7, 9]


def test_a_corpus_without_held_out_samples_is_trained_on_all_the_same(
    small_config: Callable[..., Config], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    path = tmp_path / "corpus"
    write_stream(Folder(str(path)), "text_to_image", list(make_samples("text_to_image"))[:4], 4)
    with caplog.at_level(logging.WARNING):
        train(small_config(f"corpus={path}", "held_out_samples=4", "eval_every=1", "steps=1"))
    assert "nothing is measured or drawn on held-out samples" in caplog.text


def test_ranks_that_do_not_divide_the_step_are_refused(small_config: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="does not divide by 2 ranks"):
        train(small_config("packs_per_step=3"), world=World(0, 2))


def test_images_of_a_grid_line_up_on_the_right() -> None:
    red, blue = Image.new("RGB", (10, 10), "red"), Image.new("RGB", (6, 8), "blue")
    grid = image_grid([[red, blue], [blue]])
    assert grid.size == (24, 26)
    assert grid.getpixel((14 + 1, 3)) == grid.getpixel((14 + 1, 14 + 3)) == (0, 0, 255)
    assert grid.getpixel((3, 3)) == (255, 0, 0)
    assert grid.getpixel((3, 17)) == (255, 255, 255)


# Does it learn?


def eight_edits() -> list[Sample]:
    """Six tints, and two of them undone, all for training."""
    tints = list(make_samples("edit"))
    samples = [replace(tint, record=tint.record.model_copy(update={"split": "train"})) for tint in tints]
    for tint in samples[:2]:
        said = {"instruction": f"{placeholder(1)} Take the blue away.", "key": f"{tint.record.key}-undone"}
        before, after = tint.images["input_1.jpg"], tint.images["output.jpg"]
        images = {**tint.images, "input_1.jpg": after, "output.jpg": before}
        samples.append(Sample(tint.record.model_copy(update=said), images))
    return samples


@pytest.mark.slow
def test_a_small_model_learns_eight_edits_by_heart(small_config: Callable[..., Config], tmp_path: Path) -> None:
    """Where the edit is, what it draws is much closer to the target than the input image is.

    Compared after the VAE, whose losses are none of the transformer's.
    """
    path = tmp_path / "corpus"
    write_stream(Folder(str(path)), "edit", eight_edits(), 8)
    config = small_config(
        *(f"corpus={path}", "drop_all=0", "mixture={edit: 1}", "budget=1000", "block=8", "lr=0.008", "steps=350"),
        *("schedule=cosine", "min_lr_ratio=0.05", "warmup_steps=10", "weight_mode=mask"),
    )
    state = build_state(config)
    loader = open_loader(state)
    for batch in islice(loader.batches(0), config.run.steps):
        assert len(batch.examples) == 8
        train_step(state, [batch])
    check_records(state)

    pipeline = Pipeline(state.model.eval(), state.vae, state.tokenizer)
    prompts = {sample.record.key: sample.record.instruction for sample in eight_edits()}
    errors = []
    for example in batch.examples:
        source, target = (through_vae(state, image) for image in (example.inputs[0], example.target))
        height, width = target.shape[1:]
        drawn = pipeline(
            prompts[example.key],
            [to_image(example.inputs[0])],
            height=height,
            width=width,
            num_inference_steps=10,
            guidance_scale=1.0,
            img_guidance_scale=1.0,
            seed=1,
        )
        assert isinstance(drawn, Image.Image) and example.edit_mask is not None
        errors.append([(image - target).abs()[:, example.edit_mask].mean() for image in (to_tensor(drawn), source)])
    drawn_error, source_error = torch.tensor(errors).mean(0)
    assert drawn_error < 0.65 * source_error


def through_vae(state: TrainState, image: torch.Tensor) -> torch.Tensor:
    return state.vae.decode(state.vae.encode(image).mean)
