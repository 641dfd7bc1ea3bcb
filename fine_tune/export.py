"""A trained run as files that other programs open."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from fine_tune.adapters import add_adapter, merge_adapter, save_adapter
from fine_tune.checkpoint import find_checkpoints, open_part
from fine_tune.layouts import StateDict, check_complete, check_state, resolve, save_official, save_pipeline
from fine_tune.model import OmniGen, OmniGenConfig
from fine_tune.presets import Config, ConfigError, ModelConfig
from fine_tune.shards import ShardReader, split_by_size
from fine_tune.state import load_model
from fine_tune.storage import Location

Format = Literal["diffusers", "official", "peft"]

FILE_BYTES = 5_000_000_000


def export_run(
    run: Location | Path | str,
    out: Path,
    format: Format = "diffusers",
    merge: bool = False,
    average: bool = False,
    *,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write the newest checkpoint of a run. Of a full fine-tune not more than one file is held in memory.

    Args:
        run: folder of the run, a path or an fsspec URL.
        out: folder to write to.
        format: `diffusers` (a pipeline with VAE and tokenizer), `official` (VectorSpaceLab's OmniGen) or `peft` (the
            adapter alone).
        merge: add the adapter to the weights it was trained on; a run with an adapter needs it for the first two.
        average: take the moving average of the weights instead of the weights.
        file_bytes: most that a weights file has; a larger model is written to several and an index.

    Raises:
        ConfigError: the run has no checkpoint, or cannot be written in that format.
    """
    config = Config.from_dict((Location.of(run) / "config.json").read_json())
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
    checkpoint = checkpoints[-1]
    averages = open_part(checkpoint, "average")
    if average and not averages.pieces:
        raise ConfigError(f"{checkpoint} has no moving average: it was trained with optim.ema_decay=0")
    if has_adapter:
        model = _with_adapter(config, averages if average else open_part(checkpoint, "adapter"))
        if format == "peft":
            save_adapter(model, out)
            return out
        merge_adapter(model)
        model_config, state = model.config, model.state_dict()
        parts: Iterator[StateDict] = ({n: state[n] for n in names} for names in _files(state, file_bytes))
    else:
        model_config = OmniGenConfig.from_dict((checkpoint / "transformer" / "config.json").read_json())
        readers = (
            [averages, open_part(checkpoint, "transformer")] if average else [open_part(checkpoint, "transformer")]
        )
        parts = _read(readers, model_config, file_bytes)
    if format == "official":
        save_official(out, model_config, parts)
        return out
    folders = {name: part_folder(config.model, name) for name in ("vae", "tokenizer")}
    save_pipeline(out, model_config, parts, vae=folders["vae"], tokenizer=folders["tokenizer"])
    return out


def _files(state: StateDict, file_bytes: int) -> Iterator[list[str]]:
    return split_by_size({name: tensor.nbytes for name, tensor in state.items()}, file_bytes)


def _read(readers: list[ShardReader], config: OmniGenConfig, file_bytes: int) -> Iterator[StateDict]:
    """The weights of a model, as many at a time as go to a file; each from the first reader that has it."""
    found = {name: tensor for reader in reversed(readers) for name, tensor in reader.describe().items()}
    check_complete(config, found)
    for names in _files(found, file_bytes):
        yield {name: next(r for r in readers if name in r.pieces).tensor(name) for name in names}


def _with_adapter(config: Config, saved: ShardReader) -> OmniGen:
    model = load_model(config.model, config.data.seed, torch.device("cpu"))
    add_adapter(model, config.model, config.data.seed)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    check_state({name: parameter.detach() for name, parameter in trained.items()}, saved.describe())
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved.tensor(name))
    return model


def part_folder(config: ModelConfig, name: Literal["vae", "tokenizer"] | str) -> Path:
    """Local folder of the VAE or the tokenizer of a run."""
    given = config.vae if name == "vae" else config.tokenizer
    return resolve(given, ["*"]) if given else resolve(config.source, [f"{name}/*"]) / name
