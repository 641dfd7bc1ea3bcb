"""What the transformer is conditioned on: the prompt as token ids, the images fitted to the patch grid.

The prompt layout and the image transform are those of OmniGen's processor (VectorSpaceLab/OmniGen,
`OmniGen/processor.py`, `OmniGen/utils.py`), with its extreme-aspect and misaligned-pair faults mended.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from schemas.instructions import check_instruction, placeholder

UNCONDITIONAL = "<cfg>"
"""The prompt that OmniGen is trained on when the whole condition is dropped."""

NEGATIVE_PROMPT = (
    "low quality, jpeg artifacts, ugly, duplicate, morbid, mutilated, extra fingers, mutated hands, "
    "poorly drawn hands, poorly drawn face, mutation, deformed, blurry, dehydrated, bad anatomy, "
    "bad proportions, extra limbs, cloned face, disfigured, gross proportions, malformed limbs, "
    "missing arms, missing legs, extra arms, extra legs, fused fingers, too many fingers."
)
"""The prompt that the released sampler uses for the unconditional guidance branch."""

SPECIAL_TOKENS = ("<|user|>", "<|end|>", "<|assistant|>", "<|diffusion|>", "<img>", "</img>", UNCONDITIONAL)
"""Strings of the prompt layout that must be one token each."""

PIXELS_PER_TOKEN_SIDE = 16
"""VAE factor 8 times patch size 2."""

_TEMPLATE = (
    "<|user|>\nGenerate an image according to the following instructions\n{prompt}<|end|>\n<|assistant|>\n<|diffusion|>"
)
_PLACEHOLDER = re.compile(r"<\|image_(\d+)\|>")
_IMAGE_WITH_SPACE = re.compile(r"\s*<img><\|image_\d+\|></img>")


@dataclass(frozen=True, slots=True)
class Condition:
    """A tokenised condition.

    Attributes:
        token_ids: int64 [n]; 0 where an input image's patches go.
        image_spans: (start, stop, image_index) of every image, in order of appearance; `image_index` counts from 0
            in the sample's input images and may appear twice, as a prompt may show an image twice.
    """

    token_ids: Tensor
    image_spans: list[tuple[int, int, int]]


class Tokenizer:
    """OmniGen's prompt layout around a fast tokenizer of `transformers`."""

    def __init__(self, backend: Any, *, required_tokens: Sequence[str] = SPECIAL_TOKENS) -> None:
        """Raises ValueError if one of `required_tokens` is not a single token of `backend`."""
        vocabulary = backend.get_vocab()
        missing = [token for token in required_tokens if token not in vocabulary]
        if missing:
            raise ValueError(
                f"tokenizer {backend.name_or_path!r} has no single token for {', '.join(missing)}. Use the tokenizer "
                "of an OmniGen checkpoint, or give it the tokens with `add_special_tokens`, save it, and train the "
                "new rows of `embed_tokens`; `required_tokens` narrows what is asked for."
            )
        self.backend = backend
        # Unlike the wrapper's call, the inner tokenizer's `encode` is safe in threads; it applies what was set here.
        self._encode = backend.backend_tokenizer.encode
        backend.backend_tokenizer.no_truncation()
        backend.backend_tokenizer.no_padding()

    @classmethod
    def from_pretrained(
        cls, path: str | PathLike[str], *, subfolder: str = "", required_tokens: Sequence[str] = SPECIAL_TOKENS
    ) -> Tokenizer:
        """Load `tokenizer.json` from a folder or hub id; diffusers checkpoints keep it in subfolder "tokenizer".

        The file is taken as it is. `AutoTokenizer` of transformers 5 rebuilds a LLaMA tokenizer, and then no longer
        puts the space before text after a special token that the released model was trained with.
        """
        from transformers import PreTrainedTokenizerFast

        backend = PreTrainedTokenizerFast.from_pretrained(path, subfolder=subfolder)
        return cls(backend, required_tokens=required_tokens)

    def __len__(self) -> int:
        """Size of the vocabulary with its added tokens: the rows that `embed_tokens` needs at least."""
        return len(self.backend)

    def encode(self, prompt: str, image_sizes: Sequence[tuple[int, int]] = ()) -> Condition:
        """Tokenise `prompt`, leaving room for its images.

        Args:
            prompt: an instruction that shows image k, counted from 1, as `<img><|image_k|></img>`.
            image_sizes: (height, width) in pixels of the fitted input images, multiples of 16.

        Raises:
            ValueError: if a tag is malformed, the tags are not exactly 1..n, the prompt contains a reserved token, or
                a size is off the grid.
        """
        if image_sizes or prompt not in ("", UNCONDITIONAL):
            check_instruction(prompt, len(image_sizes))
        # Chunks around an image are tokenised one by one, as each then gets its own leading space.
        first, *rest = _PLACEHOLDER.split(_TEMPLATE.format(prompt=prompt))
        ids = self._encode(first).ids  # begins with BOS if the tokenizer adds one
        spans = []
        for number, text in zip(rest[::2], rest[1::2], strict=True):
            index = int(number) - 1
            num_tokens = count_tokens(image_sizes[index])
            spans.append((len(ids), len(ids) + num_tokens, index))
            ids += [0] * num_tokens + self._encode(text, add_special_tokens=False).ids
        return Condition(torch.tensor(ids, dtype=torch.int64), spans)


