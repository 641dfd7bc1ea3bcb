"""Trains the shipped VAE: SDXL's latent geometry (3 to 4 channels, factor 8) at a hundredth of its size.

    python -m fine_tune.tiny.train_vae --out fine_tune/tiny/vae

Ten to twenty minutes on one core. Needs the packages that the photographs come from (see README.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import skimage.feature
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image, ImageDraw, ImageFilter
from sklearn.datasets import load_sample_image
from torch import Tensor

from fine_tune.tokens import fit_image, to_tensor
from fine_tune.vae import FrozenVAE

CROP = 64
SHORT_SIDES = (80, 128, 192, 288)
PHOTO_SHARE = 0.8
KL_WEIGHT = 1e-4
GRADIENT_WEIGHT = 0.5


def load_photos() -> list[Image.Image]:
    """All training photographs; `skimage.data.chelsea` and scikit-learn's china.jpg are left out for evaluation."""
    names = ("astronaut", "coffee", "rocket", "hubble_deep_field", "retina", "immunohistochemistry")
    arrays = [getattr(skimage.data, name)() for name in (*names, "brick", "grass", "gravel", "camera")]
    arrays.append(load_sample_image("flower.jpg"))
    folder = resources.files("interior_photos") / "images"
    interiors = [Image.open(str(path)) for path in sorted(folder.iterdir(), key=str)]
    return [image.convert("RGB") for image in (*map(Image.fromarray, arrays), *interiors)]


def pyramid(photo: Image.Image) -> list[Image.Image]:
    """The photograph at several sizes, as a crop should hold a whole scene as often as a detail."""
    scales = [side / min(photo.size) for side in SHORT_SIDES if side <= min(photo.size)]
    return [photo.resize((round(photo.width * s), round(photo.height * s)), Image.Resampling.BOX) for s in scales]


def crop_photo(photos: list[list[Image.Image]], rng: np.random.Generator) -> Image.Image:
    """A random crop, mirrored and with its colours permuted or inverted now and then."""
    levels = photos[rng.integers(len(photos))]
    level = levels[rng.integers(len(levels))]
    left, top = rng.integers(level.width - CROP + 1), rng.integers(level.height - CROP + 1)
    pixels = np.asarray(level)[top : top + CROP, left : left + CROP]
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if rng.random() < 0.3:
        pixels = pixels[..., rng.permutation(3)]
    if rng.random() < 0.1:
        pixels = 255 - pixels
    return Image.fromarray(np.ascontiguousarray(pixels))


def draw_map(photos: list[list[Image.Image]], rng: np.random.Generator) -> Image.Image:
    """Something like a condition map: edges on black, limbs on black, colour blocks, or a smooth depth map."""
    kind = rng.choice(["edges", "limbs", "blocks", "depth"])
    if kind == "edges":
        grey = np.asarray(crop_photo(photos, rng).convert("L")) / 255
        return Image.fromarray(skimage.feature.canny(grey, sigma=rng.uniform(1, 2))).convert("RGB")
    if kind == "depth":
        blur = ImageFilter.GaussianBlur(rng.uniform(2, 8))
        return crop_photo(photos, rng).convert("L").filter(blur).convert("RGB")
    image = Image.new("RGB", (CROP, CROP), _colour(rng) if kind == "blocks" else (0, 0, 0))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(2, 8)):
        x, y = (sorted(int(v) for v in rng.integers(-8, CROP + 8, 2)) for _ in range(2))
        if kind == "limbs":
            ends = [int(v) for v in rng.integers(0, CROP, 4)]
            draw.line(ends, fill=_colour(rng), width=int(rng.integers(1, 6)))
        elif rng.random() < 0.5:
            draw.rectangle((x[0], y[0], x[1], y[1]), fill=_colour(rng))
        else:
            draw.ellipse((x[0], y[0], x[1], y[1]), fill=_colour(rng))
    return image


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(v) for v in rng.integers(0, 256, 3))
    return red, green, blue


def batches(rng: np.random.Generator, batch_size: int) -> Iterator[Tensor]:
    """Endless float32 batches [B, 3, 64, 64] in [-1, 1]."""
    photos = [pyramid(photo) for photo in load_photos()]
    while True:
        makers = [crop_photo if rng.random() < PHOTO_SHARE else draw_map for _ in range(batch_size)]
        yield torch.stack([to_tensor(make(photos, rng)) for make in makers])


