"""How many bytes a training step takes on each device, counted without the device, the weights or the data.

The very `train_step` of a run is executed on fake tensors, which have shapes and no bytes, and every storage that is
alive is counted at every operation. So nothing here knows what a layer or an optimizer keeps: change them, and the
count follows. What the allocator loses to fragments, and workspaces inside of kernels, are not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from fine_tune import packing
from fine_tune.adapters import add_adapter
from fine_tune.attention import Attend, IntervalMask, prepare
from fine_tune.layouts import read_config
from fine_tune.lowbit import adamw_8bit_bytes
from fine_tune.metrics import LossTable
from fine_tune.model import OmniGen, OmniGenConfig, RMSNorm
from fine_tune.optim import WeightAverage, build_optimizer, make_moments
from fine_tune.parallel import World, is_sharded
from fine_tune.presets import Config, ConfigError, ModelConfig
from fine_tune.state import TrainState
from fine_tune.vae import FrozenVAE
from schemas.vocabulary import TASKS

if TYPE_CHECKING:
    from fine_tune.data import Batch


_LAYERS = (2, 4)  # of the models that a deeper one is extrapolated from
_PHASES = ("encode", "network", "update")


@dataclass(frozen=True)
class Memory:
    """Bytes on one device when the most is in use, in a step after the first.

    Attributes:
        weights, buffers: of the transformer.
        gradients, optimizer, average: of what is trained.
        vae: its weights.
        gathered: what ranks exchange: weights of blocks in use, and sums of gradients.
        host: bytes of host memory, of an optimizer that works there.
        peaks: most of everything else while images are encoded, while the network runs forward and backward, and while
            weights are updated; negative where gradients were not all there yet.
    """

    weights: int
    buffers: int
    gradients: int
    optimizer: int
    average: int
    vae: int
    gathered: int
    host: int
    peaks: dict[str, int]

    @property
    def activations(self) -> int:
        """What is kept for the backward pass, or in use when the most is."""
        return max(0, *self.peaks.values())

    @property
    def static(self) -> int:
        parts = (self.weights, self.buffers, self.gradients, self.optimizer, self.average, self.vae, self.gathered)
        return sum(parts)

    @property
    def total(self) -> int:
        return self.static + self.activations


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that come out of operations, for as long as something refers to them.

    Attributes:
        now: bytes that are alive.
        peaks: most bytes in every phase.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peaks: dict[str, int] = {}
        self._phase = ""
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known.add(storage)
            size = storage.nbytes()
            weakref.finalize(storage, self._free, size).atexit = False
            self.now += size
            self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), self.now)

    def begin(self, phase: str) -> None:
        """The following belongs to a phase."""
        self._phase = phase
        self.peaks[phase] = max(self.peaks.get(phase, 0), self.now)

    def _free(self, size: int) -> None:
        self.now -= size


class _Planned(OmniGen):
    """Attention of the device that is planned for, which is not the one that plans."""

    attend: Attend

    def _prepare(self, mask: IntervalMask) -> Attend:
        return self.attend


class _FusedNorm(RMSNorm):
    """Keeps what CUDA's kernel keeps, the input and a number per row; a CPU takes the norm apart and keeps more."""

    def forward(self, x: Tensor) -> Tensor:
        return _KeepInput.apply(x, self.weight)


