"""Rectified flow: the noised latents, the velocity to predict, and the loss that is weighted by what an edit changes.

Notation of OmniGen (arXiv 2409.11340, eq. 1): t = 1 is data, t = 0 is noise,
`x_t = t * x + (1 - t) * eps`, and the model predicts the velocity `x - eps`. All of it is float32: upstream's bfloat16
timesteps have a resolution of 1/256 near the data end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

WeightMode = Literal["latent", "mask", "paper", "none"]
Reduction = Literal["token", "sample"]


def sample_timesteps(
    count: int, generator: torch.Generator, *, mean: float = 0.0, std: float = 1.0, device: torch.device | str = "cpu"
) -> Tensor:
    """Logit-normal timesteps `sigmoid(N(mean, std))` (arXiv 2403.03206, sec. 3.1): float32 [count] in (0, 1).

    They are drawn on the device of `generator` and moved to `device`, so that a CPU generator gives the same
    timesteps wherever the model runs.
    """
    normal = torch.randn(count, generator=generator, device=generator.device)
    return torch.sigmoid(mean + std * normal).to(device)


def shift_timesteps(timesteps: Tensor, num_tokens: Tensor | int) -> Tensor:
    """Move timesteps towards noise for large images, OmniGen2's "dynamic time shift" (`transport.py`, version 1).

    The noise level `s = 1 - t` becomes `k * s / (1 + (k - 1) * s)` with `k = exp(mu)`, where `mu` is linear in the
    number of output tokens: 0.5 at 256 tokens (256 px square), 1.15 at 4096 (1024 px square).

    Args:
        timesteps: float32 [B].
        num_tokens: number of target tokens of each sample, [B], or one for all.
    """
    mu = 0.5 + (torch.as_tensor(num_tokens, device=timesteps.device) - 256) * (1.15 - 0.5) / (4096 - 256)
    k, noise_level = torch.exp(mu.to(timesteps.dtype)), 1 - timesteps
    return 1 - k * noise_level / (1 + (k - 1) * noise_level)


def timestep_bin(timesteps: Tensor, bins: int = 10) -> Tensor:
    """Index of the equal-width bin of [0, 1] that each timestep falls in: int64, same shape, for per-t reporting."""
    return (timesteps * bins).long().clamp(0, bins - 1)


def interpolate(latents: Tensor, noise: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """The noised latents and the velocity that leads from the noise to the data.

    Args:
        latents: data x, any float dtype and shape [...].
        noise: standard normal eps, same shape.
        timestep: t in [0, 1], broadcast against `latents` from the left (a scalar, or [B] for [B, ...]).

    Returns:
        `t * x + (1 - t) * eps` and `x - eps`, both float32.
    """
    latents, noise = latents.float(), noise.float()
    t = timestep.float().reshape(timestep.shape + (1,) * (latents.ndim - timestep.ndim))
    return t * latents + (1 - t) * noise, latents - noise


@dataclass(frozen=True, slots=True, kw_only=True)
class EditWeighting:
    """How strongly the loss of an edit sample looks at what changed. Without it models learn to copy the input.

    Modes:
        latent: the rule the OmniGen authors trained with (a comment in their train.py; issues 62, 188). With
            `d = |target - source|` over scaled latents and `m = mean(d)`: the weight is 0 everywhere if
            `m < identical`, 1 everywhere if `m > overall`, and in between `clamp(1 / m, low, high)` where
            `d > changed` and 1 elsewhere.
        mask: the same clamp with the area of the sample's edit mask as `m`, for masks that are trusted more than
            latent differences: 0 if the mask is empty, 1 if it covers more than `overall`.
        paper: eq. 2 to the letter, `1 / ||target - source||^2` where the two differ, the norm being that of the whole
            image. For ablation: issue 188 reports that training with it fails.
        none: no weights.

    The defaults hold for latents of unit scale, as SDXL's VAE gives with its scaling factor.
    """

    mode: WeightMode = "latent"
    identical: float = 0.001
    overall: float = 0.8
    changed: float = 0.3
    low: float = 5.0
    high: float = 64.0

    def __post_init__(self) -> None:
        if self.mode not in get_args(WeightMode):
            raise ValueError(f"edit weight mode {self.mode!r} is not one of {', '.join(get_args(WeightMode))}")
        if not 0 <= self.identical < self.overall or not 0 < self.low <= self.high:
            raise ValueError(f"edit weight thresholds need 0 <= identical < overall and 0 < low <= high: {self}")

    def weights(
        self,
        target: Tensor,
        inputs: Sequence[Tensor],
        edit_source_index: int,
        edit_mask: Tensor | None = None,
    ) -> Tensor | None:
        """The loss weight of every element of a sample's target, or None if the sample is not weighted.

        Args:
            target: scaled latents [C, h, w]. Of target and inputs take the posterior mean, for two draws from a
                posterior differ everywhere.
            inputs: scaled latents of the sample's input images.
            edit_source_index: which input the target is an edit of; -1 if none is, or if it was dropped from the
                condition.
            edit_mask: bool [H, W] in pixels of the target, true where it was edited; mode `mask` needs it.

        Returns:
            float32 [C, h, w], detached.

        Raises:
            ValueError: if source and target differ in shape, or the mask is missing or of another size.
            IndexError: if `edit_source_index` names no input.
        """
        if self.mode == "none" or edit_source_index == -1:
            return None
        if not 0 <= edit_source_index < len(inputs):
            raise IndexError(f"edit_source_index {edit_source_index} of a sample with {len(inputs)} input images")
        source = inputs[edit_source_index]
        if source.shape != target.shape:
            raise ValueError(
                f"edit source latents {tuple(source.shape)} and target latents {tuple(target.shape)} differ in shape: "
                "fit both by one window (fit_pair), or set edit_source_index to -1"
            )
        target, source = target.detach().float(), source.detach().float()
        if self.mode == "mask":
            return self._by_mask(target, edit_mask)
        difference = (target - source).abs()
        if self.mode == "paper":
            return torch.where(difference > 0, 1 / difference.square().sum(), 1.0)
        return self._by_amount(difference.mean(), difference > self.changed, self.identical)

    def _by_mask(self, target: Tensor, edit_mask: Tensor | None) -> Tensor:
        if edit_mask is None:
            raise ValueError("edit weight mode 'mask' needs an edit_mask, and this sample has none: use mode 'latent'")
        height, width = target.shape[-2:]
        factor = edit_mask.shape[0] // height
        if edit_mask.shape != (height * factor, width * factor):
            raise ValueError(
                f"edit mask {tuple(edit_mask.shape)} does not lie over target latents {tuple(target.shape)}: "
                "fit it like the target (fit_mask)"
            )
        # A latent cell is edited if any pixel of it is.
        changed = F.max_pool2d(edit_mask[None].to(target), factor) > 0
        return self._by_amount(changed.float().mean(), changed.expand_as(target), torch.finfo(torch.float32).tiny)

    def _by_amount(self, amount: Tensor, changed: Tensor, identical: float) -> Tensor:
        strength = (1 / (amount + 1e-6)).clamp(self.low, self.high)
        strength = torch.where(amount > self.overall, 1.0, strength)
        return torch.where(amount < identical, 0.0, torch.where(changed, strength, 1.0))


@dataclass(frozen=True, slots=True)
class FlowLoss:
    """The loss to minimise and what to report.

    Attributes:
        loss: float32 scalar with gradient.
        weighted: float32 [B], detached; mean over the elements of each sample, with the edit weights.
        unweighted: float32 [B], detached; the same without, to be compared between tasks and timestep bins.
    """

    loss: Tensor
    weighted: Tensor
    unweighted: Tensor


def flow_loss(
    predictions: Sequence[Tensor],
    velocities: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    *,
    reduction: Reduction = "token",
    denominator: Tensor | float | None = None,
) -> FlowLoss:
    """Mean squared error of the velocity over a batch of samples that differ in size.

    Weights are not divided by their sum: as in the authors' rule, an edit counts for more than other samples do, and
    one of weight 0 for nothing, though it still counts in the denominator.

    Args:
        predictions: per sample, any shape and float dtype.
        velocities: per sample, float32 of the same shape.
        weights: per sample, the same shape, or None for weight 1.
        reduction: `token` divides the sum over all elements by their number, so that every token weighs the same
            whatever the size of its image. `sample` averages the per-sample means as the public trainer does.
        denominator: number of elements (`token`) or samples (`sample`) to divide by. Give the count over all ranks
            and accumulation steps when the batch is a part of a larger one; by default it is the batch's own.

    Raises:
        ValueError: if a sample's tensors differ in shape, or the sequences in length.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction {reduction!r} is not one of {', '.join(get_args(Reduction))}")
    weighted_sums, unweighted_sums = [], []
    for index, (prediction, velocity, weight) in enumerate(zip(predictions, velocities, weights, strict=True)):
        if prediction.shape != velocity.shape or (weight is not None and weight.shape != velocity.shape):
            raise ValueError(
                f"sample {index}: prediction {tuple(prediction.shape)}, velocity {tuple(velocity.shape)} and weight "
                f"{'none' if weight is None else tuple(weight.shape)} differ in shape"
            )
        error = (prediction.float() - velocity).square()
        unweighted_sums.append(error.sum().detach())
        weighted_sums.append(error.sum() if weight is None else (error * weight).sum())

    sums = torch.stack(weighted_sums)
    counts = torch.tensor([float(velocity.numel()) for velocity in velocities]).to(sums.device, non_blocking=True)
    means = sums / counts
    if reduction == "token":
        loss = sums.sum() / (counts.sum() if denominator is None else denominator)
    else:
        loss = means.sum() / (len(means) if denominator is None else denominator)
    return FlowLoss(loss, means.detach(), torch.stack(unweighted_sums) / counts)
