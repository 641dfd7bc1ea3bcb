"""Memory: what is planned against what a step really allocates, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fine_tune.data import Batch, Example
from fine_tune.memory import allocated_peak, measure
from fine_tune.packing import Sequence, Size, pack
from fine_tune.planner import Planner, check_memory, largest_pack, parse_memory, typical_pack
from fine_tune.presets import Config, ConfigError, override, preset, tiny
from fine_tune.state import build_state
from fine_tune.train import train, train_step
from pipelines.cli import app
from schemas.vocabulary import TASKS

EDIT = Sequence(np.ones(150, int), [(2, 146)], [(12, 12)], (12, 12))
TEXT = Sequence(np.ones(40, int), [], [], (16, 8))
PACK = [TEXT, EDIT]


def shallow(*assignments: str) -> Config:
    return override(tiny(), ["data.max_side=256", "data.budget=700", "model.architecture.num_layers=2", *assignments])


def real_batch(sequences: list[Sequence], rows: int | None = None) -> Batch:
    def black(size: Size) -> torch.Tensor:
        return torch.zeros(3, 16 * size[0], 16 * size[1])

    examples = [
        Example(
            key=str(number),
            shard="",
            task=TASKS[0],
            seed=number,
            sequence=sequence,
            inputs=[black(size) for size in sequence.input_sizes],
            shown=list(range(len(sequence.input_sizes))),
            target=black(sequence.target_size),
            edit_source_index=-1,
            edit_mask=None,
        )
        for number, sequence in enumerate(sequences)
    ]
    return Batch(0, pack(sequences, rows), examples, [])


def peak_of_two_steps(config: Config, sequences: list[Sequence]) -> int:
    def steps() -> None:
        state = build_state(config)
        batch = real_batch(sequences)
        for _ in range(2):
            train_step(state, [batch] * config.data.packs_per_step)

    return allocated_peak(steps)


@pytest.mark.parametrize(
    "assignments",
    [
        [],
        ["data.packs_per_step=2", "model.gradient_checkpointing=selective", "optim.ema_decay=0.9"],
        ["model.dtype=bfloat16", "optim.name=adamw_sr", "model.gradient_checkpointing=full"],
        ["model.dtype=bfloat16", "model.adapter=lora", "model.attention_backend=sdpa"],
    ],
)
def test_what_is_planned_is_what_is_allocated(assignments: list[str]) -> None:
    config = shallow(*assignments)
    planned = measure(config, PACK, "cpu")
    assert planned.total == pytest.approx(peak_of_two_steps(config, PACK), rel=0.1)
    state = build_state(config)
    assert planned.weights == sum(p.nbytes for p in state.model.parameters())
    assert planned.gradients == sum(p.nbytes for p in state.trained.values())
    assert planned.vae == sum(t.nbytes for t in state.vae.module.state_dict().values())


def test_deep_models_are_extrapolated_exactly() -> None:
    config = shallow("data.packs_per_step=2", "model.architecture.num_layers=7")
    deep = measure(config, PACK, "cpu")
    assert deep.total == pytest.approx(peak_of_two_steps(config, PACK), rel=0.02)


def test_less_is_kept_the_more_is_recomputed() -> None:
    config = shallow("data.packs_per_step=2", "model.architecture.num_layers=4")
    levels = [
        measure(override(config, [f"model.gradient_checkpointing={level}"]), PACK, "cuda", rows=4096).activations
        for level in ("none", "selective", "full")
    ]
    assert levels[0] > 1.2 * levels[1] > 1.2**2 * levels[2]


def test_ranks_share_what_is_sharded_and_not_the_activations() -> None:
    config = shallow("optim.ema_decay=0.9")
    one, eight = (measure(config, PACK, "cuda", ranks) for ranks in (1, 8))
    for part in ("weights", "gradients", "optimizer", "average"):
        assert getattr(eight, part) == pytest.approx(getattr(one, part) / 8, rel=0.01)
    assert eight.gathered > 0 and eight.vae == one.vae and eight.buffers == one.buffers
    lora = measure(shallow("model.adapter=lora", "model.dtype=bfloat16"), PACK, "cuda", 8)
    assert lora.gathered == 0 and lora.weights > 0.4 * one.weights


def test_offload_and_8_bit_states_leave_the_device() -> None:
    base = shallow("model.dtype=bfloat16", "optim.name=adamw_sr")
    number = sum(p.numel() for p in build_state(base).trained.values())
    rounded = measure(base, PACK, "cuda")
    eight = measure(override(base, ["optim.name=adamw8bit"]), PACK, "cuda")
    offloaded = measure(override(base, ["optim.name=adamw", "optim.offload=true"]), PACK, "cuda")
    assert rounded.optimizer == pytest.approx(8 * number, rel=0.01)
    assert eight.optimizer == pytest.approx(2 * number, rel=0.05)
    assert (offloaded.optimizer, offloaded.host) == (0, 12 * number)


def test_proposals_fit_and_say_how_much_more_would() -> None:
    config = shallow("data.packs_per_step=2", "data.budget=4096", "model.adapter=lora")
    settings = ("model.dtype=bfloat16", "model.gradient_checkpointing=selective")
    needed = measure(override(config, settings), PACK, "cuda").total
    planner = Planner(config, PACK, int(needed / 0.92) + 1_000_000)
    found = planner.propose()
    assert [(candidate.settings, candidate.fits) for candidate in found] == [
        ((), False),
        (settings[:1], False),
        (settings, True),
    ]
    budget = found[-1].budget
    assert budget >= config.data.budget
    assert measure(override(config, settings), PACK, "cuda", rows=budget).total <= planner.usable
    assert measure(override(config, settings), PACK, "cuda", rows=budget + 256).total > planner.usable


def test_every_way_is_a_valid_configuration() -> None:
    full, lora = preset("full"), preset("lora")
    for base, ranks, number in ((full, 1, 4), (full, 8, 1), (lora, 1, 1)):
        ways = Planner(base, PACK, 1, ranks=ranks).ways()
        assert len({override(base, way).optim for way in ways}) == len(ways) == number


def test_a_run_that_does_not_fit_is_refused_before_it_starts(small_config: Callable[..., Config]) -> None:
    config = small_config("model.adapter=lora")
    needed = measure(config, typical_pack(config), "cpu").total / 1e9
    refused = override(config, [f"run.memory_gb={needed}"])
    with pytest.raises(ConfigError, match=r"a step takes .* GB .*What fits: model.dtype=bfloat16 .*--plan"):
        train(refused)
    check_memory(override(config, [f"run.memory_gb={needed / 0.9}"]), torch.device("cpu"))


def test_the_corpus_says_how_long_packs_are(small_config: Callable[..., Config]) -> None:
    config = small_config("flow.draws=2")
    sequences = largest_pack(config)
    assert 0.8 * config.data.budget < sum(map(len, sequences)) <= config.data.budget
    assert {sequence.draws for sequence in sequences} == {2}


def test_the_table_is_printed(small_config: Callable[..., Config]) -> None:
    corpus = small_config().data.corpus
    given = ["--memory", "1GB", "--corpus", corpus, "model.adapter=lora", "model.architecture.num_layers=1"]
    shown = CliRunner().invoke(app, ["train", "--plan", *given, "data.max_side=64"])
    assert shown.exit_code == 0, shown.output
    assert "as configured" in shown.output and "model.dtype=bfloat16" in shown.output


def test_wrong_sizes_are_errors() -> None:
    assert (parse_memory("80GB"), parse_memory("1.5 GiB")) == (80 * 10**9, 3 * 2**29)
    with pytest.raises(ConfigError, match="'80' is not a size such as 80GB"):
        parse_memory("80")
    with pytest.raises(ConfigError, match=r"more than data\.budget=100"):
        typical_pack(shallow("data.budget=100"))
    with pytest.raises(ConfigError, match="nothing to plan for"):
        measure(replace(shallow(), model=replace(shallow().model, architecture={})), PACK, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("level", ["none", "selective", "full"])
def test_what_is_planned_is_what_cuda_allocates(level: str) -> None:
    """On a model large enough that workspaces of kernels do not matter."""
    sizes = (
        "{hidden_size: 1536, num_attention_heads: 16, num_key_value_heads: 16, intermediate_size: 4096, num_layers: 8}"
    )
    config = override(tiny(), [f"model.architecture={sizes}", "data.max_side=512", "data.budget=8448"])
    config = override(config, [f"model.gradient_checkpointing={level}", "run.device=cuda"])
    sequences = typical_pack(config)
    planned = measure(config, sequences, "cuda")
    state = build_state(config)
    batch = real_batch(sequences, config.data.budget)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        train_step(state, [batch])
    assert planned.total == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)