class _KeepInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(len(x), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _PlannedState(TrainState):
    """Computes in the dtype of the device that is planned for."""

    is_for_cuda = False

    def autocast(self) -> AbstractContextManager[Any]:
        return self.mixed_precision("cpu", self.is_for_cuda)


def measure(
    config: Config,
    sequences: Sequence[packing.Sequence],
    device: str = "cuda",
    ranks: int = 1,
    rows: int | None = None,
) -> Memory:
    """What a step on packs of these sequences takes on each of `ranks` devices.

    Layers are alike, so each part and the peak of each phase grow by the same amount from layer to layer: deep models
    are extrapolated from shallow ones.

    Args:
        device: `cuda` or `cpu`, whether it is there or not.
        rows: to which a pack is padded; the budget on CUDA.

    Raises:
        ConfigError: the model or its VAE is not given.
        FileNotFoundError, CheckpointError: they cannot be read; see `fine_tune.layouts.read_config`.
    """
    if rows is None and device == "cuda":
        rows = config.data.budget
    architecture = read_architecture(config.model)
    layout = packing.pack(list(sequences), rows, architecture.original_max_position_embeddings)
    rehearsal = _Rehearsal(config, architecture, sequences, layout, device, ranks)
    layers, (few, more) = architecture.num_layers, _LAYERS
    if layers <= more:
        parts = rehearsal.run(layers)
    else:
        first, second = rehearsal.run(few), rehearsal.run(more)
        parts = {name: first[name] + (second[name] - first[name]) * (layers - few) // (more - few) for name in first}
    return Memory(peaks={phase: parts.pop(phase) for phase in _PHASES}, **parts)


def allocated_peak(work: Callable[[], object]) -> int:
    """Most bytes that the CPU's allocator has given out at a time during a call, to compare a plan with."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max())


@dataclass(frozen=True)
class _Rehearsal:
    """A step on fake tensors."""

    config: Config
    architecture: OmniGenConfig
    sequences: Sequence[packing.Sequence]
    layout: packing.Pack
    device: str
    ranks: int

    @property
    def sharded(self) -> bool:
        return self.ranks > 1 and is_sharded(self.config)

    def run(self, layers: int) -> dict[str, int]:
        """Bytes of each part but the activations, and of the peak of each phase beyond these parts."""
        from fine_tune.train import train_step

        attend = self._prepare()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, LiveBytes() as live:
            state = self._build_state(replace(self.architecture, num_layers=layers))
            state.model.attend = attend  # type: ignore[assignment]
            state.model.register_forward_pre_hook(lambda *_: live.begin("network"))
            batch = _fake_batch(self.layout, self.sequences, mode)
            make_moments(state.optimizer)
            state.optimizer.register_step_pre_hook(lambda *_: live.begin("update"))
            # From its second pack on, a step has all gradients; shards of them always are there.
            if self.sharded or self.config.data.packs_per_step > self.ranks:
                for parameter in state.trained.values():
                    parameter.grad = torch.zeros_like(parameter)
            live.begin("encode")
            train_step(state, [batch])
        parts = self._parts(state)
        known = sum(parts.values())
        peaks = {phase: live.peaks[phase] - known for phase in _PHASES}
        return self._as_kept(state, parts) | peaks

    def _prepare(self) -> Attend:
        backend = self.config.model.attention_backend
        uses_kernel = self.device == "cuda" and backend in ("auto", "flex", "flex_flash")
        return _flash_like if uses_kernel else prepare(self.layout.mask, backend)

    def _build_state(self, architecture: OmniGenConfig) -> TrainState:
        from diffusers import AutoencoderKL

        config = self.config
        with unset_fake_temporarily(), torch.device("meta"):  # where modules can be built and changed as usual
            model = _Planned(architecture).to(getattr(torch, config.model.dtype))
            if config.model.adapter != "none":
                add_adapter(model, config.model, config.data.seed)
            if self.sharded and self.device == "cuda":
                model.layers.to(torch.bfloat16)  # what blocks are gathered in
            autoencoder = AutoencoderKL.from_config(read_vae_config(config.model))
        for module in model.modules():
            if self.device == "cuda" and isinstance(module, RMSNorm):
                module.__class__ = _FusedNorm
        for root in (model, autoencoder):
            _allocate(root)
        model.set_checkpointing(config.model.gradient_checkpointing)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        state = _PlannedState(
            config=config,
            device=torch.device("cpu"),
            world=World(),
            model=model.train(),
            network=model,
            vae=FrozenVAE(autoencoder),
            tokenizer=None,  # type: ignore[arg-type]
            trained=trained,
            optimizer=_stand_in(trained, config),
            average=WeightAverage(trained, config.optim.ema_decay) if config.optim.ema_decay else None,
            losses=LossTable(TASKS),
        )
        state.is_for_cuda = self.device == "cuda"
        return state

    def _parts(self, state: TrainState) -> dict[str, int]:
        """What is there between two steps, with the gradients."""
        vae, moments = state.vae.module, state.optimizer.state.values()
        return {
            "weights": _bytes(state.model.parameters()),
            "buffers": _bytes(state.model.buffers()),
            "gradients": _bytes(state.trained.values()),
            "optimizer": _bytes(value for of_one in moments for value in of_one.values()),
            "average": _bytes(state.average.shadow.values()) if state.average else 0,
            "vae": _bytes([*vae.parameters(), *vae.buffers()]),
        }

    def _as_kept(self, state: TrainState, parts: dict[str, int]) -> dict[str, int]:
        """The parts as a run keeps them, where the rehearsal does not."""
        trained, kept = list(state.trained.values()), {**parts, "gathered": 0, "host": 0}
        number = sum(p.numel() for p in trained)
        if self.config.optim.offload:
            kept["host"] = number * 3 * 4
        elif self.config.optim.name == "adamw8bit":
            kept["optimizer"] = sum(adamw_8bit_bytes(p) for p in trained)
        if self.sharded:
            masters = 4 * number // self.ranks
            kept |= {"weights": masters, "gradients": masters, "optimizer": 2 * masters}
            kept |= {"average": masters if state.average else 0, "gathered": _gathered(state.model)}
        return kept


def read_architecture(config: ModelConfig) -> OmniGenConfig:
    """Of the model to train."""
    if config.source:
        return read_config(config.source)
    if not config.architecture:
        raise ConfigError("nothing to plan for: give model.source, or model.architecture for random weights")
    return OmniGenConfig(**config.architecture)


def read_vae_config(config: ModelConfig) -> dict[str, Any]:
    """Of the VAE, in diffusers' spelling."""
    from diffusers import AutoencoderKL

    if not config.vae and not config.source:
        raise ConfigError("model.vae is needed where there is no model.source")
    folder, subfolder = (config.vae, None) if config.vae else (config.source, "vae")
    return AutoencoderKL.load_config(folder, subfolder=subfolder)


def _allocate(root: nn.Module) -> None:
    """Fake memory for what is on the meta device."""
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _Elsewhere(torch.optim.Optimizer):
    """Has nothing to count."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        pass


def _stand_in(trained: dict[str, nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """The optimizer; one without states for those that keep them elsewhere or as something else than tensors."""
    if config.optim.offload or config.optim.name == "adamw8bit":
        return _Elsewhere(trained.values(), {"lr": 0.0})
    return build_optimizer(trained.values(), config.optim, config.data.seed)


def _gathered(model: OmniGen) -> int:
    """Two blocks, one of them ahead of its use, with the gradients of one and their float32 sum; and all else."""
    block = list(model.layers[0].parameters())
    elsewhere = [p for name, p in model.named_parameters() if not name.startswith("layers.")]
    return 3 * _bytes(block) + 4 * sum(p.numel() for p in block) + 2 * _bytes(elsewhere)


def _flash_like(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keeps what FlexAttention and FlashAttention keep: q, k, v, the output and a number per row and head."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0][0].transpose(0, 1)


def _fake_batch(layout: packing.Pack, sequences: Sequence[packing.Sequence], mode: FakeTensorMode) -> Batch:
    from fine_tune.data import Batch, Example

    def pixels(size: packing.Size) -> Tensor:
        return torch.zeros(3, 16 * size[0], 16 * size[1])

    examples = [
        Example(
            key=str(number),
            shard="",
            task=TASKS[0],
            seed=number,
            sequence=sequence,
            inputs=[pixels(size) for size in sequence.input_sizes],
            shown=list(range(len(sequence.input_sizes))),
            target=pixels(sequence.target_size),
            edit_source_index=-1,
            edit_mask=None,
        )
        for number, sequence in enumerate(sequences)
    ]
    return Batch(0, layout._map(mode.from_tensor), examples, [])


def _bytes(tensors: Iterable[Any]) -> int:
    """Of their storages, each counted once."""
    storages = {id(s): s for s in (t.untyped_storage() for t in tensors if isinstance(t, Tensor))}
    return sum(storage.nbytes() for storage in storages.values())