def build_vae(seed: int) -> AutoencoderKL:
    """A model of 0.7 M parameters that starts as an average over 8 x 8 pixels and its interpolation back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 32, 32, 64),
            norm_num_groups=2,
            mid_block_add_attention=False,
            force_upcast=False,
        )
    start_from_average(vae)
    return vae


@torch.no_grad()
def start_from_average(vae: Any) -> None:
    """Reserve the first channels of every layer for the colours, passed on by fixed filters; all remain trainable.

    Random weights are still worse than an average after a thousand steps. Eight channels carry each colour with both
    signs, since silu(x) - silu(-x) = x, and two constants, which keep the norms from erasing brightness.
    """
    identity = torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]])
    average = torch.tensor([[0.25, 0.25, 0], [0.25, 0.25, 0], [0, 0, 0]])  # the encoder pads right and below
    smooth = torch.outer(*torch.tensor([[0.25, 0.5, 0.25]] * 2))  # bilinear, after doubling by repetition
    signs = torch.kron(torch.eye(3), torch.tensor([[1.0], [-1.0]]))  # [6, 3]

    kernels = {
        "conv2": torch.zeros(3, 3),  # the residual branches begin silent
        "conv_shortcut": torch.ones(1, 1),
        "downsamplers.0.conv": average,
        "upsamplers.0.conv": smooth,
    }
    for name, conv in vae.named_modules():
        for suffix, kernel in kernels.items():
            if name.endswith(suffix):
                conv.weight[:8] = conv.bias[:8] = 0
                conv.weight[range(8), range(8)] = kernel

    for half, scale in ((vae.encoder, 4.0), (vae.decoder, 2.0)):
        half.conv_in.weight[:8] = half.conv_in.bias[:8] = 0
        half.conv_in.weight[:6, :3] = signs[:, :, None, None] * identity
        half.conv_in.bias[6:8] = torch.tensor([scale, -scale])
        half.conv_out.weight[:3] = half.conv_out.bias[:3] = 0
        half.conv_out.weight[:3, :6] = signs.T[:, :, None, None] * identity
    vae.quant_conv.weight.copy_(torch.eye(8)[:, :, None, None])
    vae.post_quant_conv.weight.copy_(torch.eye(4)[:, :, None, None])
    vae.quant_conv.weight[4:] = vae.quant_conv.bias[:] = vae.post_quant_conv.bias[:] = 0
    vae.quant_conv.bias[4:] = -6.0  # log-variance: noise too weak to drown the start


def reconstruction_loss(output: Tensor, image: Tensor) -> Tensor:
    """Mean absolute and squared error of the pixels and of their differences.

    The absolute part alone lets thin lines fade into the ground, which is the median around them.
    """
    error = output - image
    terms = (error, GRADIENT_WEIGHT * error.diff(dim=-1), GRADIENT_WEIGHT * error.diff(dim=-2))
    return torch.stack([term.abs().mean() + term.square().mean() for term in terms]).sum()


def train(steps: int, batch_size: int, learning_rate: float, seed: int) -> AutoencoderKL:
    """The trained model, its `scaling_factor` set so that latents have unit standard deviation."""
    vae = build_vae(seed)
    generator = torch.Generator().manual_seed(seed)
    data = batches(np.random.default_rng(seed), batch_size)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        image = next(data)
        posterior = vae.encode(image).latent_dist
        output = vae.decode(posterior.sample(generator)).sample
        reconstruction = reconstruction_loss(output, image)
        loss = reconstruction + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            psnr = 10 * torch.log10(4 / F.mse_loss(output, image))
            print(f"step {step}: loss {loss.item():.4f}, PSNR {psnr.item():.2f} dB", flush=True)
    with torch.no_grad():
        latents = torch.cat([vae.encode(next(data)).latent_dist.sample(generator) for _ in range(50)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae


@torch.no_grad()
def evaluate(vae: FrozenVAE) -> None:
    """Print the reconstruction PSNR of the photographs that are not trained on."""
    held_out = {"chelsea": skimage.data.chelsea(), "china": load_sample_image("china.jpg")}
    for name, pixels in held_out.items():
        for side in (128, 256):
            image = to_tensor(fit_image(Image.fromarray(pixels), side))
            error = F.mse_loss(vae.decode(vae.encode(image).mean), image)
            print(f"{name}, {side} px: {10 * torch.log10(4 / error).item():.1f} dB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny VAE.")
    parser.add_argument("--out", type=Path, required=True, help="folder to save the model to, in float16")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.steps, args.batch_size, args.learning_rate, args.seed).half().save_pretrained(args.out)
    evaluate(FrozenVAE.from_pretrained(args.out))


if __name__ == "__main__":
    main()
