"""Where a token is and when: RoPE over the rows of a sequence, sine-cosine grids over images, sinusoids of time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]
"""cos and sin, float32 [T, 1, head_dim / 2] each."""


class RotaryEmbedding:
    """LongRoPE tables (arXiv:2402.13753) as in Phi-3: per row the short or the long frequencies.

    Not a module, so that casting the model to bfloat16 cannot round the frequencies.
    """

    def __init__(
        self,
        *,
        head_dim: int,
        base: float,
        short_factor: list[float],
        long_factor: list[float],
        max_positions: int,
        original_max_positions: int,
    ) -> None:
        with torch.device("cpu"):
            exponents = torch.arange(0, head_dim, 2).float() / head_dim
            self._frequencies = 1.0 / (torch.tensor([short_factor, long_factor]) * base**exponents)
        self._on_device: dict[torch.device, Tensor] = {}
        extension = max_positions / original_max_positions
        self.scaling = math.sqrt(1 + math.log(extension) / math.log(original_max_positions)) if extension > 1 else 1.0

    def __call__(self, position_ids: Tensor, use_long: Tensor) -> Rope:
        """int64 [T] and bool [T] -> cos and sin."""
        device = position_ids.device
        if device not in self._on_device:
            self._on_device[device] = self._frequencies.to(device)
        short, long = self._on_device[device]
        angles = position_ids[:, None].float() * torch.where(use_long[:, None], long, short)
        return angles.cos()[:, None] * self.scaling, angles.sin()[:, None] * self.scaling


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Apply RoPE to [T, H, K] in fp32, pairing component i with i + K/2 (the Llama and Phi layout)."""
    cos, sin = rope
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def timestep_sinusoid(timestep: Tensor, size: int) -> Tensor:
    """[cos(t ω_k), sin(t ω_k)] with ω_k = 10000^(-2k / size): float32 [S] -> float32 [S, size]."""
    half = size // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=timestep.device) / half)
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def sincos_pos_embed(size: int, grid: int, base_size: int = 64) -> Tensor:
    """2-D sine-cosine position embedding float32 [grid², size], x in the first half of the channels, y in the second.

    Coordinates run over [0, base_size), as in PixArt-α and SD3 (arXiv:2403.03206, section 4.1).
    """
    coordinate = torch.arange(grid, dtype=torch.float32) / (grid / base_size)
    frequencies = 10000.0 ** -(torch.arange(size // 4, dtype=torch.float64) / (size / 4))
    angles = coordinate[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    x, y = axis[None].expand(grid, -1, -1), axis[:, None].expand(-1, grid, -1)
    return torch.cat([x, y], dim=2).flatten(0, 1).float()