def count_tokens(size: tuple[int, int]) -> int:
    """Number of transformer tokens of an image of (height, width) pixels."""
    height, width = size
    if height % PIXELS_PER_TOKEN_SIDE or width % PIXELS_PER_TOKEN_SIDE or min(size) < PIXELS_PER_TOKEN_SIDE:
        raise ValueError(f"image size {height}x{width} is not a multiple of {PIXELS_PER_TOKEN_SIDE}: use fit_image")
    return (height // PIXELS_PER_TOKEN_SIDE) * (width // PIXELS_PER_TOKEN_SIDE)


def image_only_prompt(num_images: int) -> str:
    """The prompt of the image-only guidance branch: the input images and no text."""
    return " ".join(placeholder(k) for k in range(1, num_images + 1))


def drop_condition(
    prompt: str, generator: torch.Generator, *, p_all: float = 0.1, p_text: float = 0.0, p_images: float = 0.0
) -> tuple[str, bool]:
    """Drop parts of a condition at random, so that the model learns the branches of classifier-free guidance.

    With probability `p_all` everything goes, with `p_text` the images stay alone as in the image-only branch of the
    sampler, with `p_images` the text stays alone. On a prompt without images only `p_all` applies, so that the share
    of unconditional samples is the same for every task. One number is drawn per call, whatever the outcome.

    Returns:
        The prompt and whether the sample's images are kept. (Without them an edit has no source to be weighted by.)
    """
    if min(p_all, p_text, p_images) < 0 or p_all + p_text + p_images > 1:
        raise ValueError(f"p_all={p_all}, p_text={p_text}, p_images={p_images} are not disjoint probabilities")
    draw = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device).item()
    num_images = len(set(_PLACEHOLDER.findall(prompt)))
    if draw < p_all:
        return UNCONDITIONAL, False
    if not num_images:
        return prompt, True
    if draw < p_all + p_text:
        return image_only_prompt(num_images), True
    if draw < p_all + p_text + p_images:
        text = _IMAGE_WITH_SPACE.sub("", prompt).strip()
        return text or UNCONDITIONAL, False
    return prompt, True


@dataclass(frozen=True, slots=True)
class _Window:
    """A sequence of resizes to (width, height), then a crop box (left, top, right, bottom)."""

    resizes: tuple[tuple[tuple[int, int], Image.Resampling], ...]
    box: tuple[int, int, int, int]


