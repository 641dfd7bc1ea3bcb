"""From a plan to batches: bytes of a shard -> a checked, decoded, fitted sample -> a pack."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from fine_tune import packing
from fine_tune.index import Corpus, CorpusError, SampleError, Skip
from fine_tune.order import Draw, Plan
from fine_tune.packing import Pack
from fine_tune.tokens import Tokenizer, drop_condition, fit_images, fit_mask, to_tensor
from schemas.shards import BLOCK

if TYPE_CHECKING:
    from fine_tune.latents import LatentCache

EDIT_MASK = "edit_mask.png"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How a stored sample becomes a training example.

    Attributes:
        max_side: longest side of an image in pixels, a multiple of 16.
        drop_all, drop_text, drop_images: probabilities of the three kinds of condition dropout.
        variants: draw one of the instruction's variants; otherwise take the instruction itself.
        edit_masks: decode edit masks, which only one mode of the weighted loss needs.
        draws: how often the target is noised.
    """

    max_side: int
    drop_all: float = 0.1
    drop_text: float = 0.0
    drop_images: float = 0.0
    variants: bool = True
    edit_masks: bool = False
    draws: int = 1

    def without_augmentation(self) -> SampleSettings:
        """For held-out samples: nothing is drawn."""
        return replace(self, drop_all=0.0, drop_text=0.0, drop_images=0.0, variants=False, draws=1)


@dataclass(frozen=True)
class Example:
    """One sample, ready for the model.

    Attributes:
        key, shard, task: where it came from.
        seed: of the generator for its posterior samples, noise and timestep.
        sequence: its place in a pack.
        inputs: float32 [3, H, W] in [-1, 1] each; empty if they were dropped from the condition.
        shown: index into `inputs` of every image span of the sequence.
        target: float32 [3, H, W] in [-1, 1].
        encoded: `inputs` and `target` are not pixels but posterior moments [2C, h, w] of any float dtype.
        edit_source_index: the input that the weighted loss compares with the target, or -1.
        edit_mask: bool [H, W], where the target was edited, or None.
    """

    key: str
    shard: str
    task: str
    seed: int
    sequence: packing.Sequence
    inputs: list[Tensor]
    shown: list[int]
    target: Tensor
    edit_source_index: int
    edit_mask: Tensor | None
    encoded: bool = False

    def map(self, function: Any) -> Example:
        """The same with `function` applied to its images and mask."""
        mask = None if self.edit_mask is None else function(self.edit_mask)
        return replace(self, inputs=[function(x) for x in self.inputs], target=function(self.target), edit_mask=mask)

    def __str__(self) -> str:
        return f"{self.shard}:{self.key}"


@dataclass(frozen=True)
class Batch:
    """One pack with its images, and what was left out of it."""

    number: int
    pack: Pack
    examples: list[Example]
    skips: list[Skip]

    def to(self, device: torch.device | str) -> Batch:
        examples = [example.map(lambda tensor: tensor.to(device, non_blocking=True)) for example in self.examples]
        return replace(self, pack=self.pack.to(device, non_blocking=True), examples=examples)

    def per_draw(self, values: Sequence[T]) -> list[T]:
        """Values of the examples, repeated for every draw of the target."""
        return [v for v, example in zip(values, self.examples, strict=True) for _ in range(example.sequence.draws)]


