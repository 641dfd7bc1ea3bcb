"""Depth by models with random weights; surface normals from depths that are known exactly."""

import math

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from builders.annotators.depth import DepthEstimator, inverse_depth, quantise
from builders.annotators.normals import NormalEstimator, encode_normals, normals_from_depth
from builders.annotators.stored import Normals, depth_map
from builders.base import SourceImage
from filters.models import ModelMissing
from schemas.codec import decode_raw, encode_jpeg, encode_png
from schemas.identity import uid_of
from schemas.records import ImageRecord
from tests.builders.map_models import save_depth_anything

FOCAL = 200 / (2 * math.tan(math.radians(55) / 2))


def source(pixels, **fields):
    jpeg = encode_jpeg(pixels)
    return SourceImage(ImageRecord(uid=uid_of(jpeg), width=pixels.shape[1], height=pixels.shape[0]), jpeg, **fields)


PHOTOS = [
    source(skimage.data.chelsea()[:181, :240]),
    source(skimage.data.coffee()[:181, :240]),
    source(skimage.data.astronaut()[:120, :97]),
]


def estimator(folder, **params):
    return DepthEstimator(DepthEstimator.Params(model=str(folder), device="cpu", **params))


def test_depth_has_the_size_of_the_photo_and_keeps_raw_values(tmp_path):
    made = estimator(save_depth_anything(tmp_path))
    made.preflight()
    found = made.annotate(PHOTOS)
    for image, artefact in zip(PHOTOS, found, strict=True):
        stored = decode_raw(artefact.members["depth.png"])
        assert stored.dtype == np.uint16 and stored.shape == image.pixels.shape[:2]
        assert stored.min() >= 1 and stored.max() == 65535
        assert artefact.data["scale"] > 0 and artefact.data["unit"] == ""


def test_depth_in_batches_is_depth_one_by_one(tmp_path):
    made = estimator(save_depth_anything(tmp_path))
    together = made.annotate(PHOTOS)
    assert together == made.annotate(PHOTOS)
    for image, artefact in zip(PHOTOS, together, strict=True):
        (alone,) = made.annotate([image])
        a, b = (decode_raw(each.members["depth.png"]).astype(int) for each in (artefact, alone))
        assert np.abs(a - b).max() <= 2  # of 65535: sums of floats in another order


def test_metres_become_inverse_depth(tmp_path):
    relative = estimator(save_depth_anything(tmp_path / "relative")).annotate(PHOTOS[:1])[0]
    metric = estimator(save_depth_anything(tmp_path / "metric", depth_estimation_type="metric", max_depth=20))
    (found,) = metric.annotate(PHOTOS[:1])
    assert (relative.data["unit"], found.data["unit"]) == ("", "1/m")
    metres = 1 / (decode_raw(found.members["depth.png"]) * found.data["scale"])
    assert metres.min() > 0 and metres.max() < 20.1


def test_what_a_network_predicts_has_to_be_known(tmp_path):
    made = estimator(save_depth_anything(tmp_path))
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"depth_anything"', '"chmv2"'))
    with pytest.raises(ModelMissing, match="output: inverse"):
        made.preflight()
    estimator(tmp_path, output="inverse").preflight()


def test_wrong_parameters_are_named():
    with pytest.raises(ValidationError, match="what midas predicts is known"):
        DepthEstimator.Params(model="/m", detector="midas", output="metres")
    with pytest.raises(ValidationError, match="float32, not float16"):
        DepthEstimator.Params(model="/m", detector="zoe", dtype="float16")


@given(st.floats(0.1, 100), st.integers(0, 5))
def test_stored_depth_gives_the_prediction_back(largest, seed):
    predicted = (np.random.default_rng(seed).random((9, 7)) * largest).astype(np.float32)
    stored, scale = quantise(inverse_depth(predicted, "inverse"))
    np.testing.assert_allclose(stored * scale, predicted, atol=1.01 * scale)
    stored, scale = quantise(inverse_depth(predicted + 0.5, "metres"))
    np.testing.assert_allclose(stored * scale, 1 / (predicted + 0.5), atol=0.51 * scale)


def test_broken_networks_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        quantise(np.array([[1.0, np.nan]]))


def plane(normal, size=(150, 200)):
    """Inverse depth of a plane with this normal (right, up, towards the viewer), seen through 55 degrees."""
    height, width = size
    v, u = np.mgrid[:height, :width]
    x, y = (u - (width - 1) / 2) / FOCAL, -(v - (height - 1) / 2) / FOCAL
    return (normal[0] * x + normal[1] * y - normal[2]) / -1.0


@given(st.floats(-0.5, 0.5), st.floats(-0.5, 0.5), st.floats(0.1, 1000))
def test_normals_of_planes_are_exact(right, up, unit):
    expected = np.array([right, up, 1.0]) / math.sqrt(right**2 + up**2 + 1)
    found = normals_from_depth(plane(expected) * unit, 55, 1.0)[10:-10, 10:-10]
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=2e-3)


