"""Learning rate, optimizers and the moving average."""

from __future__ import annotations

import copy
import importlib.util
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from fine_tune.lowbit import plain_tensors, use_fp8
from fine_tune.optim import (
    StochasticAdamW,
    WeightAverage,
    build_optimizer,
    learning_rate,
    make_moments,
    set_learning_rate,
    stochastic_round,
)
from fine_tune.presets import Config, ConfigError, ModelConfig, OptimConfig

has_torchao = importlib.util.find_spec("torchao") is not None


def test_warm_up_counts_optimizer_updates() -> None:
    """Upstream's scheduler is stepped for every rank and accumulation step, and `constant` ignores the warm-up."""
    config = OptimConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(config, step, 100) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert learning_rate(OptimConfig(lr=1.0), 0, 100) == 1.0


def test_cosine_ends_at_the_floor_and_stays_there() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=10, schedule="cosine", min_lr_ratio=0.1)
    rates = [learning_rate(config, step, 110) for step in range(120)]
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == rates[119] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_stochastic_rounding_is_unbiased_and_takes_a_neighbour() -> None:
    generator = torch.Generator().manual_seed(0)
    low, high = torch.tensor(1.0), torch.tensor(1.0 + 2**-7)  # neighbouring bfloat16 numbers
    for share in (0.1, 0.5, 0.9):
        values = torch.full((40_000,), float(low + share * (high - low)))
        rounded = stochastic_round(values, generator).float()
        assert set(rounded.tolist()) == {float(low), float(high)}
        # Four standard deviations of a binomial share.
        assert (rounded == high).float().mean().item() == pytest.approx(share, abs=4 * 0.5 / 200)


def test_stochastic_rounding_keeps_what_is_exact() -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-120, float("inf"), float("-inf")])
    assert torch.equal(stochastic_round(exact, torch.Generator().manual_seed(0)).float(), exact)
    assert stochastic_round(torch.tensor([float("nan")]), torch.Generator()).isnan().all()


def run_updates(weights: torch.Tensor, config: OptimConfig, steps: int) -> torch.Tensor:
    """Mean change of the weights after steps with a constant gradient of 1, as a share of lr * steps."""
    parameter = nn.Parameter(weights.clone())
    optimizer = build_optimizer([parameter], config, seed=0)
    for _ in range(steps):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return (weights.float() - parameter.detach().float()).mean() / (config.lr * steps)


def test_bfloat16_weights_move_as_far_as_float32_ones_only_with_stochastic_rounding() -> None:
    """With bf16 weights and plain AdamW, as upstream trains, most updates of 2e-5 are lost to rounding."""
    weights = torch.empty(20_000).normal_(std=0.02, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain = OptimConfig(lr=2e-5)
    frozen = run_updates(weights, plain, 20)
    rounded = run_updates(weights, OptimConfig(name="adamw_sr", lr=2e-5), 20)
    exact = run_updates(weights.float(), plain, 20)
    assert exact == pytest.approx(1.0, abs=0.01)
    assert rounded == pytest.approx(1.0, abs=0.05)
    assert frozen < 0.5


def test_stochastic_adamw_is_adamw_but_for_the_rounding() -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(2000, generator=generator).bfloat16()
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.float())
    options = {"lr": 1e-2, "weight_decay": 0.1}
    optimizers = [StochasticAdamW([ours], **options), torch.optim.AdamW([theirs], **options)]
    for _ in range(10):
        gradient = torch.randn(2000, generator=generator).bfloat16()
        ours.grad, theirs.grad = gradient, gradient.float()
        for optimizer in optimizers:
            optimizer.step()
    assert (ours.float() - theirs).abs().mean() < 0.01
    assert torch.allclose(optimizers[0].state[ours]["exp_avg_sq"], optimizers[1].state[theirs]["exp_avg_sq"])


@pytest.mark.parametrize("kind", [{"name": "adamw"}, {"name": "adamw_sr"}, {"offload": True}])
def test_a_step_marked_as_not_finite_changes_nothing(kind: dict[str, Any]) -> None:
    parameter = nn.Parameter(torch.ones(8, dtype=torch.float32 if kind == {"name": "adamw"} else torch.bfloat16))
    optimizer = build_optimizer([parameter], OptimConfig(lr=0.1, **kind), seed=0)

    def step(gradient: float, found_inf: float) -> None:
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.found_inf = torch.tensor(found_inf)  # type: ignore[attr-defined]
        optimizer.step()

    step(1.0, 0.0)
    weights, state = parameter.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"][0])
    step(float("nan"), 1.0)
    assert torch.equal(parameter, weights)
    for key in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state_dict()["state"][0][key], state[key])
    step(1.0, 0.0)
    assert (parameter < weights).all()


def test_stochastic_adamw_resumes_bit_for_bit_with_float32_moments() -> None:
    """`Optimizer.load_state_dict` would cast the moments to bfloat16."""

    def make() -> tuple[nn.Parameter, StochasticAdamW]:
        parameter = nn.Parameter(torch.linspace(-1, 1, 64).bfloat16())
        return parameter, StochasticAdamW([parameter], lr=1e-3, seed=3)

    def step(parameter: nn.Parameter, optimizer: StochasticAdamW, number: int) -> None:
        parameter.grad = torch.linspace(-1, number, 64).bfloat16()
        optimizer.step()

    whole, first = make(), make()
    for number in range(6):
        step(*whole, number)
    for number in range(3):
        step(*first, number)
    second = make()
    second[0].data.copy_(first[0].data)
    second[1].load_state_dict(first[1].state_dict())
    assert second[1].state[second[0]]["exp_avg"].dtype == torch.float32
    for number in range(3, 6):
        step(*second, number)
    assert torch.equal(second[0], whole[0])


