"""Checkpoints that are whole or not there, and the rules for going on from one.

run/checkpoints/step-00000100/
    transformer/   a diffusers OmniGenTransformer2DModel   (or adapter/: a peft adapter)
    average.safetensors   moving average of the trained weights, if kept
    training.pt    optimizer and random state
    about.json     step, position in the data, settings, identity of the data
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fine_tune.adapters import WEIGHTS_NAME, adapter_state, load_adapter, save_adapter
from fine_tune.layouts import DIFFUSERS_STEM, check_state, save_transformer
from schemas.identity import digest_of

if TYPE_CHECKING:
    from fine_tune.state import TrainState

log = logging.getLogger(__name__)

_COMPARED_TENSORS = 16
_REMAINS = ".partial"


class NonFiniteError(RuntimeError):
    """NaN or infinity where a number has to be."""


class ResumeError(RuntimeError):
    """A checkpoint that belongs to another run, or is damaged."""


def find_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if (path / "about.json").is_file())


def save_checkpoint(run: Path, state: TrainState, data: Mapping[str, Any], keep: int) -> Path:
    """Write a checkpoint beside its final name, read it back, then rename it; the oldest beyond `keep` go.

    Args:
        data: position in the data, and its identity as `digest`.

    Raises:
        NonFiniteError: a weight or an optimizer state is not finite; nothing is written.
        OSError: what was read back is not what was written.
    """
    check_finite(state)
    target = run / "checkpoints" / f"step-{state.step:08d}"
    if target in find_checkpoints(run):
        return target
    partial = target.with_name(f".{target.name}{_REMAINS}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write(partial, state, data)
    _verify(partial, state)
    for file in (path for path in partial.rglob("*") if path.is_file()):
        _flush(file)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    _flush(target.parent)
    for old in find_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(folder: Path, state: TrainState, data_digest: str, force: bool = False) -> dict[str, Any]:
    """Put a run back to where a checkpoint left it.

    Args:
        data_digest: identity of the data now.
        force: go on even though settings or data have changed.

    Returns:
        The `data` that was saved.

    Raises:
        ResumeError: settings that decide what is learned, or the data, are not those of the checkpoint.
        CheckpointError: its tensors are not those of the model.
    """
    about = json.loads((folder / "about.json").read_text())
    changes = list(_differences(about["settings"], state.config.decisive()))
    if about["data"]["digest"] != data_digest:
        changes.append("the corpus has other samples, or they take other numbers of tokens")
    if changes and not force:
        raise ResumeError(
            f"{folder} was trained with other settings: {'; '.join(changes)}. "
            "Take another run.folder, restore the settings, or go on nonetheless with --force."
        )
    for change in changes:
        log.warning("resuming although %s", change)
    if state.config.model.adapter == "none":
        saved = load_file(folder / "transformer" / f"{DIFFUSERS_STEM}.safetensors")
        check_state(state.model.state_dict(), saved)
        state.model.load_state_dict(saved)
    else:
        load_adapter(state.model, folder / "adapter")
    if state.average is not None:
        average = load_file(folder / "average.safetensors")
        check_state(state.average.shadow, average)
        for name, tensor in state.average.shadow.items():
            tensor.copy_(average[name])
    training = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
    if training["parameters"] != list(state.trained):
        raise ResumeError(f"{folder} holds the optimizer of other parameters")
    state.optimizer.load_state_dict(training["optimizer"])
    torch.set_rng_state(training["rng"])
    if torch.cuda.is_available() and training["cuda_rng"] is not None:
        torch.cuda.set_rng_state(training["cuda_rng"], state.device)
    state.step = about["step"]
    return about["data"]


def check_finite(state: TrainState) -> None:
    """Raises NonFiniteError naming the trained weights and optimizer states with a NaN or an infinity."""
    tensors = {name: tensor.detach() for name, tensor in state.trained.items()}
    for name, parameter in state.trained.items():
        moments = state.optimizer.state.get(parameter, {})
        tensors |= {f"{name} ({key})": value for key, value in moments.items() if isinstance(value, Tensor)}
    if state.average is not None:
        tensors |= {f"{name} (average)": tensor for name, tensor in state.average.shadow.items()}
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    if bad := [name for name, is_finite in zip(tensors, finite, strict=True) if not is_finite]:
        raise NonFiniteError(f"{len(bad)} tensors are not finite, nothing was saved: {', '.join(bad[:3])}")


def _write(folder: Path, state: TrainState, data: Mapping[str, Any]) -> None:
    if state.config.model.adapter == "none":
        save_transformer(folder / "transformer", state.model.config, state.model.state_dict())
    else:
        save_adapter(state.model, folder / "adapter")
    if state.average is not None:
        save_file(state.average.shadow, folder / "average.safetensors")
    training = {
        "parameters": list(state.trained),
        "optimizer": state.optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(state.device) if state.device.type == "cuda" else None,
    }
    torch.save(training, folder / "training.pt")
    settings = state.config.decisive()
    about = {
        "step": state.step,
        "settings": settings,
        "settings_digest": digest_of(settings),
        "data": dict(data),
        "torch": torch.__version__,
    }
    (folder / "about.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")


def _verify(folder: Path, state: TrainState) -> None:
    """Compare what can be read from the files with what is in memory: all names, and some tensors in full."""
    if state.config.model.adapter == "none":
        file, expected = folder / "transformer" / f"{DIFFUSERS_STEM}.safetensors", state.model.state_dict()
    else:
        file, expected = folder / "adapter" / WEIGHTS_NAME, adapter_state(state.model)
    _compare(file, expected)
    if state.average is not None:
        _compare(folder / "average.safetensors", state.average.shadow)
    training = torch.load(folder / "training.pt", map_location="cpu", weights_only=True, mmap=True)
    if len(training["optimizer"]["state"]) != len(state.optimizer.state):
        raise OSError(f"{folder}/training.pt does not hold what was written; is the disk full?")


def _compare(file: Path, expected: Mapping[str, Tensor]) -> None:
    with safe_open(file, framework="pt") as saved:
        names = list(expected)
        intact = set(saved.keys()) == set(names)
        for name in names[:: max(1, len(names) // _COMPARED_TENSORS)]:
            intact = intact and torch.equal(saved.get_tensor(name), expected[name].detach().cpu())
    if not intact:
        raise OSError(f"{file} does not hold what was written; is the disk full?")


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Settings that differ, as text; both are brought to their JSON form first."""
    current = json.loads(json.dumps(current))
    for name in sorted({*saved, *current}):
        before, now = saved.get(name), current.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(before, now, f"{prefix}{name}.")
        elif before != now:
            yield f"{prefix}{name} was {before}, now is {now}"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