def test_normals_of_a_sphere():
    """A ball in front of the camera: the normal of its surface point P is (P - centre) / radius."""
    height, width, radius, distance = 161, 201, 1.0, 4.0
    focal = 201 / (2 * math.tan(math.radians(55) / 2))
    v, u = np.mgrid[:height, :width]
    ray = np.stack([(u - 100) / focal, (v - 80) / focal, np.ones((height, width))], -1)
    b, c = ray[..., 2] * distance, distance**2 - radius**2
    root = b**2 - (ray**2).sum(-1) * c
    z = np.where(root > 0, (b - np.sqrt(np.maximum(root, 0))) / (ray**2).sum(-1), np.inf)
    expected = (ray * np.where(np.isfinite(z), z, 0)[..., None] - (0, 0, distance)) * (1, -1, -1)
    found = normals_from_depth(1 / z, 55, 0.5)
    facing = expected[..., 2] > 0.5
    facing &= np.isfinite(z)
    assert facing.sum() > 1000
    assert np.abs(found - expected)[facing].max() < 0.05
    assert (found[~np.isfinite(z)] == 0).all()  # unknown stays unknown


def test_colours_of_normals():
    """What faces the camera is blue; what faces right is red; what faces up is green; unknown is black."""
    vectors = np.array([[(0, 0, 1), (1, 0, 0), (0, 1, 0), (-1, 0, 0), (0, 0, 0), (0, 0, 2.0)]], float)
    found = encode_normals(vectors)[0].tolist()
    grey = 128
    assert found == [
        [grey, grey, 255],
        [255, grey, grey],
        [grey, 255, grey],
        [0, grey, grey],
        [0, 0, 0],
        [grey, grey, 255],
    ]


def test_normals_of_a_real_scene():
    """The motorcycle's true disparity: the floor faces up, the board on the wall behind faces the camera.

    Calibration of Middlebury 2014, Motorcycle, at a quarter of the size: 1/z ~ disparity + 31.086, f = 994.978.
    """
    left, _, disparity = skimage.data.stereo_motorcycle()
    inverse = np.where(np.isfinite(disparity), disparity + 31.086, 0) * 600
    found = normals_from_depth(inverse.astype(np.uint16), math.degrees(2 * math.atan(741 / 2 / 994.978)), 1.5)
    floor, board = np.median(found[440:490, 60:200], (0, 1)), np.median(found[30:100, 190:270], (0, 1))
    assert floor[1] > 0.95 and board[2] > 0.85
    image = source(left, depth_png=encode_png(inverse.astype(np.uint16)))
    assert Normals(image)(image.pixels, np.random.default_rng(0)).stats["known"] > 0.9


def test_the_sources_own_depth_comes_first(tmp_path):
    (artefact,) = estimator(save_depth_anything(tmp_path)).annotate(PHOTOS[:1])
    photo = PHOTOS[0]
    own = encode_png(np.tile(np.linspace(1, 60000, 240).astype(np.uint16), (181, 1)))
    measured = source(photo.pixels, depth_png=own, artefacts={"depth": artefact})
    estimated = source(photo.pixels, artefacts={"depth": artefact})
    assert depth_map(measured).made_by is None
    np.testing.assert_array_equal(depth_map(measured).inverse_depth, decode_raw(own))
    assert depth_map(estimated).made_by.model == str(tmp_path)
    assert Normals(estimated).made_by.name == "annotate:depth"


def save_marigold(folder):
    """Marigold's pipeline with networks of a few thousand parameters."""
    from diffusers import AutoencoderKL, DDIMScheduler, MarigoldNormalsPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        in_channels=8,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
    )
    text = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    (folder / "words").mkdir(parents=True)
    (folder / "words" / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3}')
    (folder / "words" / "merges.txt").write_text("#version: 0.2\n")
    pipeline = MarigoldNormalsPipeline(
        unet=unet,
        vae=vae,
        scheduler=DDIMScheduler(prediction_type="v_prediction"),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "words", model_max_length=77),
        prediction_type="normals",
        default_denoising_steps=1,
        default_processing_resolution=64,
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def test_marigold_normals(tmp_path):
    folder = save_marigold(tmp_path)
    params = NormalEstimator.Params(model=str(folder), resolution=64, steps=1, device="cpu")
    made = NormalEstimator(params)
    made.preflight()
    found = made.annotate(PHOTOS[:2])
    assert found == [NormalEstimator(params).annotate([image])[0] for image in PHOTOS[:2]]
    for image, artefact in zip(PHOTOS, found, strict=False):
        normals = decode_raw(artefact.members["normal.png"])
        assert normals.shape == image.pixels.shape
        length = np.linalg.norm(normals.astype(float) / 127.5 - 1, axis=-1)
        assert np.abs(length - 1).max() < 0.02
    other = NormalEstimator(params.model_copy(update={"seed": 1}))
    assert other.annotate(PHOTOS[:1])[0].members != found[0].members


def test_marigold_is_checked_before_the_start(tmp_path):
    folder = save_marigold(tmp_path)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelMissing, match=r"has no unet/\*.safetensors"):
        NormalEstimator(NormalEstimator.Params(model=str(folder))).preflight()