def test_the_average_follows_the_weights_under_their_own_names() -> None:
    """Upstream's EMA looks up names with `module.` in front and dies (train.py)."""
    layer = nn.Linear(2, 2, bias=False)
    average = WeightAverage(dict(layer.named_parameters()), decay=0.5)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1.0)
    average.update(step=0)  # decay 0.1
    assert list(average.shadow) == ["weight"]
    assert torch.allclose(average.shadow["weight"], before + 0.9)
    average.update(step=1000)  # decay 0.5
    assert torch.allclose(average.shadow["weight"], before + 0.95)
    trained = layer.weight.detach().clone()
    with average.applied():
        assert torch.equal(layer.weight, average.shadow["weight"])
    assert torch.equal(layer.weight, trained)


def test_offloaded_adamw_is_adamw_in_float32_on_bfloat16_weights() -> None:
    """Weights of the device are rounded copies: no update is lost, however small."""
    generator = torch.Generator().manual_seed(2)
    start = torch.empty(3000).normal_(std=0.02, generator=generator).bfloat16()
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.float())
    config = OptimConfig(lr=2e-5, weight_decay=0.1)
    optimizer = build_optimizer([ours], OptimConfig(lr=2e-5, weight_decay=0.1, offload=True), seed=0)
    reference = build_optimizer([theirs], config, seed=0)
    make_moments(optimizer)  # as resuming does
    for step in range(20):
        gradient = torch.randn(3000, generator=generator).bfloat16()
        ours.grad, theirs.grad = gradient, gradient.float()
        for each in (optimizer, reference):
            set_learning_rate(each, 1e-5 * (1 + step % 2))
            each.step()
    assert torch.equal(optimizer.state[ours]["weight"], theirs)
    assert torch.equal(ours, theirs.bfloat16())
    assert (ours.float() != start).float().mean() < 0.9 < (theirs != start.float()).float().mean()

    again = nn.Parameter(ours.detach().clone())
    resumed = build_optimizer([again], OptimConfig(lr=2e-5, offload=True), seed=0)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.state[again]["weight"].dtype == resumed.state[again]["exp_avg"].dtype == torch.float32


def test_optimizers_that_do_not_go_together_with_the_weights_are_refused() -> None:
    half = ModelConfig(dtype="bfloat16")
    for allowed in (OptimConfig(offload=True), OptimConfig(name="adamw8bit"), OptimConfig(name="adamw_sr")):
        Config(model=half, optim=allowed)
    with pytest.raises(ConfigError, match="adamw_sr or adamw8bit, or"):
        Config(model=half)
    with pytest.raises(ConfigError, match="keeps float32 states: use"):
        Config(optim=OptimConfig(name="adamw8bit", offload=True))


@pytest.mark.skipif(has_torchao, reason="torchao is installed")
def test_what_needs_torchao_says_so() -> None:
    with pytest.raises(ConfigError, match=r"adamw8bit: torchao is not installed: pip install 'x2i\[lowbit\]'"):
        build_optimizer([nn.Parameter(torch.ones(2))], OptimConfig(name="adamw8bit"), seed=0)
    with pytest.raises(ConfigError, match=r"fp8=true: torchao is not installed"):
        use_fp8(nn.Linear(2, 2), torch.device("cpu"))


@pytest.mark.skipif(not has_torchao, reason="needs torchao")
def test_8_bit_adamw_is_seeded_resumes_and_leaves_out_broken_steps() -> None:
    def make(weights: torch.Tensor) -> tuple[nn.Parameter, Any]:
        parameter = nn.Parameter(weights.clone())
        return parameter, build_optimizer([parameter], OptimConfig(name="adamw8bit", lr=2e-5), seed=3)

    def step(parameter: nn.Parameter, optimizer: Any, found_inf: float = 0.0) -> None:
        parameter.grad = torch.ones_like(parameter)
        optimizer.found_inf = torch.tensor(found_inf)
        set_learning_rate(optimizer, 2e-5)
        optimizer.step()

    start = torch.empty(64, 256).normal_(std=0.02, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole, first = make(start), make(start)
    for _ in range(6):
        step(*whole)
    for _ in range(3):
        step(*first)
        step(*first, found_inf=1.0)
    second = make(first[0].detach())
    make_moments(second[1])
    for name, value in first[1].state[first[0]].items():
        target = plain_tensors(name, second[1].state[second[0]][name])
        for key, tensor in plain_tensors(name, value).items():
            target[key].copy_(tensor)
    for _ in range(3):
        step(*second)
    assert torch.equal(whole[0], second[0])
    moved = (start.float() - whole[0].float()).mean() / (6 * 2e-5)
    assert moved.item() == pytest.approx(1.0, abs=0.05)
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        use_fp8(nn.Linear(2, 2), torch.device("cpu"))
