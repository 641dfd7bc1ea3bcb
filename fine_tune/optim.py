"""The optimizer, its learning rate, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fine_tune.presets import ConfigError, OptimConfig


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Of the update that ends step `step`, counted from 0: linear warm-up, then constant or cosine.

    The first update already has lr / warmup_steps, so that no step is wasted, and update `warmup_steps` all of it.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant" or step < config.warmup_steps:
        return config.lr * warmup
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def build_optimizer(parameters: Iterable[Tensor], config: OptimConfig, seed: int) -> torch.optim.Optimizer:
    """AdamW of some kind. All of them leave everything as it is in a step with `optimizer.found_inf` > 0.

    Only those that work on the host or on 8-bit states wait for the device to know.

    Raises:
        ConfigError: `adamw8bit` without the package that has it, or with weights that are cut over ranks.
    """
    parameters = list(parameters)
    betas = (config.beta1, config.beta2)
    shared: dict[str, Any] = {"lr": config.lr, "betas": betas, "eps": config.eps, "weight_decay": config.weight_decay}
    if config.name == "adamw8bit" or config.offload:
        _refuse_shards(parameters)
    if config.offload:
        return OffloadedAdamW(parameters, **shared)
    if config.name == "adamw8bit":
        from fine_tune.lowbit import build_adamw_8bit

        return build_adamw_8bit(parameters, seed=seed, **shared)
    if config.name == "adamw_sr":
        return StochasticAdamW(parameters, seed=seed, **shared)
    return torch.optim.AdamW(parameters, fused=True, **shared)


def _refuse_shards(parameters: Iterable[Tensor]) -> None:
    from torch.distributed.tensor import DTensor

    if any(isinstance(parameter, DTensor) for parameter in parameters):
        raise ConfigError(
            "optim.name=adamw8bit and optim.offload=true are for weights on one device, and several ranks have cut "
            "them: use optim.name=adamw, whose states are cut as well"
        )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Of all groups, without a host sync. 8-bit AdamW wants it changed in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimizer allocate its state, by a step that it is told to leave out."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.found_inf = torch.ones((), device=parameters[0].device)  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.found_inf = None  # type: ignore[attr-defined]
    optimizer.zero_grad(set_to_none=True)


class _Float32AdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) with states in float32 whatever the weights are.

    Attributes:
        found_inf: float32 scalar; a step with a positive one changes nothing (as in `torch.optim.AdamW(fused=True)`).
        on_host: the states are in host memory.
    """

    found_inf: Tensor | None = None
    on_host = False

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Unlike the base class, keeps the states in float32 instead of casting them to the dtype of the weights."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, saved in state_dict["state"].items():
            device = "cpu" if self.on_host else parameters[index].device
            self.state[parameters[index]] = {
                name: value.to(device, copy=True) if isinstance(value, Tensor) else value
                for name, value in saved.items()
            }


class OffloadedAdamW(_Float32AdamW):
    """AdamW on the host, where the float32 weights and both moments stay; the device has weights and gradients only.

    12 bytes of host memory per weight. The weights on the device may be bfloat16: they are rounded copies, so no update
    is lost. (torchao's `CPUOffloadOptimizer` takes the gradients during the backward pass, before they are clipped.)
    """

    on_host = True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("OffloadedAdamW takes no closure")
        is_skipped = self.found_inf is not None and self.found_inf.item() > 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, is_skipped)

    def _update(self, parameter: Tensor, group: dict[str, Any], is_skipped: bool) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["weight"] = parameter.detach().to("cpu", torch.float32, copy=True)
            state["exp_avg"] = torch.zeros_like(state["weight"])
            state["exp_avg_sq"] = torch.zeros_like(state["weight"])
        if is_skipped:
            return
        beta1, beta2 = group["betas"]
        adamw(
            [state["weight"]],
            [parameter.grad.to("cpu", torch.float32)],  # type: ignore[union-attr]
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )
        parameter.copy_(state["weight"])


class StochasticAdamW(_Float32AdamW):
    """AdamW on bfloat16 weights, rounded stochastically.

    At a fine-tuning rate an update is mostly smaller than half the distance to the next bfloat16, and rounding to the
    nearest loses it. Rounding up with the probability of the remainder keeps the expected value.
    """

    def __init__(self, params: Iterable[Tensor], *, seed: int = 0, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("StochasticAdamW takes no closure")
        for group in self.param_groups:
            for position, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._update(parameter, group, position)

    def _update(self, parameter: Tensor, group: dict[str, Any], position: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["calls"] = 0
        keep = torch.zeros((), dtype=torch.bool, device=parameter.device)
        if self.found_inf is not None:
            keep = self.found_inf > 0
        beta1, beta2 = group["betas"]
        gradient = parameter.grad.float()  # type: ignore[union-attr]
        step = state["step"] + 1
        mean = torch.lerp(state["exp_avg"], gradient, 1 - beta1)
        square = torch.lerp(state["exp_avg_sq"], gradient.square(), 1 - beta2)
        denominator = (square / (1 - beta2**step)).sqrt() + group["eps"]
        weight = parameter.float() * (1 - group["lr"] * group["weight_decay"])
        weight = weight - group["lr"] / (1 - beta1**step) * mean / denominator
        state["calls"] += 1
        seed = (self.seed * 0x9E3779B97F4A7C15 + state["calls"] * 0xBF58476D1CE4E5B9 + position) % (1 << 63)
        generator = torch.Generator(parameter.device).manual_seed(seed)
        parameter.copy_(torch.where(keep, parameter, stochastic_round(weight, generator)))
        for name, new in (("step", step), ("exp_avg", mean), ("exp_avg_sq", square)):
            state[name].copy_(torch.where(keep, state[name], new))


def stochastic_round(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16, one of the two neighbours with an expected value of `values`.

    A bfloat16 is the upper half of a float32, so it is enough to add noise to the lower half and cut it off.
    """
    noise = torch.randint(1 << 16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    return ((values.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


class WeightAverage:
    """Exponential moving average of the trained weights, in float32, under their own names.

    Attributes:
        shadow: the averages by parameter name.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._parameters = dict(parameters)
        self.shadow = {name: tensor.detach().float().clone() for name, tensor in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After update number `step`, counted from 0. Short at first: decay (1 + step) / (10 + step)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [self._parameters[name].float() for name in self.shadow]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside of this context."""
        trained = {name: self._parameters[name].detach().clone() for name in self.shadow}
        self._set(self.shadow)
        try:
            yield
        finally:
            self._set(trained)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._parameters[name].copy_(value)
