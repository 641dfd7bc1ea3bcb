"""Checkpoints that are whole or not there, and the rules for going on from one.

run/checkpoints/step-00000100/
    transformer/   weights of the model, and its config   (or adapter/: those of the adapter alone)
    optimizer/     moments, as <parameter>.<moment>
    average/       moving average of the trained weights, if kept
    about.json     step, position in the data, settings, identity of the data, list of files

Tensors are in safetensors files, one per rank and folder (`fine_tune.shards`), and can be read by any number of ranks.
What a single rank, or ranks with DDP have saved in `transformer/` is a diffusers OmniGenTransformer2DModel as it is.
`about.json` is written last: a folder without it is no checkpoint.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from fine_tune.layouts import DIFFUSERS_STEM, check_state
from fine_tune.lowbit import plain_tensors
from fine_tune.optim import make_moments
from fine_tune.parallel import RankError, World, local
from fine_tune.shards import SUFFIX, ShardReader, ShardWriter
from fine_tune.storage import Location, StorageError
from schemas.identity import digest_of

if TYPE_CHECKING:
    from fine_tune.state import Stage, TrainState

log = logging.getLogger(__name__)
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable")  # on purpose, with one rank

ABOUT = "about.json"

Tensors = dict[str, Tensor]


class NonFiniteError(RuntimeError):
    """NaN or infinity where a number has to be."""


class ResumeError(RuntimeError):
    """A checkpoint that belongs to another run, or is damaged."""


def find_checkpoints(run: Location | Path | str) -> list[Location]:
    """Complete checkpoints of a run, oldest first."""
    folders = (Location.of(run) / "checkpoints").list()
    return [folder for folder in folders if folder.name.startswith("step-") and (folder / ABOUT).exists()]


def open_part(checkpoint: Location, part: str) -> ShardReader:
    """The tensors in one of the folders of a checkpoint; nothing if it has no such folder."""
    files = (checkpoint / ABOUT).read_json()["files"]
    return ShardReader(checkpoint / name for name in files if name.startswith(f"{part}/"))


def save_checkpoint(run: Location | Path | str, state: TrainState, data: Mapping[str, Any], keep: int) -> Location:
    """Write a checkpoint, read it back, then mark it as complete; the oldest beyond `keep` go. A collective.

    Args:
        data: position in the data, and its identity as `digest`.

    Raises:
        NonFiniteError: a weight or an optimizer state is not finite; nothing is written.
        StorageError: what was read back is not what was written, or nothing can be written, for too long.
    """
    target = _target(run, state)
    check_finite(state)
    if not state.world.share((target / ABOUT).exists()):
        _Writing(target, state.world, _contents(state), _about(state, data), _config(state), keep).run()
    return target


class BackgroundSaver:
    """Saves a copy of the state from another thread, one checkpoint at a time.

    Whether the last one was written is known when the next one begins, on all ranks alike.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="x2i-checkpoint")
        self._pending: Future[None] | None = None

    def save(self, run: Location | Path | str, state: TrainState, data: Mapping[str, Any], keep: int) -> Location:
        """Copy the state to the host and return. Raises what `save_checkpoint` does, of this checkpoint or the last."""
        self.wait()
        check_finite(state)
        contents = {part: _copied(tensors) for part, tensors in _contents(state).items()}
        world = state.world.beside()
        writing = _Writing(_target(run, state), world, contents, _about(state, data), _config(state), keep)
        self._pending = self._thread.submit(writing.run)
        return writing.target

    def wait(self) -> None:
        """Until nothing is being written; raises what went wrong."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _copied(tensors: Tensors) -> Tensors:
    """On the host; of a tensor that is cut over ranks only what is here."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    stager = DefaultStager(StagingOptions(False, False, False, False))
    try:
        copied = stager.stage(dict(tensors))
        assert isinstance(copied, dict)  # a future only with an asynchronous stager
        return copied
    finally:
        stager.close()


@dataclass(frozen=True)
class _Writing:
    """All that is needed to write one checkpoint."""

    target: Location
    world: World
    contents: dict[str, Tensors]
    about: dict[str, Any]
    config: dict[str, Any] | None
    keep: int

    def run(self) -> None:
        with self.world.together():
            if self.world.rank == 0:
                # What a save that was cut off has left there might be of another number of ranks.
                self.target.remove()
        for part, tensors in self.contents.items():
            self._write(part, tensors)
        with self.world.together():
            if self.world.rank == 0:
                self._complete()

    def _write(self, part: str, tensors: Tensors) -> None:
        writer = ShardWriter(self.target / part, DIFFUSERS_STEM if part == "transformer" else None)
        with _explained():
            dcp.save(tensors, storage_writer=writer, process_group=self.world.group, no_dist=self.world.size == 1)

    def _complete(self) -> None:
        """Mark it as complete, then remove older ones and what others have left unfinished."""
        if self.config:
            (self.target / "transformer" / "config.json").write_json(self.config)
        files = [
            f"{part}/{file.name}"
            for part in self.contents
            for file in (self.target / part).list()
            if file.name.endswith(SUFFIX)
        ]
        (self.target / ABOUT).write_json(self.about | {"files": files})
        folders = [folder for folder in self.target.parent.list() if folder.name.lstrip(".").startswith("step-")]
        complete = [folder for folder in folders if (folder / ABOUT).exists()]
        for folder in folders:
            if folder not in complete[-self.keep :]:
                folder.remove()


