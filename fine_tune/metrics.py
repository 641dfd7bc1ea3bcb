"""What a run reports: exact FLOPs, losses per task and timestep, and the files they go to."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fine_tune.flow import timestep_bin
from fine_tune.model import OmniGenConfig

if TYPE_CHECKING:
    from fine_tune.data import Batch
    from fine_tune.state import TrainState

T_BINS = 10

# Dense bfloat16 TFLOP/s from the makers' data sheets, by a part of the device name.
PEAK_TFLOPS = {"H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "B200": 2250.0}


def block_parameters(config: OmniGenConfig) -> int:
    """Weights of all linear layers in the blocks: every token is multiplied by every one of them."""
    size, kv_size = config.hidden_size, config.num_key_value_heads * config.head_dim
    attention = 2 * size * size + 2 * size * kv_size
    return config.num_layers * (attention + 3 * size * config.intermediate_size)


def training_flops(config: OmniGenConfig, tokens: int, attended_pairs: int, adapter_parameters: int = 0) -> int:
    """Floating-point operations that one forward and backward pass must do; no recomputation, no padding.

    A weight costs 2 per token in the forward pass, 2 for the gradient of its input and 2 for its own; an attended
    (query, key) pair costs 4 · hidden_size per layer in the forward pass and twice that in the backward pass. Pairs
    are those the mask lets through, not T² (which would count edits a third too high and packs several times).
    Embedding, time, patch and output layers are left out (below 0.1 % for OmniGen-v1).

    Args:
        tokens: rows without padding.
        attended_pairs: (query, key) pairs of all rows, `Pack.attended_pairs`.
        adapter_parameters: of a LoRA on frozen weights; 0 when everything is trained.
    """
    attention = 12 * config.num_layers * config.hidden_size * attended_pairs
    if adapter_parameters:
        return (4 * block_parameters(config) + 6 * adapter_parameters) * tokens + attention
    return 6 * block_parameters(config) * tokens + attention


def peak_flops(device: torch.device, configured_tflops: float = 0.0) -> float | None:
    """Operations per second that the device can do at best, or None if unknown."""
    if configured_tflops:
        return configured_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), None)


class Meter:
    """Speed since the last reading: tokens and steps per second, share of time spent waiting for data, MFU, memory."""

    def __init__(self, state: TrainState) -> None:
        self.state = state
        self.peak = peak_flops(state.device, state.config.run.peak_tflops)
        self._reset()

    def start_wait(self) -> None:
        self._wait_began = time.perf_counter()

    def stop_wait(self, batches: list[Batch]) -> None:
        self._waited += time.perf_counter() - self._wait_began
        self._steps += 1
        for batch in batches:
            self._tokens += batch.pack.num_tokens
            self._flops += training_flops(
                self.state.model.config,
                batch.pack.num_tokens,
                batch.pack.attended_pairs,
                self.state.adapter_parameters,
            )

    def read(self) -> dict[str, Any]:
        """Per rank; call it right after the host has waited for the device."""
        seconds = time.perf_counter() - self._began
        report = {
            "tokens_per_second": self._tokens / seconds,
            "steps_per_second": self._steps / seconds,
            "data_wait": self._waited / seconds,
            "tflops": self._flops / seconds / 1e12,
            "lr": float(self.state.optimizer.param_groups[0]["lr"]),
        }
        if self.peak:
            report["mfu"] = self._flops / seconds / self.peak
        if self.state.device.type == "cuda":
            report["peak_memory_gb"] = torch.cuda.max_memory_allocated(self.state.device) / 1e9
        self._reset()
        return report

    def _reset(self) -> None:
        self._began, self._waited, self._tokens, self._flops, self._steps = time.perf_counter(), 0.0, 0, 0, 0


class LossTable:
    """Mean loss per task and timestep bin, weighted and unweighted, summed on the device of the losses."""

    def __init__(self, tasks: Sequence[str], device: torch.device | str = "cpu") -> None:
        self.tasks = list(tasks)
        self._sums = torch.zeros(len(self.tasks) * T_BINS, 3, dtype=torch.float64, device=device)

    def add(self, tasks: Sequence[str], timesteps: Tensor, weighted: Tensor, unweighted: Tensor) -> None:
        """Losses of samples, each [B]. Does not wait for the device."""
        device = self._sums.device
        rows = torch.tensor([self.tasks.index(task) * T_BINS for task in tasks]).to(device, non_blocking=True)
        values = torch.stack([weighted, unweighted, torch.ones_like(weighted)], dim=1).double()
        self._sums.index_add_(0, rows + timestep_bin(timesteps, T_BINS), values)

    def read(self, total: Callable[[Tensor], Tensor] = lambda own: own) -> dict[str, Any]:
        """Means since the last call, and start anew: `loss`, `loss_unweighted`, and both by task and by bin.

        Args:
            total: adds up a tensor over ranks, to have the means of what all of them have seen.
        """
        weighted, unweighted, number = total(self._sums.clone()).cpu().view(len(self.tasks), T_BINS, 3).unbind(2)
        self._sums.zero_()
        report: dict[str, Any] = {}
        for name, sums in (("loss", weighted), ("loss_unweighted", unweighted)):
            report[name] = _ratio(sums.sum(), number.sum())
            report[f"{name}_by_task"] = {
                task: _ratio(sums[i].sum(), number[i].sum()) for i, task in enumerate(self.tasks) if number[i].sum()
            }
            report[f"{name}_by_t"] = {
                task: [_ratio(s, n) for s, n in zip(sums[i], number[i], strict=True)]
                for i, task in enumerate(self.tasks)
                if number[i].sum()
            }
        report["samples"] = int(number.sum())
        return report


def _ratio(total: Tensor, number: Tensor) -> float | None:
    return float(total / number) if number else None


class MetricLog:
    """One JSON object per line in `metrics.jsonl`, and the numbers among them to TensorBoard.

    Args:
        folder: of the run.
        first_step: lines of later steps, left by a run that was cut off after its last checkpoint, are dropped.
    """

    def __init__(self, folder: Path, first_step: int, tensorboard: bool) -> None:
        self.file = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(self.file) if line["step"] <= first_step]
        self.file.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Values are numbers, or dicts and lists of them; `kind` is `train` or `held_out`."""
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        if self._writer is not None:
            for name, value in _flatten(kind, values):
                self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, pixels: Tensor) -> None:
        """uint8 [3, H, W], to TensorBoard only."""
        if self._writer is not None:
            self._writer.add_image(name, pixels, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _flatten(prefix: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, dict):
        return [pair for key, part in value.items() for pair in _flatten(f"{prefix}/{key}", part)]
    if isinstance(value, list):
        return [pair for i, part in enumerate(value) for pair in _flatten(f"{prefix}/{i}", part)]
    return [(prefix, float(value))] if isinstance(value, int | float) else []


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """All lines of a `metrics.jsonl`, none if there is no such file."""
    return parse_metrics(file.read_text()) if file.is_file() else []


def parse_metrics(text: str) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last one that was cut off is left out."""
    lines = text.splitlines()
    found = []
    for number, line in enumerate(lines):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            if number + 1 < len(lines):
                raise
    return found
