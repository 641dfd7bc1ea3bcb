"""Checkpoint layouts: diffusers (our own names), the official OmniGen release (fused qkv), and Phi-3 to start from.

Sources are a folder or a Hugging Face Hub id; a folder goes first. Keys and shapes must match exactly.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fine_tune.attention import Backend
from fine_tune.embeddings import sincos_pos_embed
from fine_tune.model import OmniGen, OmniGenConfig

StateDict = dict[str, Tensor]
Weights = StateDict | Iterable[StateDict]
"""All tensors of a model, or some at a time: blocks as a whole, and not more than memory has room for."""

DIFFUSERS_STEM = "diffusion_pytorch_model"
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json")

# Official prefix -> ours.
_PREFIXES = {
    "pos_embed": "patch_embedding.pos_embed",
    "x_embedder.proj.": "patch_embedding.output_image_proj.",
    "input_x_embedder.proj.": "patch_embedding.input_image_proj.",
    "time_token.mlp.0.": "time_token.linear_1.",
    "time_token.mlp.2.": "time_token.linear_2.",
    "t_embedder.mlp.0.": "t_embedder.linear_1.",
    "t_embedder.mlp.2.": "t_embedder.linear_2.",
    "final_layer.adaLN_modulation.1.": "norm_out.linear.",
    "final_layer.linear.": "proj_out.",
    "llm.layers.": "layers.",
    "llm.embed_tokens.": "embed_tokens.",
    "llm.norm.": "norm.",
}
_OUT_PROJECTION = (".self_attn.o_proj.", ".self_attn.to_out.0.")
_FUSED, _SPLIT = ".self_attn.qkv_proj.", (".self_attn.to_q.", ".self_attn.to_k.", ".self_attn.to_v.")


class CheckpointError(ValueError):
    """A checkpoint whose tensors are not those of the model."""


def from_official(state: StateDict) -> StateDict:
    """Names of the official release -> ours; each fused ``qkv_proj`` is split. Values stay bitwise the same."""
    ours: StateDict = {}
    for key, tensor in state.items():
        name = _rename(key, list(_PREFIXES.items())).replace(*_OUT_PROJECTION)
        if _FUSED in name:
            for part, value in zip(_SPLIT, _split_qkv(tensor), strict=True):
                ours[name.replace(_FUSED, part)] = value
        else:
            ours[name] = tensor
    return ours


def to_official(state: StateDict) -> StateDict:
    """The inverse of `from_official`."""
    official: StateDict = {}
    for key, tensor in state.items():
        name = _rename(key, [(ours, theirs) for theirs, ours in _PREFIXES.items()]).replace(*_OUT_PROJECTION[::-1])
        if _SPLIT[0] in name:
            parts = [state[key.replace(_SPLIT[0], part)] for part in _SPLIT]
            official[name.replace(_SPLIT[0], _FUSED)] = torch.cat(parts)
        elif not any(part in name for part in _SPLIT):
            official[name] = tensor
    return official


def _rename(key: str, prefixes: list[tuple[str, str]]) -> str:
    for old, new in prefixes:
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def _split_qkv(fused: Tensor) -> list[Tensor]:
    """[q + k + v rows, D] with as many q rows as columns; own storage each, so that a part can be saved alone."""
    q_rows = fused.shape[1]
    kv_rows = (fused.shape[0] - q_rows) // 2
    return [part.clone() for part in fused.split([q_rows, kv_rows, kv_rows])]


def load_transformer(
    source: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attention_backend: Backend = "auto",
) -> OmniGen:
    """Load OmniGen from the diffusers layout (a pipeline or its transformer folder) or the official one.

    Args:
        source: folder or Hub id, e.g. ``Shitao/OmniGen-v1-diffusers`` or ``Shitao/OmniGen-v1``.
        dtype: of parameters and buffers, whatever the file holds.

    Raises:
        FileNotFoundError: no such folder, or no OmniGen checkpoint in it.
        CheckpointError: missing, unexpected or mis-shaped tensors.
    """
    folder = _transformer_folder(resolve(source, ["transformer/*", "config.json", "model.safetensors", "model.pt"]))
    values = json.loads((folder / "config.json").read_text())
    if "_class_name" in values:
        config, state = OmniGenConfig.from_dict(values), _read_safetensors(folder, DIFFUSERS_STEM)
    else:
        official = _read_official(folder)
        state = from_official(official)
        config = replace(
            _config_of_phi3(values, folder),
            pos_embed_max_size=math.isqrt(official["pos_embed"].shape[1]),
            time_step_dim=official["time_token.mlp.0.weight"].shape[1],
        )
    return _assemble(config, state, dtype, device, attention_backend)


def read_config(source: str | Path) -> OmniGenConfig:
    """The architecture of what `load_transformer` would load, without its weights; raises what that does."""
    folder = _transformer_folder(resolve(source, ["transformer/config.json", "config.json"]))
    values = json.loads((folder / "config.json").read_text())
    return OmniGenConfig.from_dict(values) if "_class_name" in values else _config_of_phi3(values, folder)


def _transformer_folder(folder: Path) -> Path:
    if (folder / "transformer" / "config.json").is_file():
        return folder / "transformer"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds neither transformer/config.json nor config.json")
    return folder


def from_phi3(
    source: str | Path,
    generator: torch.Generator,
    vocab_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> OmniGen:
    """Start OmniGen from a Phi-3 language model, as the paper does (arXiv:2409.11340, section 2.1).

    Embeddings, blocks and final norm are Phi-3's; patch projections, time MLPs and output layer are fresh, the output
    layer zero (VectorSpaceLab/OmniGen, `OmniGen/model.py`, `initialize_weights`), so the first prediction is 0.

    Args:
        source: folder or Hub id of a transformers Phi-3 checkpoint in safetensors.
        generator: on the CPU; draws the fresh weights.
        vocab_size: rows of the new vocabulary, at least Phi-3's; additional rows are drawn from N(0, 0.02²).
        config: further `OmniGenConfig` fields, e.g. ``pos_embed_max_size``.

    Raises:
        ValueError: a smaller vocabulary, or a variant of Phi-3 that OmniGen is not built on.
        CheckpointError: tensors that are not Phi-3's.
    """
    folder = resolve(source, ["config.json", "model*.safetensors", "model.safetensors.index.json"])
    omnigen_config = replace(_config_of_phi3(json.loads((folder / "config.json").read_text()), folder), **config)
    phi3 = {re.sub("^model\\.", "", key): value for key, value in _read_safetensors(folder, "model").items()}
    language = {f"llm.{key}": phi3[key] for key in phi3 if key.startswith(("embed_tokens.", "layers.", "norm."))}
    state = from_official(language)

    old_vocab = omnigen_config.vocab_size
    if vocab_size is not None:
        if vocab_size < old_vocab:
            raise ValueError(f"vocab_size {vocab_size} is smaller than the {old_vocab} rows of {source}")
        omnigen_config = replace(omnigen_config, vocab_size=vocab_size)
    if omnigen_config.vocab_size > old_vocab and "embed_tokens.weight" in state:
        embedding = state["embed_tokens.weight"]
        added = torch.empty(omnigen_config.vocab_size - old_vocab, embedding.shape[1])
        added.normal_(std=0.02, generator=generator)
        state["embed_tokens.weight"] = torch.cat([embedding, added.to(embedding.dtype)])
    return _assemble(omnigen_config, state | _fresh_state(omnigen_config, generator), dtype, "cpu", "auto")


def resolve(source: str | Path, patterns: list[str]) -> Path:
    """A local folder as it is; otherwise the snapshot of a Hub id ``owner/name``, limited to ``patterns``."""
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise FileNotFoundError(f"{source} is neither a folder nor a Hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(source), allow_patterns=patterns))


def check_state(expected: StateDict, actual: StateDict) -> None:
    """CheckpointError listing what is missing, unexpected or of another shape."""
    misshaped = [
        f"{key} is {list(actual[key].shape)}, not {list(tensor.shape)}"
        for key, tensor in expected.items()
        if key in actual and actual[key].shape != tensor.shape
    ]
    problems = {
        "missing": sorted(expected.keys() - actual.keys()),
        "unexpected": sorted(actual.keys() - expected.keys()),
        "mis-shaped": misshaped,
    }
    texts = [
        f"{len(found)} {kind}: {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}"
        for kind, found in problems.items()
        if found
    ]
    if texts:
        raise CheckpointError("the checkpoint does not fit the model; " + "; ".join(texts))


def check_complete(config: OmniGenConfig, weights: Weights) -> None:
    """CheckpointError if a whole state is not that of a model of this config; parts cannot be checked."""
    if not isinstance(weights, dict):
        return
    with torch.device("meta"):
        check_state(OmniGen(config).state_dict(), weights)


def _assemble(
    config: OmniGenConfig, state: StateDict, dtype: torch.dtype, device: torch.device | str, backend: Backend
) -> OmniGen:
    with torch.device("meta"):
        model = OmniGen(config, backend)
    check_state(model.state_dict(), state)
    model.load_state_dict({key: value.to(device, dtype) for key, value in state.items()}, assign=True)
    return model


def _read_safetensors(folder: Path, stem: str) -> StateDict:
    index = folder / f"{stem}.safetensors.index.json"
    names = {f"{stem}.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    missing = [name for name in sorted(names) if not (folder / name).is_file()]
    if missing and any(folder.glob("shard-*.safetensors")):
        raise FileNotFoundError(f"{folder} holds a model in pieces of several ranks: make one of it with `x2i export`")
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}")
    return {key: value for name in sorted(names) for key, value in load_file(folder / name).items()}


def _read_official(folder: Path) -> StateDict:
    if (folder / "model.pt").is_file() and not (folder / "model.safetensors").is_file():
        state = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
    else:
        state = _read_safetensors(folder, "model")
    if "pos_embed" not in state or "time_token.mlp.0.weight" not in state:
        raise CheckpointError(f"{folder} holds no OmniGen model; if it is a Phi-3, start with from_phi3")
    return state


def _config_of_phi3(values: dict[str, Any], folder: Path) -> OmniGenConfig:
    """From the ``config.json`` of a Phi-3 (transformers 4 or 5 spelling); the official OmniGen release has one too."""
    if values.get("model_type") != "phi3":
        raise CheckpointError(f"{folder}/config.json describes neither OmniGen nor Phi-3")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"{folder} rotates only a part of each head (partial_rotary_factor), which OmniGen does not")
    heads, size = values["num_attention_heads"], values["hidden_size"]
    no_scaling = [1.0] * (size // heads // 2)
    max_positions = values["max_position_embeddings"]
    original_positions = values.get("original_max_position_embeddings", max_positions)
    return OmniGenConfig(
        hidden_size=size,
        rms_norm_eps=values["rms_norm_eps"],
        num_attention_heads=heads,
        num_key_value_heads=values.get("num_key_value_heads") or heads,
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        pad_token_id=values["pad_token_id"],
        vocab_size=values["vocab_size"],
        max_position_embeddings=max_positions,
        original_max_position_embeddings=rope.get("original_max_position_embeddings", original_positions),
        rope_base=int(rope.get("rope_theta", values.get("rope_theta", 10000))),
        rope_scaling={
            "long_factor": rope.get("long_factor", no_scaling),
            "short_factor": rope.get("short_factor", no_scaling),
            "type": "su",
        },
    )


def _fresh_state(config: OmniGenConfig, generator: torch.Generator) -> StateDict:
    """The parts that Phi-3 does not have, initialised as OmniGen's authors do."""
    size, patch_values = config.hidden_size, config.patch_size**2 * config.in_channels
    state = {"patch_embedding.pos_embed": sincos_pos_embed(size, config.pos_embed_max_size)[None]}
    for name in ("output_image_proj", "input_image_proj"):
        weight = nn.init.xavier_uniform_(torch.empty(size, patch_values), generator=generator)
        kernel = weight.view(size, config.in_channels, config.patch_size, config.patch_size)
        state |= {f"patch_embedding.{name}.weight": kernel, f"patch_embedding.{name}.bias": torch.zeros(size)}
    for name in ("time_token", "t_embedder"):
        for layer, inputs in (("linear_1", config.time_step_dim), ("linear_2", size)):
            state[f"{name}.{layer}.weight"] = torch.empty(size, inputs).normal_(std=0.02, generator=generator)
            state[f"{name}.{layer}.bias"] = torch.zeros(size)
    for name, rows in (("norm_out.linear", 2 * size), ("proj_out", patch_values)):
        state |= {f"{name}.weight": torch.zeros(rows, size), f"{name}.bias": torch.zeros(rows)}
    return state


