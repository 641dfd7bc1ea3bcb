"""What a run is judged by: the loss on held-out samples at fixed timesteps and noise, and images drawn from them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fine_tune import packing
from fine_tune.data import Batch, Example, SampleSettings, make_example, read_images
from fine_tune.index import Corpus, CorpusError, CountRule, Index, SampleError, open_index
from fine_tune.metrics import LossTable
from fine_tune.objective import compute_loss, encode, make_generators
from fine_tune.order import StreamOrder, best_fit
from fine_tune.sample import Pipeline
from fine_tune.state import TrainState
from schemas.vocabulary import TASKS

log = logging.getLogger(__name__)

TIMESTEPS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Near the middle of every second of the ten bins that training losses are reported in."""

_GAP = 4


class HeldOut:
    """Samples of a split that is not trained on, the same in every run with this seed."""

    def __init__(self, state: TrainState, examples: list[Example], prompts: list[str]) -> None:
        self.state, self.examples, self.prompts = state, examples, prompts
        data = state.config.data
        bins = best_fit([len(example.sequence) for example in examples], data.budget)
        self.batches = [self._batch([examples[i] for i in members]) for members in bins]

    @classmethod
    def open(cls, corpus: Corpus, rule: CountRule, state: TrainState, run: Path) -> HeldOut | None:
        """As many samples as configured, evenly from all streams. None, with a warning, if there are none."""
        config = state.config
        number = config.run.held_out_samples
        if not number:
            return None
        try:
            index = open_index(corpus, config.data.held_out_split, rule, run / "index")
        except CorpusError as error:
            log.warning(
                "nothing is measured or drawn on held-out samples: %s; decide.splits of a recipe makes some", error
            )
            return None
        examples, prompts = [], []
        settings = SampleSettings(max_side=rule.max_side, edit_masks=True).without_augmentation()
        for row in _pick(corpus, index, number, config.data.seed):
            try:
                images = read_images(corpus, row)
                examples.append(make_example(row, images, state.tokenizer, settings, seed=config.data.seed, epoch=0))
                prompts.append(row["instruction"])
            except SampleError as error:
                log.warning("held-out sample %s:%s left out: %s", row["shard"], row["key"], error)
        return cls(state, examples, prompts) if examples else None

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """Losses as `LossTable.read` has them. A collective: ranks take packs in turn, all of them equally many."""
        table, world = LossTable(TASKS, self.state.device), self.state.world
        self.state.model.eval()
        for first in range(0, len(self.batches), world.size):
            number = first + world.rank
            batch = self.batches[min(number, len(self.batches) - 1)].to(self.state.device)
            tasks = [example.task for example in batch.examples]
            latents = encode(self.state, batch, make_generators(self.state, batch))
            for t in TIMESTEPS:
                timestep = torch.full((len(tasks),), t, device=self.state.device)
                noise = make_generators(self.state, batch, offset=1)
                loss, _ = compute_loss(self.state, batch, latents, noise, timestep=timestep)
                if number < len(self.batches):
                    table.add(tasks, timestep, loss.weighted, loss.unweighted)
        self.state.model.train()
        return table.read(world.sum)

    @torch.no_grad()
    def draw(self, file: Path) -> None:
        """One row per sample: its input images, the target, and what the model makes of it. A collective."""
        settings = self.state.config.run
        self.state.model.eval()
        pipeline = Pipeline(self.state.model, self.state.vae, self.state.tokenizer)
        rows = []
        for number, (example, prompt) in enumerate(zip(self.examples, self.prompts, strict=True)):
            if number == settings.sample_images:
                break
            inputs = [to_image(x) for x in example.inputs]
            target = to_image(example.target)
            with self.state.autocast():
                drawn = pipeline(
                    prompt,
                    inputs,
                    height=target.height,
                    width=target.width,
                    num_inference_steps=settings.sample_steps,
                    guidance_scale=settings.guidance_scale,
                    img_guidance_scale=settings.img_guidance_scale,
                    seed=self.state.config.data.seed + number,
                    max_input_image_size=self.state.config.data.max_side,
                )
            rows.append([*inputs, target, cast(Image.Image, drawn)])
        self.state.model.train()
        if self.state.world.rank == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            image_grid(rows).save(file)

    def _batch(self, examples: list[Example]) -> Batch:
        layout = packing.pack(
            [example.sequence for example in examples],
            pad_to=self.state.config.data.budget if self.state.device.type == "cuda" else None,
            short_rope_length=self.state.model.config.original_max_position_embeddings,
        )
        return Batch(-1, layout, examples, [])


def _pick(corpus: Corpus, index: Index, number: int, seed: int) -> list[dict[str, Any]]:
    """Index rows of `number` samples, taking the streams in turn, each in a random order of its samples."""
    orders = [StreamOrder(stream.name, len(stream), seed).draws(0, len(stream))[1][:number] for stream in index.streams]
    picked: list[dict[str, Any]] = []
    for turn in range(number):
        for stream, items in zip(index.streams, orders, strict=True):
            if turn < len(items) and len(picked) < number:
                picked.append(corpus.row(stream, int(items[turn])))
    return picked


def to_image(pixels: Tensor) -> Image.Image:
    """float [3, H, W] in [-1, 1] -> RGB."""
    values = pixels.add(1).mul(127.5).round().to("cpu", torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def image_grid(rows: list[list[Image.Image]]) -> Image.Image:
    """Images side by side, flushed right so that columns of results line up."""
    width = max(sum(image.width + _GAP for image in row) for row in rows)
    heights = [max(image.height for image in row) + _GAP for row in rows]
    canvas = Image.new("RGB", (width, sum(heights)), "white")
    for row, top in zip(rows, np.cumsum([0, *heights[:-1]]), strict=True):
        left = width
        for image in reversed(row):
            left -= image.width + _GAP
            canvas.paste(image, (left, int(top)))
    return canvas
