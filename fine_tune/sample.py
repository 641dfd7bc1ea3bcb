"""Generate images: flow sampling with text and image guidance.

>>> pipe = Pipeline.from_pretrained("Shitao/OmniGen-v1-diffusers")
>>> pipe("Make the sky of <img><|image_1|></img> red.", [image], height=512, width=768, seed=0).save("red.png")
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fine_tune.attention import Backend
from fine_tune.layouts import load_transformer, resolve
from fine_tune.model import OmniGen
from fine_tune.packing import Sequence, pack, patches_of
from fine_tune.tokens import NEGATIVE_PROMPT, Tokenizer, fit_image, image_only_prompt, to_tensor
from fine_tune.vae import FrozenVAE

Predictor = Callable[[Tensor, Tensor], list[Tensor]]


@dataclass(frozen=True)
class Branch:
    """What one guidance branch is conditioned on: its sequence and the latents [C, h, w] of its input images."""

    sequence: Sequence
    input_latents: list[Tensor]


def sigmas(num_steps: int, time_shift: float = 1.0) -> Tensor:
    """Times of the Euler steps, from 0 (noise) to 1 (data): float32 [num_steps + 1].

    σ / (σ + s - s σ) of an even grid; s > 1 spends more steps near the noise (VectorSpaceLab/OmniGen,
    `OmniGen/scheduler.py`; SD3, arXiv:2403.03206, equation 23).
    """
    even = torch.linspace(0, 1, num_steps + 1)
    return even / (even + time_shift - time_shift * even)


def guided(velocities: list[Tensor], guidance_scale: float, img_guidance_scale: float) -> Tensor:
    """Classifier-free guidance over the branches [cond, uncond] or [cond, uncond, image-only].

    uncond + s_img (image - uncond) + s_txt (cond - image): InstructPix2Pix, arXiv:2211.09800, equation 3.
    """
    if len(velocities) == 2:
        cond, uncond = velocities
        return uncond + guidance_scale * (cond - uncond)
    cond, uncond, image = velocities
    return uncond + img_guidance_scale * (image - uncond) + guidance_scale * (cond - image)


def predictor(model: OmniGen, branches: list[Branch], use_kv_cache: bool, device: torch.device) -> Predictor:
    """(latents [C, h, w], time float32 []) -> the velocity of each branch, all computed in one pack."""
    layout = pack([branch.sequence for branch in branches], None, model.config.original_max_position_embeddings)
    layout = layout.to(device)
    inputs = [latents for branch in branches for latents in branch.input_latents]
    cache = model.encode_condition(layout, inputs) if use_kv_cache else None

    def predict(latents: Tensor, time: Tensor) -> list[Tensor]:
        noisy, timestep = [latents] * len(branches), time.expand(len(branches))
        if cache is None:
            return model(layout, inputs, noisy, timestep)
        return model.forward_cached(layout, cache, noisy, timestep)

    return predict


def denoise(
    predictors: list[Predictor], noise: Tensor, times: Tensor, guidance_scale: float, img_guidance_scale: float
) -> Tensor:
    """Euler steps along the guided velocity, in fp32: noise [C, h, w] at t = 0 -> latents [C, h, w] at t = 1."""
    latents = noise
    for time, next_time in pairwise(times):
        velocities = [velocity.float() for predict in predictors for velocity in predict(latents, time)]
        latents = latents + (next_time - time) * guided(velocities, guidance_scale, img_guidance_scale)
    return latents


@dataclass
class Pipeline:
    """The model with what surrounds it; ``pipe(prompt, ...)`` returns images.

    Attributes:
        time_shift: of the sampling schedule, see `sigmas`.
    """

    transformer: OmniGen
    vae: FrozenVAE
    tokenizer: Tokenizer
    time_shift: float = 1.0

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        attention_backend: Backend = "auto",
    ) -> Pipeline:
        """Open a pipeline folder of this project or of diffusers, or the official release; or a Hub id of these.

        Args:
            device: CUDA where there is one, unless given.
            dtype: of the transformer; bfloat16 on CUDA and float32 elsewhere, unless given. The VAE is float32.

        Raises:
            FileNotFoundError, CheckpointError: see `fine_tune.layouts.load_transformer`.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        folders = [f"{name}/*" for name in ("transformer", "vae", "tokenizer", "scheduler")]
        folder = resolve(source, [*folders, "*.json", "model.safetensors", "model.pt"])
        scheduler = folder / "scheduler" / "scheduler_config.json"
        return cls(
            load_transformer(folder, dtype, device, attention_backend).eval(),
            FrozenVAE.from_pretrained(str(folder), subfolder="vae", device=device),
            Tokenizer.from_pretrained(str(folder), subfolder="tokenizer" if (folder / "tokenizer").is_dir() else ""),
            json.loads(scheduler.read_text()).get("shift", 1.0) if scheduler.is_file() else 1.0,
        )

    @property
    def device(self) -> torch.device:
        return self.transformer.embed_tokens.weight.device

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        input_images: list[Image.Image] | list[list[Image.Image] | None] | None = None,
        *,
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 50,
        guidance_scale: float = 2.5,
        img_guidance_scale: float = 1.6,
        separate_cfg_infer: bool = True,
        use_kv_cache: bool = True,
        seed: int | None = None,
        negative_prompt: str = NEGATIVE_PROMPT,
        max_input_image_size: int = 1024,
    ) -> Image.Image | list[Image.Image]:
        """Generate one image per prompt.

        Args:
            prompt: an instruction that shows input image k as ``<img><|image_k|></img>``; or a list of them.
            input_images: the images of the prompt; for a list of prompts, a list (or None) for each.
            height, width: of the result in pixels, multiples of 16.
            guidance_scale: how far to follow the instruction; 1 is no guidance.
            img_guidance_scale: how far to follow the input images; unused without any.
            separate_cfg_infer: run the guidance branches one after another (less memory) or in one pack. The
                result is the same.
            use_kv_cache: compute keys and values of the condition once. The result is the same.
            seed: of the noise; prompt i of a list uses seed + i, so it gives the image it gives alone.
            negative_prompt: what to stay away from.
            max_input_image_size: longest side in pixels that an input image is shrunk to, a multiple of 16.

        Raises:
            ValueError: sizes off the grid, image tags that do not match the images, or lists of unequal length.
        """
        prompts, images = _as_lists(prompt, input_images)
        generator = torch.Generator()  # on the CPU: the same seed gives the same noise on every device
        first_seed = generator.seed() if seed is None else seed
        times = sigmas(num_inference_steps, self.time_shift).to(self.device)
        results = []
        for index, (text, inputs) in enumerate(zip(prompts, images, strict=True)):
            generator.manual_seed(first_seed + index)
            noise = torch.randn(self._latent_shape(height, width), generator=generator).to(self.device)
            fitted = [fit_image(image, max_input_image_size) for image in inputs]
            branches = self._branches(text, negative_prompt, fitted, (height, width), generator)
            groups = [[branch] for branch in branches] if separate_cfg_infer else [branches]
            predictors = [predictor(self.transformer, group, use_kv_cache, self.device) for group in groups]
            latents = denoise(predictors, noise, times, guidance_scale, img_guidance_scale)
            results.append(_to_image(self.vae.decode(latents)))
        return results[0] if isinstance(prompt, str) else results

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        config = self.transformer.config
        h, w = patches_of(height, width)
        return config.in_channels, h * config.patch_size, w * config.patch_size

    def _branches(
        self, prompt: str, negative: str, images: list[Image.Image], size: tuple[int, int], generator: torch.Generator
    ) -> list[Branch]:
        """The branches that `guided` combines, in its order."""
        latents = [self.vae.encode(to_tensor(image)).sample(generator).to(self.device) for image in images]
        shown = self._branch(prompt, images, latents, size)
        unconditional = self._branch(negative, [], [], size)
        if not images:
            return [shown, unconditional]
        return [shown, unconditional, self._branch(image_only_prompt(len(images)), images, latents, size)]

    def _branch(self, prompt: str, images: list[Image.Image], latents: list[Tensor], size: tuple[int, int]) -> Branch:
        condition = self.tokenizer.encode(prompt, [(image.height, image.width) for image in images])
        order = [index for _, _, index in condition.image_spans]
        sequence = Sequence(
            condition.token_ids,
            [(start, stop) for start, stop, _ in condition.image_spans],
            [patches_of(images[index].height, images[index].width) for index in order],
            patches_of(*size),
        )
        return Branch(sequence, [latents[index] for index in order])


def _as_lists(prompt: str | list[str], input_images: list[Any] | None) -> tuple[list[str], list[list[Image.Image]]]:
    """Prompts and the images of each, from either form of the call."""
    if isinstance(prompt, str):
        return [prompt], [input_images or []]
    images = [[] for _ in prompt] if input_images is None else [of_prompt or [] for of_prompt in input_images]
    if len(images) != len(prompt):
        raise ValueError(f"{len(prompt)} prompts but input images for {len(images)}")
    return prompt, images


def _to_image(pixels: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] -> RGB."""
    values = pixels.add(1).mul(127.5).round().to("cpu", torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())
