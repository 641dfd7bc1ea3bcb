"""Does the weighted flow loss make better edits? The same small model with and without it, on several seeds.

    python benchmarks/edit_loss.py --corpus DIR [--split train] [--seeds 5] [--steps 600] [--modes latent none]

Trains the `tiny` preset on the `edit` stream of a corpus once per mode and seed, equal in everything else, and measures
on the samples of a split (fixed timesteps and noise): `train` shows how well edits are learned in so many steps, `val`
how well they carry over to other photographs, of which a corpus of this size teaches little:

* mean squared error of the velocity, unweighted, over the latent cells that the edit changes and over the others,
* mean absolute pixel error (0 to 1) of drawn images inside and outside of the edit mask. The latter is where a model
  that only copies its input is perfect; the first is where it fails.

Prints one row per mode: medians over seeds, with the range.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from itertools import islice
from pathlib import Path

import torch

from fine_tune.flow import interpolate
from fine_tune.held_out import TIMESTEPS, HeldOut, to_image
from fine_tune.index import Corpus, CountRule, open_index
from fine_tune.objective import encode, make_generators
from fine_tune.presets import preset
from fine_tune.sample import Pipeline
from fine_tune.state import TrainState, build_state
from fine_tune.tokens import to_tensor
from fine_tune.train import check_records, make_loader, train_step

CHANGED = 0.3  # of a latent, as in the weighted loss


def train_once(
    corpus: str, split: str, mode: str, steps: int, *, seed: int, folder: Path
) -> tuple[TrainState, HeldOut]:
    config = preset(
        "tiny",
        (
            f"data.corpus={json.dumps(corpus)}",
            *("mixture={edit: 1}", f"weight_mode={mode}", f"data.seed={seed}", f"steps={steps}", "schedule=cosine"),
            *("held_out_samples=32", f"held_out_split={split}", "device=cpu"),
        ),
    )
    state = build_state(config)
    opened, rule = Corpus(corpus), CountRule(state.tokenizer, config.data.max_side, config.data.budget)
    loader = make_loader(opened, open_index(opened, config.data.split, rule, folder), state)
    for batch in islice(loader.batches(0), steps):
        train_step(state, [batch])
    check_records(state)
    held_out = HeldOut.open(opened, rule, state, folder)
    if held_out is None:
        raise SystemExit(f"{corpus} has no held-out sample to measure on")
    return state, held_out


@torch.no_grad()
def velocity_errors(state: TrainState, held_out: HeldOut) -> dict[str, float]:
    """Mean squared error of the velocity over changed and unchanged latents."""
    sums = {"changed": [0.0, 0.0], "unchanged": [0.0, 0.0]}
    for batch in held_out.batches:
        latents = encode(state, batch, make_generators(state, batch))
        edits = [(i, e) for i, e in enumerate(batch.examples) if e.edit_source_index >= 0]
        for t in TIMESTEPS:
            noise = [
                torch.randn(x.shape, generator=g)
                for x, g in zip(latents.targets, make_generators(state, batch, 1), strict=True)
            ]
            timestep = torch.full((len(noise),), t)
            pairs = [interpolate(x, n, timestep[0]) for x, n in zip(latents.targets, noise, strict=True)]
            predictions = state.model(batch.pack, latents.shown, [noisy for noisy, _ in pairs], timestep)
            for i, example in edits:
                target, source = (
                    state.vae.encode(image).mean
                    for image in (example.target, example.inputs[example.edit_source_index])
                )
                error, changed = (predictions[i] - pairs[i][1]).square(), (target - source).abs() > CHANGED
                for name, where in (("changed", changed), ("unchanged", ~changed)):
                    sums[name][0] += float(error[where].sum())
                    sums[name][1] += float(where.sum())
    return {f"velocity error, {name}": total / number for name, (total, number) in sums.items()}


def pixel_errors(state: TrainState, held_out: HeldOut, seed: int) -> dict[str, float]:
    """Mean absolute error of drawn images, in shares of the range, inside and outside of the edit mask."""
    pipeline = Pipeline(state.model.eval(), state.vae, state.tokenizer)
    errors = defaultdict(list)
    for example, prompt in zip(held_out.examples, held_out.prompts, strict=True):
        if example.edit_mask is None or example.edit_mask.all():
            continue
        height, width = example.target.shape[1:]
        drawn = pipeline(
            prompt,
            [to_image(image) for image in example.inputs],
            height=height,
            width=width,
            num_inference_steps=20,
            guidance_scale=1.0,
            img_guidance_scale=1.0,
            seed=seed,
            max_input_image_size=state.config.data.max_side,
        )
        difference = (to_tensor(drawn) - example.target).abs() / 2  # type: ignore[arg-type]
        errors["pixel error, inside"].append(float(difference[:, example.edit_mask].mean()))
        errors["pixel error, outside"].append(float(difference[:, ~example.edit_mask].mean()))
    return {name: statistics.fmean(values) for name, values in errors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Weighted against unweighted loss on edits.")
    parser.add_argument("--corpus", required=True, help="with an edit stream")
    parser.add_argument("--split", choices=("train", "val"), default="train", help="what is measured on")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--modes", nargs="+", default=["latent", "none"])
    options = parser.parse_args()
    results: dict[str, dict[str, list[float]]] = {mode: defaultdict(list) for mode in options.modes}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            for mode in options.modes:
                state, held_out = train_once(
                    options.corpus, options.split, mode, options.steps, seed=seed, folder=Path(folder)
                )
                for name, value in (velocity_errors(state, held_out) | pixel_errors(state, held_out, seed)).items():
                    results[mode][name].append(value)
    names = list(next(iter(results.values())))
    print(f"{options.seeds} seeds, {options.steps} steps, medians (range)\n")
    print(f"| loss weights | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for mode, measured in results.items():
        cells = [f"{statistics.median(v):.4f} ({min(v):.4f} to {max(v):.4f})" for v in measured.values()]
        print(f"| {mode} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