@contextmanager
def _explained() -> Iterator[None]:
    """DCP tells all ranks of a failure on one of them, in an exception that is not an `Exception`."""
    try:
        yield
    except dcp.CheckpointException as error:
        rank, (failure, _) = min(error.failures.items())
        message = f"rank {rank}: {failure}"
        raise StorageError(message) if isinstance(failure, OSError) else RankError(message) from failure


def _target(run: Location | Path | str, state: TrainState) -> Location:
    return Location.of(run) / "checkpoints" / f"step-{state.step:08d}"


def _contents(state: TrainState) -> dict[str, Tensors]:
    """The tensors of a checkpoint by folder, as they are in memory: loading writes into them."""
    if state.config.model.adapter == "none":
        contents: dict[str, Tensors] = {"transformer": dict(state.model.state_dict())}
    else:
        contents = {"adapter": dict(state.trained)}
    contents["optimizer"] = {
        stored: tensor
        for name, parameter in state.trained.items()
        for moment, value in state.optimizer.state[parameter].items()
        for stored, tensor in plain_tensors(f"{name}.{moment}", value).items()
    }
    if state.average is not None:
        contents["average"] = state.average.shadow
    return {part: {name: tensor.detach() for name, tensor in tensors.items()} for part, tensors in contents.items()}


def _about(state: TrainState, data: Mapping[str, Any]) -> dict[str, Any]:
    settings = state.config.decisive()
    return {
        "step": state.step,
        "settings": settings,
        "settings_digest": digest_of(settings),
        "data": dict(data),
        "ranks": state.world.size,
        "torch": torch.__version__,
    }


def _config(state: TrainState) -> dict[str, Any] | None:
    """Of the transformer, if all of it is saved."""
    return state.model.config.to_dict() if state.config.model.adapter == "none" else None


def saved_stage(folder: Location) -> Stage:
    """The stage in which a checkpoint was saved."""
    from fine_tune.state import Stage

    return Stage(**(folder / ABOUT).read_json()["data"]["stage"])


def load_checkpoint(
    folder: Location | Path | str, state: TrainState, data_digest: str, force: bool = False
) -> dict[str, Any]:
    """Put a run back to where a checkpoint left it, whatever the number of ranks that saved it. A collective.

    Args:
        data_digest: identity of the data now.
        force: go on even though settings or data have changed.

    Returns:
        The `data` that was saved.

    Raises:
        ResumeError: settings that decide what is learned, or the data, are not those of the checkpoint.
        CheckpointError: its tensors are not those of the model.
    """
    folder = Location.of(folder)
    about = (folder / ABOUT).read_json()
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
    if any(name.startswith("optimizer/") for name in about["files"]):
        make_moments(state.optimizer)
    contents = _contents(state)
    for part, tensors in contents.items():
        reader = open_part(folder, part)
        check_state(tensors, reader.describe())
        with _explained():
            dcp.load(tensors, storage_reader=reader, process_group=state.world.group, no_dist=state.world.size == 1)
    for name, parameter in state.trained.items():
        moments = state.optimizer.state[parameter]
        for moment, value in moments.items():
            if not isinstance(value, Tensor):
                moments[moment] = type(value)(contents["optimizer"][f"{name}.{moment}"].item())
    state.step = about["step"]
    return about["data"]


def check_finite(state: TrainState) -> None:
    """Raises NonFiniteError naming the tensors with a NaN or an infinity, on all ranks alike. A collective."""
    tensors = {
        name if part in ("transformer", "adapter") else f"{name} ({part})": local(tensor)
        for part, held in _contents(state).items()
        for name, tensor in held.items()
    }
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    bad = [name for name, is_finite in zip(tensors, finite, strict=True) if not is_finite]
    found = sorted({name for names in state.world.gather(bad) for name in names})
    if found:
        raise NonFiniteError(f"{len(found)} tensors are not finite, nothing was saved: {', '.join(found[:3])}")


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Settings that differ, as text; both are brought to their JSON form first."""
    current = json.loads(json.dumps(current))
    for name in sorted({*saved, *current}):
        before, now = saved.get(name), current.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(before, now, f"{prefix}{name}.")
        elif before != now:
            yield f"{prefix}{name} was {before}, now is {now}"
