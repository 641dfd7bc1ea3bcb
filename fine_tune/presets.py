"""The settings of a run, and presets of them as plain functions. `key=value` changes one setting."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from fine_tune.attention import Backend
from fine_tune.flow import EditWeighting, Reduction
from fine_tune.order import AUTHORS_MIXTURE
from fine_tune.tiny import TOKENIZER_DIR, VAE_DIR

STRICT = ConfigDict(extra="forbid")
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
        compile: `torch.compile` every block.
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
    gradient_checkpointing: bool = False
    compile: bool = False
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
    """

    corpus: str = ""
    split: str = "train"
    held_out_split: str = "val"
    seed: int = 0
    max_side: int = 1024
    budget: int = 8448
    packs_per_step: int = 1
    mixture: dict[str, float] = field(default_factory=lambda: dict(AUTHORS_MIXTURE))
    drop_all: float = 0.1
    drop_text: float = 0.0
    drop_images: float = 0.0
    block: int = 512
    max_skip_rate: float = 0.01
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
    """

    weight_mode: Literal["latent", "mask", "paper", "none"] = "latent"
    reduction: Reduction = "token"
    t_mean: float = 0.0
    t_std: float = 1.0
    time_shift: bool = False
    __pydantic_config__ = STRICT

    @property
    def weighting(self) -> EditWeighting:
        return EditWeighting(mode=self.weight_mode)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How the weights are changed.

    Attributes:
        name: `adamw` (float32 weights) or `adamw_sr` (bfloat16 weights, stochastic rounding).
        schedule: after the warm-up, `constant` or `cosine` down to `min_lr_ratio` at `run.steps`.
        ema_decay: of the moving average of the weights; 0 keeps none.
    """

    name: Literal["adamw", "adamw_sr"] = "adamw"
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
        folder: of the run. Training resumes from the newest checkpoint in it.
        keep: how many checkpoints.
        held_out_samples, sample_images: how many samples of the held-out split are measured, and drawn.
        sample_steps: flow steps of a drawn image.
        device: "" takes CUDA where there is one.
        peak_tflops: of the device in bfloat16, to report MFU; 0 looks it up.
    """

    folder: str = "runs/x2i"
    steps: int = 1000
    log_every: int = 10
    eval_every: int = 500
    sample_every: int = 500
    save_every: int = 500
    keep: int = 2
    held_out_samples: int = 64
    sample_images: int = 4
    sample_steps: int = 30
    guidance_scale: float = 2.5
    img_guidance_scale: float = 1.6
    tensorboard: bool = True
    device: str = ""
    peak_tflops: float = 0.0
    __pydantic_config__ = STRICT


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    flow: FlowConfig = FlowConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if self.optim.name == "adamw_sr" and (self.model.dtype, self.model.adapter) != ("bfloat16", "none"):
            raise ConfigError("optim.name=adamw_sr is for model.dtype=bfloat16 without an adapter")
        if self.optim.name == "adamw" and (self.model.dtype, self.model.adapter) == ("bfloat16", "none"):
            raise ConfigError(
                "AdamW on bfloat16 weights loses most of its updates to rounding: "
                "use optim.name=adamw_sr, or model.dtype=float32"
            )
        if self.data.max_side % 16 or self.data.max_side < 16:
            raise ConfigError(f"data.max_side={self.data.max_side} is not a multiple of 16")
        positive = {"data.budget": self.data.budget, "data.packs_per_step": self.data.packs_per_step}
        for name, value in (positive | {"run.keep": self.run.keep, "run.log_every": self.run.log_every}).items():
            if value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")

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
        values = {name: dict(part) for name, part in self.to_dict().items() if name != "run"}
        for name in ("corpus", "workers", "prefetch", "max_skip_rate", "held_out_split"):
            del values["data"][name]  # where the corpus lies and how it is read; its content is in the index digest
        for name in ("attention_backend", "gradient_checkpointing", "compile"):
            del values["model"][name]
        if self.optim.schedule == "cosine":
            values["optim"]["steps"] = self.run.steps
        return values


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
        if entry:
            values[section][key][".".join(entry)] = value
        else:
            values[section][key] = "" if value is None else value
    return Config.from_dict(values)


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
        model=ModelConfig(source="Shitao/OmniGen-v1-diffusers", gradient_checkpointing=True),
        data=DataConfig(packs_per_step=32),
        optim=OptimConfig(lr=2e-5, warmup_steps=500, schedule="cosine"),
        run=RunConfig(steps=10_000),
    )


def _stage(max_side: int, steps: int, global_batch: int, lr: float) -> Config:
    """A stage of the paper's schedule (arXiv:2409.11340, table 1), the batch counted as text-to-image samples."""
    base, budget = full(), 16_896 if max_side <= 1024 else 21_120
    tokens = (max_side // 16) ** 2 + 128
    return replace(
        base,
        data=replace(base.data, max_side=max_side, budget=budget, packs_per_step=-(-global_batch * tokens // budget)),
        optim=OptimConfig(lr=lr, warmup_steps=1000),
        run=replace(base.run, steps=steps),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "tiny": tiny,
    "lora": lora,
    "full": full,
    "stage1": lambda: _stage(256, 500_000, 1040, 1e-4),
    "stage2": lambda: _stage(512, 300_000, 520, 1e-4),
    "stage3": lambda: _stage(1024, 100_000, 208, 4e-5),
    "stage4": lambda: _stage(2240, 30_000, 104, 2e-5),
    "stage5": lambda: _stage(1024, 80_000, 104, 2e-5),
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
