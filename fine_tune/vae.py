"""The frozen image autoencoder, in the scaled latents that the transformer sees."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any, overload

import torch
from torch import Tensor

MAX_BATCH_PIXELS = 2 * 1024 * 1024
"""Bounds the encoder's activations: one of SDXL's takes 0.5 GB for a 1024 px square in float32."""


@dataclass(frozen=True, slots=True)
class Posterior:
    """A diagonal Gaussian over scaled latents `(z - shift_factor) * scaling_factor`.

    Attributes:
        mean: float32 [C, h, w].
        logvar: float32 [C, h, w].
    """

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> Posterior:
        """From `moments` [2C, h, w] of any float dtype, as they are cached."""
        mean, logvar = moments.float().chunk(2)
        return cls(mean, logvar)

    @property
    def moments(self) -> Tensor:
        """Mean and log-variance as one tensor [2C, h, w], all that a latent cache has to hold."""
        return torch.cat([self.mean, self.logvar])

    def sample(self, generator: torch.Generator) -> Tensor:
        """One draw, float32 [C, h, w]; the noise is drawn on the device of `generator`."""
        noise = torch.randn(self.mean.shape, generator=generator, device=generator.device)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean.device)


class FrozenVAE:
    """An `AutoencoderKL` of diffusers that is never trained. Latents go in and come out scaled."""

    def __init__(self, module: Any) -> None:
        """Raises ValueError for float16 if the weights are known to overflow there (`force_upcast`, as SDXL's do)."""
        if module.dtype == torch.float16 and module.config.force_upcast:
            raise ValueError("this VAE overflows in float16 (its config says force_upcast): use float32 or bfloat16")
        self.module = module.eval().requires_grad_(False)
        self.scaling_factor = float(module.config.scaling_factor)
        self.shift_factor = float(module.config.shift_factor or 0.0)
        self.factor = 2 ** (len(module.config.block_out_channels) - 1)

    @cached_property
    def digest(self) -> str:
        """Identity of all that decides a posterior: the encoder's weights and the scale. 64 hexadecimal digits.

        The same weights give the same digest from a folder, from the Hub, or from a pipeline that contains them.
        """
        config, total = self.module.config, hashlib.sha256()
        shape = [config.act_fn, config.norm_num_groups, config.down_block_types]
        total.update(json.dumps([*shape, self.scaling_factor, self.shift_factor]).encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            if name.startswith(("encoder.", "quant_conv.")):
                total.update(f"{name}{list(tensor.shape)}".encode())
                total.update(tensor.float().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        *,
        subfolder: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> FrozenVAE:
        """Load from a folder or hub id in the diffusers layout (OmniGen checkpoints keep it in subfolder "vae")."""
        from diffusers import AutoencoderKL

        return cls(AutoencoderKL.from_pretrained(path, subfolder=subfolder, torch_dtype=dtype).to(device))

    @overload
    def encode(self, images: Tensor) -> Posterior: ...
    @overload
    def encode(self, images: Sequence[Tensor]) -> list[Posterior]: ...
    def encode(self, images: Tensor | Sequence[Tensor]) -> Posterior | list[Posterior]:
        """Encode one image, or many of any sizes with those of one size batched.

        Args:
            images: [3, H, W] in [-1, 1], or a list of them. H and W are multiples of the VAE's factor (8).

        Returns:
            The posterior over [C, H/8, W/8] of the image, or of each image in order, on the VAE's device.
        """
        if isinstance(images, Tensor):
            return self._encode_batch(images[None])[0]
        by_size = defaultdict(list)
        for position, image in enumerate(images):
            by_size[image.shape].append(position)
        posteriors: dict[int, Posterior] = {}
        for (_, height, width), positions in by_size.items():
            step = max(MAX_BATCH_PIXELS // (height * width), 1)
            for chunk in (positions[start : start + step] for start in range(0, len(positions), step)):
                batch = torch.stack([images[position] for position in chunk])
                posteriors.update(zip(chunk, self._encode_batch(batch), strict=True))
        return [posteriors[position] for position in range(len(images))]

    @torch.no_grad()
    def _encode_batch(self, images: Tensor) -> list[Posterior]:
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"image size {height}x{width} is not a multiple of the VAE's factor {self.factor}")
        latents = self.module.encode(self._to_module(images)).latent_dist
        mean = (latents.mean.float() - self.shift_factor) * self.scaling_factor
        logvar = latents.logvar.float() + 2 * math.log(self.scaling_factor)
        return [Posterior(*moments) for moments in zip(mean, logvar, strict=True)]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [C, h, w] or [B, C, h, w] to float32 images [(B,) 3, 8h, 8w] in [-1, 1]."""
        if latents.ndim == 3:
            return self.decode(latents[None])[0]
        latents = latents.float() / self.scaling_factor + self.shift_factor
        return self.module.decode(self._to_module(latents)).sample.float().clamp(-1, 1)

    def _to_module(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self.module.device, dtype=self.module.dtype)