def _window(size: tuple[int, int], max_side: int) -> _Window:
    """The rule of OmniGen's `crop_arr` for an image of (width, height); see `fit_image`."""
    if max_side % PIXELS_PER_TOKEN_SIDE or max_side < PIXELS_PER_TOKEN_SIDE:
        raise ValueError(f"max_side={max_side} must be a positive multiple of {PIXELS_PER_TOKEN_SIDE}")
    resizes = []

    def scale(factor: float, resample: Image.Resampling) -> tuple[int, int]:
        scaled = max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)
        resizes.append((scaled, resample))
        return scaled

    while min(size) >= 2 * max_side:
        size = size[0] // 2, size[1] // 2
        resizes.append((size, Image.Resampling.BOX))
    if max(size) > max_side:
        size = scale(max_side / max(size), Image.Resampling.BICUBIC)
    if min(size) < PIXELS_PER_TOKEN_SIDE:
        size = scale(PIXELS_PER_TOKEN_SIDE / min(size), Image.Resampling.BICUBIC)
    width, height = (min(side, max_side) // PIXELS_PER_TOKEN_SIDE * PIXELS_PER_TOKEN_SIDE for side in size)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return _Window(tuple(resizes), (left, top, left + width, top + height))


def fitted_size(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """(height, width) that `fit_image` brings an image of (width, height) to; it is not looked at."""
    left, top, right, bottom = _window(size, max_side).box
    return bottom - top, right - left


def fit_image(image: Image.Image, max_side: int) -> Image.Image:
    """Bring an image onto the 16-pixel grid as OmniGen does: shrink to `max_side`, centre-crop, never enlarge.

    Box-halved while the short side is at least twice `max_side`, then bicubic until the long side is `max_side`, then
    each side centre-cropped to a multiple of 16. A short side below 16 is enlarged to 16; unlike upstream, what then
    exceeds `max_side` is cropped, so no image is too long for the position table.

    Args:
        image: any mode; converted to RGB.
        max_side: upper bound of both sides in pixels, a multiple of 16.
    """
    window = _window(image.size, max_side)
    image = image.convert("RGB")
    for size, resample in window.resizes:
        image = image.resize(size, resample)
    return image.crop(window.box)


def fit_mask(mask: Image.Image, max_side: int) -> Tensor:
    """Fit a mask as `fit_image` fits its image: bool [H, W], true where any of the pixels merged was non-zero."""
    window = _window(mask.size, max_side)
    cover = Image.fromarray((np.asarray(mask) != 0).astype(np.float32))
    for size, _ in window.resizes:
        cover = cover.resize(size, Image.Resampling.BOX)
    return torch.from_numpy(np.array(cover.crop(window.box)) > 0)


def fit_pair(source: Image.Image, target: Image.Image, max_side: int) -> tuple[Image.Image, Image.Image]:
    """Fit an edit's source and target by one window, so that their pixels stay aligned.

    A source of another size is first resized to the target's. That is right for any source that was rescaled, and
    within 8 pixels (one latent cell) for one that was cropped to some grid.

    Raises:
        ValueError: if their shapes differ by 16 pixels or more when one is scaled to fit into the other.
    """
    if source.size != target.size:
        scale = min(target.width / source.width, target.height / source.height)
        gap = max(target.width - source.width * scale, target.height - source.height * scale)
        if gap >= PIXELS_PER_TOKEN_SIDE:
            raise ValueError(
                f"edit source {source.width}x{source.height} and target {target.width}x{target.height} differ in "
                "aspect ratio and cannot be aligned: set edit_source_index to -1 to train without edit weights"
            )
        source = source.convert("RGB").resize(target.size, Image.Resampling.BICUBIC)
    return fit_image(source, max_side), fit_image(target, max_side)


def fit_images(
    inputs: Sequence[Image.Image], target: Image.Image, max_side: int, *, edit_source_index: int = -1
) -> tuple[list[Image.Image], Image.Image]:
    """Fit a sample's images, the edit source (index into `inputs`, -1 for none) by the window of the target."""
    fitted = [fit_image(image, max_side) for image in inputs]
    if edit_source_index < 0:
        return fitted, fit_image(target, max_side)
    fitted[edit_source_index], fitted_target = fit_pair(inputs[edit_source_index], target, max_side)
    return fitted, fitted_target


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as float32 [3, H, W] in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return pixels.to(torch.float32).div_(127.5).sub_(1).contiguous()
