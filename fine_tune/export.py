"""A trained run as files that other programs open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file

from fine_tune.adapters import add_adapter, load_adapter, merge_adapter, save_adapter
from fine_tune.checkpoint import find_checkpoints
from fine_tune.layouts import load_transformer, resolve, save_official, save_pipeline
from fine_tune.model import OmniGen
from fine_tune.presets import Config, ConfigError, ModelConfig
from fine_tune.state import load_model

Format = Literal["diffusers", "official", "peft"]


def export_run(run: Path, out: Path, format: Format = "diffusers", merge: bool = False, average: bool = False) -> Path:
    """Write the newest checkpoint of a run.

    Args:
        run: folder of the run.
        out: folder to write to.
        format: `diffusers` (a pipeline with VAE and tokenizer), `official` (VectorSpaceLab's OmniGen) or `peft` (the
            adapter alone).
        merge: add the adapter to the weights it was trained on; a run with an adapter needs it for the first two.
        average: take the moving average of the weights instead of the weights.

    Raises:
        ConfigError: the run has no checkpoint, or cannot be written in that format.
    """
    config = Config.from_dict(json.loads((run / "config.json").read_text()))
    checkpoints = find_checkpoints(run)
    if not checkpoints:
        raise ConfigError(f"{run} has no checkpoint yet")
    has_adapter = config.model.adapter != "none"
    if format == "peft" and (not has_adapter or merge):
        raise ConfigError(
            "format peft is for the unmerged adapter of a run that trained one (model.adapter=lora or dora)"
        )
    if format != "peft" and has_adapter and not merge:
        raise ConfigError(f"format {format} has no place for an adapter: add --merge, or take format peft")
    model = _load(config, checkpoints[-1], average)
    if format == "peft":
        save_adapter(model, out)
        return out
    if has_adapter:
        merge_adapter(model)
    if format == "official":
        save_official(out, model.config, model.state_dict())
        return out
    parts = {name: part_folder(config.model, name) for name in ("vae", "tokenizer")}
    save_pipeline(out, model.config, model.state_dict(), vae=parts["vae"], tokenizer=parts["tokenizer"])
    return out


def part_folder(config: ModelConfig, name: Literal["vae", "tokenizer"] | str) -> Path:
    """Local folder of the VAE or the tokenizer of a run."""
    given = config.vae if name == "vae" else config.tokenizer
    return resolve(given, ["*"]) if given else resolve(config.source, [f"{name}/*"]) / name


def _load(config: Config, checkpoint: Path, average: bool) -> OmniGen:
    if config.model.adapter == "none":
        model = load_transformer(checkpoint / "transformer")
    else:
        model = load_model(config.model, config.data.seed, torch.device("cpu"))
        add_adapter(model, config.model, config.data.seed)
        load_adapter(model, checkpoint / "adapter")
    if average:
        if not (checkpoint / "average.safetensors").is_file():
            raise ConfigError(f"{checkpoint} has no moving average: it was trained with optim.ema_decay=0")
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in load_file(checkpoint / "average.safetensors").items():
                parameters[name].copy_(value)
    return model