def sample_seed(seed: int, epoch: int, key: str, purpose: str) -> int:
    """The seed of all randomness of one kind in one draw of a sample, whenever and wherever it is drawn."""
    digest = hashlib.sha256(f"{seed}\0{epoch}\0{key}\0{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True)
class SampleImages:
    """The images of a sample as the model gets them.

    Attributes:
        tensors: of the inputs and, last, the target: pixels or moments, see `Example`.
        sizes: (height, width) in pixels of each of them, multiples of 16.
        edit_mask: bool [H, W] or None.
        encoded: they are moments.
    """

    tensors: list[Tensor]
    sizes: list[tuple[int, int]]
    edit_mask: Tensor | None = None
    encoded: bool = False


def read_images(corpus: Corpus, row: Mapping[str, Any], names: Collection[str] | None = None) -> dict[str, Image.Image]:
    """Decode the images of a sample, by member name, in one range read.

    Args:
        row: of the sample index.
        names: only these; None for all.

    Raises:
        SampleError: the shard holds something else than the index says, or an image cannot be decoded.
    """
    members = [m for m in row["members"] if m["width"] >= 0 and (names is None or m["name"] in names)]
    if not members:
        return {}
    first = members[0]["offset"] - BLOCK
    data = corpus.read(row["shard"], first, members[-1]["offset"] + members[-1]["size"])
    images = {}
    for member in members:
        start = member["offset"] - first
        _check_header(data[start - BLOCK : start], f"{row['key']}.{member['name']}", member["size"])
        images[member["name"]] = _decode(data[start : start + member["size"]], member)
    return images


def _check_header(block: bytes, name: str, size: int) -> None:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except tarfile.TarError as error:
        raise SampleError(
            "shard changed", f"no member {name} at its offset ({error}); index and shard differ"
        ) from error
    if (info.name, info.size) != (name, size):
        detail = f"{info.name} of {info.size} bytes stands where the index has {name} of {size} bytes"
        raise SampleError("shard changed", detail)


def _decode(data: bytes, member: Mapping[str, Any]) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SampleError("undecodable image", f"{member['name']}: {error}") from error
    if image.size != (member["width"], member["height"]):
        expected = f"{member['width']}x{member['height']}"
        raise SampleError("shard changed", f"{member['name']} is {image.width}x{image.height}, not {expected}")
    return image


def fit_sample(row: Mapping[str, Any], images: Mapping[str, Image.Image], settings: SampleSettings) -> SampleImages:
    """Bring the images of a sample onto the grid, an edit's source and target by one window.

    Raises:
        SampleError: an edit pair that the index should not have let through.
    """
    inputs = [image for name, image in images.items() if name.startswith("input_")]
    target = next(image for name, image in images.items() if name.startswith("output."))
    try:
        inputs, target = fit_images(inputs, target, settings.max_side, edit_source_index=row["edit_source_index"])
    except ValueError as error:
        raise SampleError("malformed sample", str(error)) from error
    fitted = [*inputs, target]
    mask = _fitted_mask(images, settings)
    return SampleImages([to_tensor(image) for image in fitted], [(image.height, image.width) for image in fitted], mask)


def _fitted_mask(images: Mapping[str, Image.Image], settings: SampleSettings) -> Tensor | None:
    mask = images.get(EDIT_MASK) if settings.edit_masks else None
    return None if mask is None else fit_mask(mask, settings.max_side)


def make_example(
    row: Mapping[str, Any],
    images: Mapping[str, Image.Image] | SampleImages,
    tokenizer: Tokenizer,
    settings: SampleSettings,
    *,
    seed: int,
    epoch: int,
) -> Example:
    """Draw the prompt, fit the images unless they are, and tokenise.

    Raises:
        SampleError: a prompt or an edit pair that the index should not have let through.
    """
    fitted = images if isinstance(images, SampleImages) else fit_sample(row, images, settings)
    generator = torch.Generator().manual_seed(sample_seed(seed, epoch, row["key"], "condition"))
    prompts = [row["instruction"], *(row["instruction_variants"] if settings.variants else ())]
    prompt = prompts[int(torch.randint(len(prompts), (), generator=generator))]
    prompt, keeps_images = drop_condition(
        prompt, generator, p_all=settings.drop_all, p_text=settings.drop_text, p_images=settings.drop_images
    )
    *inputs, target = fitted.tensors
    *input_sizes, target_size = fitted.sizes
    if not keeps_images:
        inputs, input_sizes = [], []
    try:
        condition = tokenizer.encode(prompt, input_sizes)
    except ValueError as error:
        raise SampleError("malformed sample", str(error)) from error
    shown = [index for _, _, index in condition.image_spans]
    sequence = packing.Sequence(
        condition.token_ids,
        [(start, stop) for start, stop, _ in condition.image_spans],
        [packing.patches_of(*input_sizes[index]) for index in shown],
        packing.patches_of(*target_size),
        settings.draws,
    )
    return Example(
        key=row["key"],
        shard=row["shard"],
        task=row["task"],
        seed=sample_seed(seed, epoch, row["key"], "flow"),
        sequence=sequence,
        inputs=inputs,
        shown=shown,
        target=target,
        edit_source_index=row["edit_source_index"] if inputs else -1,
        edit_mask=fitted.edit_mask if inputs else None,
        encoded=fitted.encoded,
    )


class Loader:
    """Batches of a plan, decoded ahead of use by threads, in the order of their numbers.

    Args:
        plan: the packs.
        seed: of what is drawn for each sample.
        short_rope_length: of the model, see `fine_tune.packing.pack`.
        pad: fill every pack up to the budget, so that the model sees one shape.
        latents: cached posterior moments by side; where there are none, images are decoded.
        pin: keep batches in page-locked memory, out of which a GPU copies while the host goes on.
    """

    def __init__(
        self,
        corpus: Corpus,
        plan: Plan,
        tokenizer: Tokenizer,
        settings: SampleSettings,
        seed: int,
        *,
        short_rope_length: int = 4096,
        pad: bool = False,
        workers: int = 4,
        prefetch: int = 4,
        latents: Mapping[int, LatentCache] | None = None,
        pin: bool = False,
    ) -> None:
        self.corpus, self.plan, self.tokenizer, self.settings, self.seed = corpus, plan, tokenizer, settings, seed
        self.short_rope_length, self.pad = short_rope_length, pad
        self.workers, self.prefetch = workers, prefetch
        self.latents = dict(latents or {})
        self.pin = pin

    def batches(self, first: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Packs `first + rank`, `first + rank + ranks`, ...: what one rank trains on."""
        ahead: deque[tuple[int, list[Future[Example | Skip]]]] = deque()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="x2i-data")
        try:
            for number in count(first + rank, ranks):
                ahead.append((number, [pool.submit(self.load, draw) for draw in self.plan.pack(number)]))
                if len(ahead) > self.prefetch:
                    due, futures = ahead.popleft()
                    yield self._collate(due, [future.result() for future in futures])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def load(self, draw: Draw) -> Example | Skip:
        """One sample, or why it has to be left out."""
        row = self.corpus.row(draw.stream, draw.item)
        settings = replace(self.settings, max_side=draw.side) if draw.side else self.settings
        try:
            images = self._images(row, settings)
            example = make_example(row, images, self.tokenizer, settings, seed=self.seed, epoch=draw.epoch)
        except SampleError as error:
            return Skip(row["shard"], row["key"], error.reason, str(error))
        return example.map(Tensor.pin_memory) if self.pin else example

    def _images(self, row: Mapping[str, Any], settings: SampleSettings) -> SampleImages:
        cache = self.latents.get(settings.max_side)
        cached = cache.read(row) if cache else None
        if cached is None:
            return fit_sample(row, read_images(self.corpus, row), settings)
        if not settings.edit_masks:
            return cached
        return replace(cached, edit_mask=_fitted_mask(read_images(self.corpus, row, [EDIT_MASK]), settings))

    def _collate(self, number: int, loaded: Sequence[Example | Skip]) -> Batch:
        examples = [sample for sample in loaded if isinstance(sample, Example)]
        skips = [sample for sample in loaded if isinstance(sample, Skip)]
        if not examples:
            # Every rank needs a batch in every step. Which one does not depend on the number of ranks.
            following = self._collate(number + 1, [self.load(draw) for draw in self.plan.pack(number + 1)])
            return replace(following, number=number, skips=[*skips, *following.skips])
        pack = packing.pack(
            [example.sequence for example in examples],
            pad_to=self.plan.budget if self.pad else None,
            short_rope_length=self.short_rope_length,
        )
        return Batch(number, pack.pin_memory() if self.pin else pack, examples, skips)


class SkipLimit:
    """Stops a run that leaves out too many samples.

    Args:
        rate: share of the samples that may be left out.
        least: samples to judge by at least, so that one bad image at the start does not stop the run.
    """

    def __init__(self, rate: float, least: int = 1000) -> None:
        self.rate, self.least = rate, least
        self.seen = self.skipped = 0

    def count(self, batch: Batch) -> None:
        """Raises CorpusError, naming the last sample left out, when there were too many."""
        self.seen += len(batch.examples) + len(batch.skips)
        self.skipped += len(batch.skips)
        if self.skipped > self.rate * max(self.seen, self.least):
            raise CorpusError(
                f"{self.skipped} of {self.seen} samples could not be used, more than data.max_skip_rate={self.rate:g} "
                f"allows; the last was {batch.skips[-1]}. `x2i check` lists all of them."
            )
