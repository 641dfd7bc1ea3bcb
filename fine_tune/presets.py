"""The settings of a run, and presets of them as plain functions. `key=value` changes one setting."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from fine_tune.attention import Backend
from fine_tune.flow import EditWeighting, Reduction
from fine_tune.model import Checkpointing
from fine_tune.order import AUTHORS_MIXTURE
from fine_tune.stages import PAPER, STRICT, TINY, StageConfig, StagesConfig
from fine_tune.tiny import TOKENIZER_DIR, VAE_DIR

BLOCK_LINEARS = ("to_q", "to_k", "to_v", "to_out.0", "gate_up_proj", "down_proj")


class ConfigError(ValueError):
    """A setting that does not exist or has a value it cannot have."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained.

    Attributes:
        source: folder or Hub id of an OmniGen checkpoint; "" starts from random weights of `architecture`.
        architecture: fields of `OmniGenConfig`, for random weights.
        vae, tokenizer: folder or Hub id; "" takes those of `source`.
        adapter: train a low-rank adapter, or `none`: every weight.
        dtype: of the weights. Full fine-tuning in bfloat16 needs `optim.name=adamw_sr`.
        gradient_checkpointing: what of a block is computed again in the backward pass instead of kept: `none`,
            `selective` (all but its matrix products and attention), `full`. See `x2i train --plan`.
        compile: `torch.compile` every block.
        fp8: matrix products of the blocks in fp8; an experiment.
    """

    source: str = ""
    architecture: dict[str, Any] = field(default_factory=dict)
    vae: str = ""
    tokenizer: str = ""
    adapter: Literal["none", "lora", "dora"] = "none"
    adapter_rank: int = 16
    adapter_alpha: int = 16
    adapter_dropout: float = 0.0
    adapter_targets: tuple[str, ...] = BLOCK_LINEARS
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention_backend: Backend = "auto"
    gradient_checkpointing: Checkpointing = "none"
    compile: bool = False
    fp8: bool = False
    __pydantic_config__ = STRICT


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What it is trained on, and in which order.

    Attributes:
        corpus: folder or fsspec URL of a corpus.
        budget: tokens per pack.
        packs_per_step: packs per optimizer step over all ranks and accumulation steps.
        mixture: shares of samples by task, stream or `other`; see `fine_tune.order.stream_shares`.
        drop_all, drop_text, drop_images: condition dropout.
        block: samples that are mixed and packed together.
        max_skip_rate: share of samples that may turn out unusable before the run stops.
        workers, prefetch: decoding threads, and packs decoded ahead.
        max_side: longest side of an image in pixels.
        other_sides: smaller ones, between which and `max_side` every sample changes from epoch to epoch.
        latents: take latents from the corpus where it has them (`x2i latents`) instead of encoding images.
    """

    corpus: str = ""
    split: str = "train"
    held_out_split: str = "val"
    seed: int = 0
    max_side: int = 1024
    other_sides: tuple[int, ...] = ()
    budget: int = 8448
    packs_per_step: int = 1
    mixture: dict[str, float] = field(default_factory=lambda: dict(AUTHORS_MIXTURE))
    drop_all: float = 0.1
    drop_text: float = 0.0
    drop_images: float = 0.0
    block: int = 512
    max_skip_rate: float = 0.01
    latents: bool = True
    workers: int = 4
    prefetch: int = 4
    __pydantic_config__ = STRICT


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """The loss; see `fine_tune.flow`.

    Attributes:
        weight_mode: how edits are weighted.
        reduction: every token weighs the same, or every sample.
        t_mean, t_std: of the logit-normal timesteps.
        time_shift: move timesteps towards noise for large images.
        draws: of timestep and noise for every sample; they share one condition and its computation.
    """

    weight_mode: Literal["latent", "mask", "paper", "none"] = "latent"
    reduction: Reduction = "token"
    t_mean: float = 0.0
    t_std: float = 1.0
    time_shift: bool = False
    draws: int = 1
    __pydantic_config__ = STRICT

    @property
    def weighting(self) -> EditWeighting:
        return EditWeighting(mode=self.weight_mode)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How the weights are changed.

    Attributes:
        name: `adamw` (float32 weights), `adamw_sr` (bfloat16 weights, stochastic rounding) or `adamw8bit` (moments of
            8 bits; bfloat16 weights are rounded stochastically).
        offload: keep float32 weights and moments in host memory and update them there.
        schedule: after the warm-up, `constant` or `cosine` down to `min_lr_ratio` at `run.steps`.
        ema_decay: of the moving average of the weights; 0 keeps none.
    """

    name: Literal["adamw", "adamw_sr", "adamw8bit"] = "adamw"
    offload: bool = False
    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr_ratio: float = 0.1
    ema_decay: float = 0.0
    __pydantic_config__ = STRICT


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long, and what is written when (in steps; 0 means never). None of it changes what is learned.

    Attributes:
        folder: of the run, a path or an fsspec URL. Training resumes from the newest checkpoint in it.
        keep: how many checkpoints.
        save_in_background: go on training while a checkpoint is written; takes host memory for a copy of it.
        storage_patience: seconds for which a file that cannot be written or read is tried again.
        held_out_samples, sample_images: how many samples of the held-out split are measured, and drawn.
        sample_steps: flow steps of a drawn image.
        device: "" takes CUDA where there is one.
        memory_gb: of a device that a run may not exceed; 0 takes what CUDA devices have. See `x2i train --plan`.
        peak_tflops: of the device in bfloat16, to report MFU; 0 looks it up.
    """

    folder: str = "runs/x2i"
    steps: int = 1000
    log_every: int = 10
    eval_every: int = 500
    sample_every: int = 500
    save_every: int = 500
    keep: int = 2
    save_in_background: bool = False
    storage_patience: float = 600.0
    held_out_samples: int = 64
    sample_images: int = 4
    sample_steps: int = 30
    guidance_scale: float = 2.5
    img_guidance_scale: float = 1.6
    tensorboard: bool = True
    device: str = ""
    memory_gb: float = 0.0
    peak_tflops: float = 0.0
    __pydantic_config__ = STRICT


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How ranks wait for each other and what becomes of a run when one is lost. None of it changes what is learned.

    Attributes:
        timeout: seconds after which a rank gives up waiting for another.
        max_failures: how often Ray Train starts the ranks again after one was lost.
    """

    timeout: float = 1800.0
    max_failures: int = 3
    __pydantic_config__ = STRICT


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    flow: FlowConfig = FlowConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()
    parallel: ParallelConfig = ParallelConfig()
    stages: StagesConfig = field(default_factory=StagesConfig)
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if self.optim.name == "adamw_sr" and (self.model.dtype, self.model.adapter) != ("bfloat16", "none"):
            raise ConfigError("optim.name=adamw_sr is for model.dtype=bfloat16 without an adapter")
        if self.optim.offload and self.optim.name != "adamw":
            raise ConfigError(f"optim.offload=true keeps float32 states: use optim.name=adamw, not {self.optim.name}")
        is_lossy = self.optim.name == "adamw" and not self.optim.offload
        if is_lossy and (self.model.dtype, self.model.adapter) == ("bfloat16", "none"):
            raise ConfigError(
                "AdamW on bfloat16 weights loses most of its updates to rounding: "
                "use optim.name=adamw_sr or adamw8bit, or optim.offload=true, or model.dtype=float32"
            )
        if self.data.max_side % 16 or self.data.max_side < 16:
            raise ConfigError(f"data.max_side={self.data.max_side} is not a multiple of 16")
        if any(side % 16 or not 16 <= side < self.data.max_side for side in self.data.other_sides):
            raise ConfigError(f"data.other_sides={self.data.other_sides} are not multiples of 16 below data.max_side")
        self._check_stages()
        if self.parallel.timeout <= self.run.storage_patience:
            raise ConfigError(
                f"parallel.timeout={self.parallel.timeout:g} must be longer than run.storage_patience="
                f"{self.run.storage_patience:g}: while one rank tries again to write, the others wait"
            )
        data, run = self.data, self.run
        positive = {
            "flow.draws": self.flow.draws,
            "data.budget": data.budget,
            "data.packs_per_step": data.packs_per_step,
        }
        for name, value in (positive | {"run.keep": run.keep, "run.log_every": run.log_every}).items():
            if value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")

    def _check_stages(self) -> None:
        stages = self.stages
        if list(stages.table) != [str(number) for number in range(1, len(stages.table) + 1)]:
            raise ConfigError(f"stages.table has {', '.join(stages.table)} and not the numbers from 1 on")
        if min(stages.scale_steps, stages.scale_batch, stages.ranks) <= 0:
            raise ConfigError("stages.scale_steps, stages.scale_batch and stages.ranks must be positive")
        for number in range(1, len(stages.table) + 1):
            self.at_stage(number)

    @property
    def num_stages(self) -> int:
        return max(1, len(self.stages.table))

    def at_stage(self, number: int) -> Config:
        """The settings during a stage, counted from 1; `run.steps` counts from the beginning of the first one.

        Raises:
            ConfigError: there are fewer stages, or a setting of this one has a value it cannot have.
        """
        if not 1 <= number <= self.num_stages:
            raise ConfigError(f"there is no stage {number}, only {self.num_stages}")
        if not self.stages.table:
            return self
        stages = self.stages.scaled()[:number]
        now = stages[-1]
        return replace(
            self,
            data=replace(
                self.data,
                max_side=now.max_side,
                other_sides=now.other_sides,
                budget=now.budget,
                packs_per_step=now.packs_per_step,
            ),
            optim=replace(self.optim, lr=now.lr, warmup_steps=now.warmup_steps),
            run=replace(self.run, steps=sum(stage.steps for stage in stages)),
            stages=StagesConfig(),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """ConfigError on unknown settings and on values of the wrong type."""
        try:
            return TypeAdapter(cls).validate_python(dict(values))
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
            raise ConfigError("; ".join(problems)) from error

    def decisive(self) -> dict[str, Any]:
        """The settings that decide what is learned; a run goes on only with the same ones."""
        values = {name: dict(part) for name, part in self.to_dict().items() if name in _DECISIVE}
        for name in ("corpus", "latents", "workers", "prefetch", "max_skip_rate", "held_out_split"):
            del values["data"][name]  # where the corpus lies and how it is read; its content is in the index digest
        for name in ("attention_backend", "gradient_checkpointing", "compile"):
            del values["model"][name]
        if self.optim.schedule == "cosine":
            values["optim"]["steps"] = self.run.steps
        return values


_DECISIVE = ("model", "data", "flow", "optim")
_OF_STAGES = [leaf.name for leaf in fields(StageConfig)]


def override(config: Config, assignments: Iterable[str]) -> Config:
    """Apply `section.key=value` assignments; the section may be left out. Values are YAML.

    `data.mixture.edit=0.3` changes one entry of a mapping.

    Raises:
        ConfigError: no such setting (with the nearest names), or a value it cannot have.
    """
    values = config.to_dict()
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"{assignment!r} is not of the form key=value")
        section, key, *entry = _find_setting(config, name.strip())
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{name}: {text!r} is not a value: {error}") from error
        # YAML 1.1 takes 1e-4, without a point, for a string.
        value = _as_number(value) if isinstance(value, str) else value
        if config.stages.table and section != "stages" and key in _OF_STAGES:
            raise ConfigError(f"every stage has its own {key}: give stages.table.<number>.{key}")
        if entry:
            _at(values[section][key], entry[:-1], name)[entry[-1]] = value
        else:
            values[section][key] = "" if value is None else value
    return Config.from_dict(values)


def _at(mapping: dict[str, Any], path: list[str], name: str) -> dict[str, Any]:
    """The mapping at `path` in nested ones."""
    for part in path:
        if not isinstance(mapping.get(part), dict):
            raise ConfigError(f"{name}: there is no {part}, only {', '.join(mapping)}")
        mapping = mapping[part]
    return mapping


def _as_number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _find_setting(config: Config, name: str) -> list[str]:
    settings = {f"{part.name}.{leaf.name}" for part in fields(config) for leaf in fields(getattr(config, part.name))}
    parts = name.split(".")
    if ".".join(parts[:2]) in settings:
        section, key = parts[:2]
        if parts[2:] and not isinstance(getattr(getattr(config, section), key), dict):
            raise ConfigError(f"{section}.{key} has no entries, so {name!r} is no setting")
        return parts
    found = [setting for setting in settings if setting.split(".")[1] == parts[0]]
    if len(found) == 1:
        return _find_setting(config, ".".join([found[0], *parts[1:]]))
    leaves = {setting.split(".")[1]: setting for setting in sorted(settings)}
    near = difflib.get_close_matches(name, [*settings, *leaves], n=3)
    near = list(dict.fromkeys(leaves.get(match, match) for match in near))
    hint = f"did you mean {' or '.join(near)}?" if near else f"settings are {', '.join(sorted(settings))}"
    raise ConfigError(f"unknown setting {name!r}; {hint}")


def tiny() -> Config:
    """Runs on a CPU in minutes: a transformer of 4 M parameters with the VAE and tokenizer that ship with the code."""
    architecture = {
        "hidden_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 512,
        "num_layers": 6,
        "vocab_size": 3072,
        "pad_token_id": 3064,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"short_factor": [1.0] * 24, "long_factor": [1.0] * 24, "type": "su"},
        "pos_embed_max_size": 32,
    }
    return Config(
        model=ModelConfig(architecture=architecture, vae=str(VAE_DIR), tokenizer=str(TOKENIZER_DIR)),
        data=DataConfig(max_side=128, budget=640, workers=2),
        optim=OptimConfig(lr=1e-3, warmup_steps=20),
        run=RunConfig(steps=300, log_every=10, eval_every=100, sample_every=100, save_every=100, held_out_samples=16),
    )


def lora() -> Config:
    """A LoRA on attention and MLP of OmniGen-v1 at up to 1024 pixels; 40 GB, or 16 GB with gradient checkpointing."""
    return Config(
        model=ModelConfig(source="Shitao/OmniGen-v1-diffusers", adapter="lora", dtype="bfloat16"),
        data=DataConfig(packs_per_step=8),
        optim=OptimConfig(lr=2e-4, warmup_steps=50),
        run=RunConfig(steps=2000),
    )


def full() -> Config:
    """Every weight of OmniGen-v1 in float32 with bfloat16 compute, on one 80 GB device."""
    return Config(
        model=ModelConfig(source="Shitao/OmniGen-v1-diffusers", gradient_checkpointing="full"),
        data=DataConfig(packs_per_step=32),
        optim=OptimConfig(lr=2e-5, warmup_steps=500, schedule="cosine"),
        run=RunConfig(steps=10_000),
    )


def in_stages(base: Config, table: Mapping[str, StageConfig], warmup_steps: int) -> Config:
    """Stages with a warm-up before the first; the others go on with its optimizer, and at no higher a rate.

    The settings outside of `stages` are those of the last one, which takes the longest samples.
    """
    warm = {"1": replace(table["1"], warmup_steps=warmup_steps)}
    staged = replace(base, stages=StagesConfig(table={**table, **warm}))
    return replace(staged.at_stage(len(table)), stages=staged.stages)


def stages() -> Config:
    """Every weight, from 256 to 2240 pixels and then at all resolutions, as in the paper."""
    base = full()
    return in_stages(replace(base, optim=replace(base.optim, schedule="constant")), PAPER, warmup_steps=1000)


def one_stage(number: str) -> Config:
    """A stage of the paper by itself."""
    base = stages()
    return replace(base, stages=StagesConfig(table={"1": replace(PAPER[number], warmup_steps=1000)})).at_stage(1)


def tiny_stages() -> Config:
    """`tiny` from 32 to 96 pixels and then at all sizes between."""
    return in_stages(tiny(), TINY, warmup_steps=10)


PRESETS: dict[str, Callable[[], Config]] = {
    "tiny": tiny,
    "lora": lora,
    "full": full,
    "stages": stages,
    "tiny_stages": tiny_stages,
    **{f"stage{number}": partial(one_stage, number) for number in PAPER},
}


def preset(name: str, assignments: Iterable[str] = ()) -> Config:
    """The settings of a preset with some of them changed.

    Raises:
        ConfigError: no such preset or setting.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1) or list(PRESETS)
        raise ConfigError(f"unknown preset {name!r}; did you mean {' or '.join(near)}?")
    return override(PRESETS[name](), assignments)
