"""From a batch of images to the flow loss; shared by training and held-out measurement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fine_tune.data import Batch
from fine_tune.flow import FlowLoss, flow_loss, interpolate, sample_timesteps, shift_timesteps
from fine_tune.state import TrainState
from fine_tune.vae import Posterior


@dataclass(frozen=True)
class Latents:
    """A batch after the VAE: float32 [C, h, w] each.

    Attributes:
        shown: of the input images, drawn from their posteriors, in row order of the pack.
        targets: drawn from their posteriors, one per example.
        weights: of the loss per example, or None; computed from the posterior means.
    """

    shown: list[Tensor]
    targets: list[Tensor]
    weights: list[Tensor | None]


def make_generators(state: TrainState, batch: Batch, offset: int = 0) -> list[torch.Generator]:
    """One per example, on the device, from which everything random about it is drawn."""
    return [torch.Generator(state.device).manual_seed(example.seed + offset) for example in batch.examples]


def encode(state: TrainState, batch: Batch, generators: list[torch.Generator]) -> Latents:
    """Draw the latents of a batch: of cached moments, or of its images, those of one size encoded together."""
    pixels = [image for example in batch.examples if not example.encoded for image in (*example.inputs, example.target)]
    encoded = iter(state.vae.encode(pixels))
    weighting = state.config.flow.weighting
    shown, targets, weights = [], [], []
    for example, generator in zip(batch.examples, generators, strict=True):
        images = (*example.inputs, example.target)
        *of_inputs, of_target = [Posterior.from_moments(x) if example.encoded else next(encoded) for x in images]
        inputs = [posterior.sample(generator) for posterior in of_inputs]
        shown += [inputs[index] for index in example.shown]
        targets.append(of_target.sample(generator))
        means = [posterior.mean for posterior in of_inputs]
        weights.append(weighting.weights(of_target.mean, means, example.edit_source_index, example.edit_mask))
    return Latents(shown, targets, weights)


def compute_loss(
    state: TrainState,
    batch: Batch,
    latents: Latents,
    generators: list[torch.Generator],
    *,
    timestep: Tensor | None = None,
    denominator: Tensor | None = None,
) -> tuple[FlowLoss, Tensor]:
    """Noise the targets, predict their velocity, compare.

    Args:
        timestep: float32 [S], one per draw of a target; drawn unless given.
        denominator: of the loss, see `flow_loss`.

    Returns:
        The loss, and the timesteps.
    """
    flow = state.config.flow
    generators, targets = batch.per_draw(generators), batch.per_draw(latents.targets)
    weights = batch.per_draw(latents.weights)
    if timestep is None:
        draws = [sample_timesteps(1, g, mean=flow.t_mean, std=flow.t_std, device=state.device) for g in generators]
        timestep = torch.cat(draws)
        if flow.time_shift:
            tokens = torch.tensor([h * w for h, w in batch.pack.target_sizes])
            timestep = shift_timesteps(timestep, tokens.to(state.device, non_blocking=True))
    noised, velocities = [], []
    for target, t, generator in zip(targets, timestep, generators, strict=True):
        noise = torch.randn(target.shape, generator=generator, device=target.device)
        noisy, velocity = interpolate(target, noise, t)
        noised.append(noisy)
        velocities.append(velocity)
    # What DDP adds to the module is only of use with gradients.
    network = state.network if torch.is_grad_enabled() else state.model
    with state.autocast():
        predictions = network(batch.pack, latents.shown, noised, timestep)
    loss = flow_loss(predictions, velocities, weights, reduction=flow.reduction, denominator=denominator)
    return loss, timestep
