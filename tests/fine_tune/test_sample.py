"""The sampler against diffusers' OmniGenPipeline on one saved folder, and its own shortcuts against each other."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, OmniGenPipeline
from PIL import Image
from skimage import data

from fine_tune.layouts import save_official, save_pipeline
from fine_tune.model import OmniGen, OmniGenConfig
from fine_tune.sample import Pipeline, guided, sigmas
from fine_tune.tiny import TOKENIZER_DIR

STEPS = 3
EDIT = "Make <img><|image_1|></img> look like winter."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model, VAE and the included tokenizer in one pipeline folder."""
    root = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    config = OmniGenConfig(
        hidden_size=96,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=128,
        num_layers=2,
        vocab_size=5000,
        pad_token_id=0,
        max_position_embeddings=4096,
        original_max_position_embeddings=100,
        rope_scaling={"short_factor": [1.0] * 12, "long_factor": [1.0 + i for i in range(12)], "type": "su"},
        pos_embed_max_size=16,
        time_step_dim=32,
    )
    model = OmniGen(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)  # so that attention and positions matter
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.13025,
    )
    # A posterior without spread, so that the reference, which draws from the global generator, encodes the same.
    vae.quant_conv.bias.data[4:] = -60
    vae.save_pretrained(root / "source_vae")
    save_pipeline(root / "model", config, model.state_dict(), vae=root / "source_vae", tokenizer=TOKENIZER_DIR)
    return root / "model"


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(data.astronaut()).resize((70, 50))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_folder_opens_in_diffusers_with_equal_weights(folder: Path, pipe: Pipeline) -> None:
    theirs = OmniGenPipeline.from_pretrained(folder)
    ours = pipe.transformer.state_dict()
    for key, tensor in theirs.transformer.state_dict().items():
        assert torch.equal(tensor, ours[key]), key
    ids = theirs.tokenizer("a red fox").input_ids
    assert ids == pipe.tokenizer.backend("a red fox").input_ids


@pytest.mark.parametrize(
    ("prompt", "images"),
    [
        ("A photo of a red fox in the snow, " * 30, 0),
        (EDIT + " Snow lies on every roof and ice hangs from every tree in the long street." * 20, 1),
        ("Put <img><|image_1|></img> next to <img><|image_2|></img>," + " then wait for the light to go" * 50, 2),
    ],
)
def test_equals_diffusers(folder: Path, pipe: Pipeline, photo: Image.Image, prompt: str, images: int) -> None:
    """Prompts longer than the negative one, and every branch longer than the short RoPE table is for.

    Only then does diffusers, which rotates a whole batch by the positions of its first row and with one table,
    compute what each branch would alone.
    """
    inputs = [photo, photo.rotate(180).crop((0, 0, 40, 36))][:images]
    size = {"height": 160, "width": 176}
    theirs = OmniGenPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        prompt,
        inputs or None,
        **size,
        num_inference_steps=STEPS,
        guidance_scale=2.5,
        img_guidance_scale=1.6,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    actual = pipe(prompt, inputs or None, **size, num_inference_steps=STEPS, seed=5)
    assert isinstance(actual, Image.Image)
    assert actual.size == expected.size == (176, 160)
    assert np.ptp(pixels(expected)) > 50  # not a flat image, on which anything would agree
    assert np.abs(pixels(actual) - pixels(expected)).max() <= 1


@pytest.mark.parametrize("images", [0, 1])
def test_cache_and_packing_do_not_change_the_image(pipe: Pipeline, photo: Image.Image, images: int) -> None:
    """A prompt shorter than the negative one, and branches on both sides of the RoPE switch."""
    prompt, inputs = ("A fox.", None) if not images else (EDIT, [photo])

    def run(separate: bool, cached: bool) -> np.ndarray:
        image = pipe(
            prompt,
            inputs,
            height=64,
            width=64,
            num_inference_steps=STEPS,
            separate_cfg_infer=separate,
            use_kv_cache=cached,
            seed=1,
        )
        return pixels(image)

    reference = run(True, False)
    for separate, cached in [(True, True), (False, True), (False, False)]:
        assert np.abs(run(separate, cached) - reference).max() <= 1


def test_list_of_prompts_equals_each_alone(pipe: Pipeline, photo: Image.Image) -> None:
    options = {"height": 32, "width": 48, "num_inference_steps": 2}
    fox, winter = pipe(["A fox.", EDIT], [None, [photo]], seed=7, **options)
    assert np.array_equal(pixels(fox), pixels(pipe("A fox.", seed=7, **options)))
    assert np.array_equal(pixels(winter), pixels(pipe(EDIT, [photo], seed=8, **options)))
    assert not np.array_equal(pixels(fox), pixels(pipe("A fox.", **options)))  # no seed: other noise
    with pytest.raises(ValueError, match="2 prompts but input images for 1"):
        pipe(["A fox.", "A hare."], [None], **options)


def test_images_shown_twice_and_sizes_off_the_grid(pipe: Pipeline, photo: Image.Image) -> None:
    twice = "Blend <img><|image_1|></img> with <img><|image_1|></img>."
    image = pipe(twice, [photo], height=32, width=32, num_inference_steps=1, seed=0)
    assert image.size == (32, 32)
    with pytest.raises(ValueError, match="100x64 pixels: both sides must be multiples of 16"):
        pipe("A fox.", height=100, width=64)
    with pytest.raises(ValueError, match="A fox"):
        pipe("A fox.", [photo], height=32, width=32)
    with pytest.raises(ValueError, match="larger than the position grid of 16 x 16"):
        pipe("A fox.", height=512, width=32, num_inference_steps=1)


def test_official_release_opens_too(folder: Path, pipe: Pipeline, tmp_path: Path) -> None:
    """Its transformer and tokenizer lie at the top, the VAE in a folder, and there is no scheduler."""
    save_official(tmp_path, pipe.transformer.config, pipe.transformer.state_dict())
    shutil.copytree(folder / "vae", tmp_path / "vae")
    shutil.copytree(folder / "tokenizer", tmp_path, dirs_exist_ok=True)
    official = Pipeline.from_pretrained(tmp_path, device="cpu")
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "seed": 3}
    assert np.array_equal(pixels(official("A fox.", **options)), pixels(pipe("A fox.", **options)))


def test_guidance_formula() -> None:
    cond, uncond, image = torch.tensor([5.0]), torch.tensor([1.0]), torch.tensor([2.0])
    assert guided([cond, uncond], 2.5, 9.0).item() == 1 + 2.5 * 4
    assert guided([cond, uncond, image], 2.5, 1.6).item() == pytest.approx(1 + 1.6 * 1 + 2.5 * 3)
    assert guided([cond, uncond, image], 1.0, 1.0).item() == 5


def test_sigmas() -> None:
    assert torch.equal(sigmas(4), torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    shifted = sigmas(4, 3.0)
    assert shifted[[0, -1]].tolist() == [0, 1]
    assert shifted[2].item() == pytest.approx(0.5 / (0.5 + 3 - 1.5))


def test_time_shift_is_the_scheduler_of_diffusers(folder: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler", shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, 11)[:10])
    torch.testing.assert_close(scheduler.sigmas, sigmas(10, 3.0))
    torch.testing.assert_close(scheduler.timesteps, sigmas(10, 3.0)[:-1])
