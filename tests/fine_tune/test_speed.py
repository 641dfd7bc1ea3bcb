"""What makes a step fast must not change what it computes, nor make the host wait."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fine_tune import packing
from fine_tune.attention import prepare
from fine_tune.data import Batch, Loader
from fine_tune.held_out import HeldOut
from fine_tune.index import Corpus, CountRule, open_index
from fine_tune.model import Checkpointing
from fine_tune.objective import Latents, compute_loss, encode, make_generators
from fine_tune.presets import Config, ConfigError
from fine_tune.state import TrainState, build_state
from fine_tune.train import check_records, make_loader, train_step

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def open_loader(state: TrainState) -> Loader:
    corpus, data = Corpus(state.config.data.corpus), state.config.data
    rule = CountRule(state.tokenizer, data.max_side, data.budget, draws=state.config.flow.draws)
    return make_loader(corpus, open_index(corpus, "train", rule), state)


def take(state: TrainState, number: int) -> list[Batch]:
    return list(islice(open_loader(state).batches(0), number))


def separate(batch: Batch, latents: Latents) -> tuple[Batch, Latents]:
    """Every draw with a condition of its own."""
    examples = batch.per_draw([replace(e, sequence=replace(e.sequence, draws=1)) for e in batch.examples])
    shown = iter(latents.shown)
    groups = batch.per_draw([[next(shown) for _ in example.shown] for example in batch.examples])
    return (
        Batch(batch.number, packing.pack([e.sequence for e in examples]), examples, []),
        Latents(
            [x for group in groups for x in group], batch.per_draw(latents.targets), batch.per_draw(latents.weights)
        ),
    )


def gradients(
    state: TrainState, batch: Batch, latents: Latents, generators: list[torch.Generator]
) -> dict[str, Tensor]:
    compute_loss(state, batch, latents, generators)[0].loss.backward()
    found = {name: p.grad.clone() for name, p in state.trained.items() if p.grad is not None}
    state.optimizer.zero_grad()
    return found


def leave_zero(state: TrainState) -> None:
    """Away from the zero initialisation, where no gradient reaches the blocks."""
    with torch.no_grad():
        values = torch.randn(state.model.proj_out.weight.shape, generator=torch.Generator().manual_seed(0))
        state.model.proj_out.weight.copy_(0.1 * values)


def test_draws_share_their_condition_and_nothing_else(small_config: Callable[..., Config]) -> None:
    state = build_state(small_config("flow.draws=3", "budget=900"))
    leave_zero(state)
    batch = take(state, 1)[0]
    latents = encode(state, batch, make_generators(state, batch))
    shared = gradients(state, batch, latents, make_generators(state, batch))
    apart, copied = separate(batch, latents)
    assert batch.pack.num_tokens <= 900 and batch.pack.num_tokens < apart.pack.num_tokens
    assert len(batch.pack.target_sizes) == len(apart.examples) == 3 * len(batch.examples)
    alone = gradients(state, apart, copied, batch.per_draw(make_generators(state, batch)))
    for name, gradient in shared.items():
        assert (gradient - alone[name]).norm() <= 1e-4 * alone[name].norm(), name
    assert shared["layers.0.self_attn.to_k.weight"].norm() > 0


def test_draws_differ_and_are_all_reported(small_config: Callable[..., Config]) -> None:
    state = build_state(small_config("flow.draws=2", "budget=600"))
    batch = take(state, 1)[0]
    generators = make_generators(state, batch)
    loss, timesteps = compute_loss(state, batch, encode(state, batch, generators), generators)
    assert len(loss.weighted) == len(timesteps) == 2 * len(batch.examples)
    assert len(set(timesteps.tolist())) == len(timesteps)
    train_step(state, [batch])
    assert state.losses.read()["samples"] == len(timesteps)
    check_records(state)


def test_held_out_samples_are_drawn_once(small_config: Callable[..., Config], tmp_path: Path) -> None:
    state = build_state(small_config("flow.draws=2", "budget=600", "held_out_samples=2"))
    corpus, data = Corpus(state.config.data.corpus), state.config.data
    held_out = HeldOut.open(corpus, CountRule(state.tokenizer, data.max_side, data.budget, draws=2), state, tmp_path)
    assert held_out is not None
    assert {example.sequence.draws for example in held_out.examples} == {1}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_blocks_with_flex_attention_compile_without_a_graph_break(small_config: Callable[..., Config]) -> None:
    """Forward only: FlexAttention has no backward on a CPU."""
    state = build_state(small_config("attention_backend=flex"))
    batch = take(state, 1)[0]
    mask = batch.pack.mask
    rope = state.model.rope(batch.pack.position_ids, batch.pack.use_long_rope)
    hidden = torch.randn(len(mask.lo), state.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    block = state.model.layers[0]
    with torch.no_grad():
        expected = block(hidden, rope, prepare(mask, "sdpa"))
        compiled = torch.compile(block, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(hidden, rope, prepare(mask, "flex")), expected, atol=1e-5, rtol=1e-5)


def test_a_backend_with_other_code_for_every_pack_is_not_compiled(small_config: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="on a CPU needs model"):
        build_state(small_config("compile=true"))
    build_state(small_config("compile=true", "attention_backend=sdpa"))


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("kind", [(), ("dtype=bfloat16", "name=adamw_sr"), ("adapter=lora", "dtype=bfloat16")])
def test_a_step_never_waits_for_the_gpu(small_config: Callable[..., Config], kind: tuple[str, ...]) -> None:
    state = build_state(small_config("device=cuda", "ema_decay=0.9", *kind))
    batches = take(state, 3)
    assert all(image.is_pinned() for batch in batches for e in batch.examples for image in (*e.inputs, e.target))
    train_step(state, batches[:1])  # compiles, and allocates states
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(state, batches[1:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_records(state)


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_cuda_gradients_do_not_depend_on_what_is_recomputed_or_compiled(
    small_config: Callable[..., Config], checkpointing: Checkpointing, compiled: str
) -> None:
    found = []
    for assignments in ((), (f"gradient_checkpointing={checkpointing}", f"compile={compiled}")):
        state = build_state(small_config("device=cuda", *assignments))
        leave_zero(state)
        batch = take(state, 1)[0].to(state.device)
        generators = make_generators(state, batch)
        found.append(gradients(state, batch, encode(state, batch, generators), generators))
    for name, expected in found[0].items():
        assert (found[1][name] - expected).norm() <= 2e-2 * expected.norm(), name