def save_transformer(directory: str | Path, config: OmniGenConfig, state: Weights) -> None:
    """Write ``config.json`` and ``diffusion_pytorch_model*.safetensors``: a diffusers ``OmniGenTransformer2DModel``.

    Raises:
        CheckpointError: ``state`` is a whole one, but not of a model of this config (e.g. wrapped or adapter names).
    """
    check_complete(config, state)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config.to_dict())
    _write_weights(folder, DIFFUSERS_STEM, state)


def save_official(directory: str | Path, config: OmniGenConfig, state: Weights) -> None:
    """Write ``config.json`` and ``model*.safetensors`` as VectorSpaceLab's ``OmniGen.from_pretrained`` reads them."""
    check_complete(config, state)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    phi3 = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "pad_token_id": config.pad_token_id,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "original_max_position_embeddings": config.original_max_position_embeddings,
        "rope_theta": float(config.rope_base),
        "rope_scaling": config.rope_scaling,
    }
    _write_json(folder / "config.json", phi3)
    _write_weights(folder, "model", state, to_official)


def save_pipeline(
    directory: str | Path,
    config: OmniGenConfig,
    state: Weights,
    *,
    vae: str | Path,
    tokenizer: str | Path,
    time_shift: float = 1.0,
) -> None:
    """Write a folder that ``diffusers.OmniGenPipeline.from_pretrained`` and `fine_tune.sample.Pipeline` both open.

    Args:
        vae: folder of the AutoencoderKL in diffusers layout, copied.
        tokenizer: folder with ``tokenizer.json`` and ``tokenizer_config.json``, copied.
        time_shift: of the sampling schedule; see `fine_tune.sample.sigmas`.
    """
    folder = Path(directory)
    save_transformer(folder / "transformer", config, state)
    _copy(Path(vae), folder / "vae", ("config.json", f"{DIFFUSERS_STEM}*"))
    _copy(Path(tokenizer), folder / "tokenizer", _TOKENIZER_FILES)
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "invert_sigmas": True,
        "num_train_timesteps": 1,
        "shift": time_shift,
    }
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": "OmniGenPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        # Not the class that tokenizer_config.json names: this one reads tokenizer.json as it is.
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "OmniGenTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write_json(folder / "model_index.json", index)


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    files = [file for pattern in patterns for file in source.glob(pattern) if file.is_file()]
    if not files:
        raise FileNotFoundError(f"{source} has none of the files {', '.join(patterns)}")
    for file in files:
        shutil.copyfile(file, target / file.name)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _write_weights(folder: Path, stem: str, weights: Weights, convert: Callable[[StateDict], StateDict] = dict) -> None:
    """One file, or one per part and an index. What was there under these names goes."""
    weight_map: dict[str, int] = {}
    size = number = 0
    for number, part in enumerate([weights] if isinstance(weights, dict) else weights, start=1):
        tensors = {key: value.contiguous() for key, value in convert(part).items()}
        save_file(tensors, folder / f".{stem}-{number}.partial", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, number)
        size += sum(tensor.nbytes for tensor in tensors.values())
    for old in folder.glob(f"{stem}*.safetensors*"):
        old.unlink()
    if number == 1:
        (folder / f".{stem}-1.partial").rename(folder / f"{stem}.safetensors")
        return
    names = {n: f"{stem}-{n:05d}-of-{number:05d}.safetensors" for n in range(1, number + 1)}
    for n, name in names.items():
        (folder / f".{stem}-{n}.partial").rename(folder / name)
    index = {"metadata": {"total_size": size}, "weight_map": {key: names[n] for key, n in weight_map.items()}}
    _write_json(folder / f"{stem}.safetensors.index.json", index)
