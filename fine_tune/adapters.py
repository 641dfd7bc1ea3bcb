"""Low-rank adapters on the linear layers of the blocks, through `peft`, in its file format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fine_tune.model import OmniGen
from fine_tune.presets import ModelConfig

WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # what PeftModel puts before the names of the model it wraps


def add_adapter(model: OmniGen, config: ModelConfig, seed: int) -> None:
    """Freeze the model and put float32 adapters on it that change nothing yet.

    Raises:
        ValueError: no layer has one of the target names.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapter = LoraConfig(
        r=config.adapter_rank,
        lora_alpha=config.adapter_alpha,
        lora_dropout=config.adapter_dropout,
        target_modules=list(config.adapter_targets),
        use_dora=config.adapter == "dora",
        base_model_name_or_path=config.source,
    )
    model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(adapter, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            # Under autocast a float32 copy of the input, per adapted layer, would only be cast back.
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]


def adapter_state(model: OmniGen) -> dict[str, Tensor]:
    """The adapter's tensors under the names that `PeftModel.from_pretrained` reads."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {_PREFIX + name: tensor.detach() for name, tensor in state.items()}


def save_adapter(model: OmniGen, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    _peft_config(model).save_pretrained(str(folder))
    save_file({name: tensor.contiguous() for name, tensor in adapter_state(model).items()}, folder / WEIGHTS_NAME)


def merge_adapter(model: OmniGen) -> None:
    """Add the adapter to the weights and take it off; the model is a plain OmniGen again.

    Raises:
        ValueError: the merged weights are not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())


def _peft_config(model: OmniGen) -> Any:
    return model.peft_config["default"]  # type: ignore[index, union-attr]
