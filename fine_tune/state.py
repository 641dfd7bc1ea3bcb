"""What a training step works on, built from the settings."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fine_tune.adapters import add_adapter
from fine_tune.layouts import load_transformer
from fine_tune.lowbit import use_fp8
from fine_tune.metrics import LossTable
from fine_tune.model import OmniGen, OmniGenConfig
from fine_tune.optim import WeightAverage, build_optimizer
from fine_tune.parallel import World, parallelise
from fine_tune.presets import Config, ConfigError, ModelConfig
from fine_tune.tokens import Tokenizer
from fine_tune.vae import FrozenVAE
from schemas.vocabulary import TASKS

log = logging.getLogger(__name__)


@dataclass
class StepRecord:
    """What is looked at when the device has had the time.

    Attributes:
        samples, losses: of this rank.
        is_broken: > 0, on all ranks alike, if something of the step was not finite on any of them.
    """

    step: int
    samples: list[str]
    losses: Tensor
    grad_norm: Tensor
    is_broken: Tensor


@dataclass(frozen=True)
class Stage:
    """Where a run of several stages is.

    Attributes:
        number: of the stage, from 1.
        first_step: steps of the stages before it.
        after: where in the data they stopped, see `fine_tune.order.Plan.cursor`.
    """

    number: int = 1
    first_step: int = 0
    after: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainState:
    """Everything that changes in training, and what it needs.

    Attributes:
        model: the bare module; `network` is what is called, the same or wrapped for several ranks.
        trained: its trained parameters by name, cut over the ranks or not; see `fine_tune.parallel`.
        average: moving average of them, or None.
        step: optimizer updates so far, in all stages.
        records: of the steps since the last check.
    """

    config: Config
    device: torch.device
    world: World
    model: OmniGen
    network: nn.Module
    vae: FrozenVAE
    tokenizer: Tokenizer
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    losses: LossTable
    step: int = 0
    records: list[StepRecord] = field(default_factory=list)
    stage: Stage = Stage()

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 compute on CUDA or on bfloat16 weights, float32 otherwise."""
        return self.mixed_precision(self.device.type)

    def mixed_precision(self, device: str, is_like_cuda: bool = False) -> AbstractContextManager[Any]:
        """`autocast` for a kind of device."""
        if device == "cuda" or is_like_cuda or self.config.model.dtype == "bfloat16":
            # A pack uses each weight once, so a cache of casts would only keep all of them until its end.
            return torch.autocast(device, torch.bfloat16, cache_enabled=False)
        return nullcontext()

    @property
    def adapter_parameters(self) -> int:
        """Number of trained weights beside frozen ones; 0 when everything is trained."""
        return 0 if self.config.model.adapter == "none" else sum(p.numel() for p in self.trained.values())


def pick_device(name: str) -> torch.device:
    """The device of that name; CUDA where there is one for ""."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def build_state(config: Config, world: World | None = None) -> TrainState:
    """Load or draw the model, load VAE and tokenizer, make the optimizer.

    Raises:
        ConfigError: no source for a part, or a vocabulary that does not fit.
        FileNotFoundError, CheckpointError: see `fine_tune.layouts.load_transformer`.
    """
    world = world or World()
    device = world.device or pick_device(config.run.device)
    tokenizer, vae = load_tokenizer(config.model), load_vae(config.model, device)
    model = load_model(config.model, config.data.seed, device)
    if len(tokenizer) > model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only {model.config.vocab_size} embeddings: "
            "give model.tokenizer the one that belongs to model.source"
        )
    if config.model.adapter != "none":
        add_adapter(model, config.model, config.data.seed)
    if config.model.fp8:
        use_fp8(model, device)
    if config.model.compile:
        compile_blocks(model, device)
    model.set_checkpointing(config.model.gradient_checkpointing)
    network = parallelise(model, world, device, config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    counts = [sum(p.numel() for p in parameters) for parameters in (trained.values(), model.parameters())]
    log.info("training %s of %s parameters", *(f"{count:,}" for count in counts))
    return TrainState(
        config=config,
        device=device,
        world=world,
        model=model.train(),
        network=network,
        vae=vae,
        tokenizer=tokenizer,
        trained=trained,
        optimizer=build_optimizer(trained.values(), config.optim, config.data.seed),
        average=WeightAverage(trained, config.optim.ema_decay) if config.optim.ema_decay else None,
        losses=LossTable(TASKS, device),
    )


def compile_blocks(model: OmniGen, device: torch.device) -> None:
    """Compile every block; they are alike, so one compilation serves all.

    Raises:
        ConfigError: an attention backend whose code is another one for every pack.
    """
    backend = model.attention_backend
    if backend == "sequential" or (backend == "auto" and device.type == "cpu"):
        raise ConfigError("model.compile=true on a CPU needs model.attention_backend=sdpa")
    for block in model.layers:
        block.compile(fullgraph=True)


def load_model(config: ModelConfig, seed: int, device: torch.device) -> OmniGen:
    """From the source, or with random weights drawn by `seed`."""
    dtype = getattr(torch, config.dtype)
    if config.source:
        return load_transformer(config.source, dtype, device, config.attention_backend)
    if not config.architecture:
        raise ConfigError("nothing to train: give model.source, or model.architecture for random weights")
    model = OmniGen(OmniGenConfig(**config.architecture), config.attention_backend)
    initialise(model, torch.Generator().manual_seed(seed))
    return model.to(device, dtype)


@torch.no_grad()
def initialise(model: OmniGen, generator: torch.Generator) -> None:
    """Random weights: Phi-3's N(0, 0.02²), and zero at the output as in DiT (arXiv:2212.09748, section 3.2)."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or name.startswith(("proj_out.", "norm_out.")):
            parameter.zero_()
        elif "_image_proj." in name:
            nn.init.xavier_uniform_(parameter.view(len(parameter), -1), generator=generator)
        elif parameter.ndim > 1:
            parameter.normal_(std=0.02, generator=generator)


def load_tokenizer(config: ModelConfig) -> Tokenizer:
    """ConfigError if it is not given, or cannot be loaded."""
    source, subfolder = _place(config, "tokenizer")
    with _explained("tokenizer", source):
        return Tokenizer.from_pretrained(source, subfolder=subfolder)


def load_vae(config: ModelConfig, device: torch.device) -> FrozenVAE:
    """ConfigError if it is not given, or cannot be loaded."""
    source, subfolder = _place(config, "vae")
    with _explained("vae", source):
        return FrozenVAE.from_pretrained(source, subfolder=subfolder or None, device=device)


def _place(config: ModelConfig, part: str) -> tuple[str, str]:
    """Folder or Hub id, and the folder inside of it, of a part of a pipeline."""
    if given := getattr(config, part):
        return given, ""
    if not config.source:
        raise ConfigError(f"model.{part} is needed where there is no model.source")
    return config.source, part


@contextmanager
def _explained(part: str, source: str) -> Iterator[None]:
    """Libraries raise different things for what is not there, and none of them names the setting."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.{part}: {source} cannot be loaded: {error}") from error
