"""What torchao is for: an optimizer with 8-bit states, and matrix products in fp8. The extra `lowbit` installs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fine_tune.presets import BLOCK_LINEARS, ConfigError

_REMEDY = "torchao is not installed: pip install 'x2i[lowbit]'"


def build_adamw_8bit(parameters: Iterable[Tensor], *, seed: int, **settings: Any) -> torch.optim.Optimizer:
    """torchao's `AdamW8bit`: moments in blocks of 256 codes and a scale; bfloat16 weights are rounded stochastically.

    The noise of the rounding is a function of the seed and the step.

    Raises:
        ConfigError: torchao is not installed.
    """
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(f"optim.name=adamw8bit: {_REMEDY}") from error

    class SeededAdamW8bit(AdamW8bit):
        """See `build_adamw_8bit`. `found_inf` is looked at on the host, because torchao's does not know it."""

        found_inf: Tensor | None = None

        def step(self, closure: Callable[[], float] | None = None) -> None:
            if closure is not None:
                raise ValueError("AdamW8bit takes no closure")
            self._make_states()
            if self.found_inf is not None and self.found_inf.item() > 0:
                return
            first = self.param_groups[0]["params"][0]
            devices = [first.device] if first.is_cuda else []
            with torch.random.fork_rng(devices):
                torch.manual_seed((seed * 0x9E3779B97F4A7C15 + int(self.state[first]["step"])) % (1 << 63))
                super().step()

        def _make_states(self) -> None:
            """As AdamW8bit does in its first step, so that a skipped step has them too."""
            for group in self.param_groups:
                for parameter in group["params"]:
                    state = self.state[parameter]
                    if not state:
                        state["step"] = torch.tensor(0.0)
                        state["exp_avg"] = self._new_buffer(parameter, True)
                        state["exp_avg_sq"] = self._new_buffer(parameter, False)

    return SeededAdamW8bit(parameters, bf16_stochastic_round=True, **settings)


def plain_tensors(name: str, value: Any) -> dict[str, Tensor]:
    """An optimizer state as tensors that a file can hold: of an 8-bit one its codes, scales and table."""
    if hasattr(value, "codes"):
        return {f"{name}.{part}": getattr(value, part) for part in ("codes", "scale", "qmap")}
    return {name: torch.as_tensor(value)}


def adamw_8bit_bytes(parameter: Tensor) -> int:
    """Bytes of both moments of a parameter; small or odd ones are kept in the dtype of the weights."""
    elements, block, table = parameter.numel(), 256, 256 * 4
    if elements < 4096 or elements % block:
        return 2 * elements * parameter.element_size()
    return 2 * (elements + elements // block * 4 + table)


def use_fp8(model: nn.Module, device: torch.device) -> None:
    """Compute the matrix products of the blocks in fp8 (dynamic scales per tensor). An experiment: compare losses.

    Raises:
        ConfigError: torchao is not installed, or the device has no fp8.
    """
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError as error:
        raise ConfigError(f"model.fp8=true: {_REMEDY}") from error
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(f"model.fp8=true needs a CUDA device of capability 8.9 (Ada, Hopper) or newer, not {device}")

    def is_block_linear(module: nn.Module, name: str) -> bool:
        return name.removesuffix(".base_layer").endswith(BLOCK_LINEARS)

    convert_to_float8_training(model.layers, module_filter_fn=is_block_linear)
