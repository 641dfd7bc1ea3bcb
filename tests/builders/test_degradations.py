"""Degradations on real photographs: size, range, determinism, parameter ranges, and damage that grows with severity."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_sample_images

from builders.degradations import DEGRADATIONS, base, holes, kernels, noise, realesrgan, weather

LOCAL = ("inpaint", "outpaint")
WHOLE = [name for name in DEGRADATIONS if name not in LOCAL]


def _load_photos() -> list[np.ndarray]:
    folder = Path(skimage.data.__file__).parent
    read = [cv2.cvtColor(cv2.imread(str(folder / f)), cv2.COLOR_BGR2RGB) for f in ("astronaut.png", "chelsea.png")]
    pictures = [*load_sample_images().images, *read]
    return [cv2.resize(p, (200, 160), interpolation=cv2.INTER_AREA).astype(np.float32) / 255 for p in pictures]


PHOTOS = _load_photos()


def run(name: str, seed: int, severity: float = 0.5, image: np.ndarray = PHOTOS[0], **extras: object) -> base.Degraded:
    return DEGRADATIONS[name](image, np.random.default_rng(seed), severity, **extras)


def draws(name: str, count: int = 40) -> list[dict]:
    """Parameters at severities that cover [0, 1]."""
    return [run(name, seed, seed / (count - 1)).params for seed in range(count)]


# VisualCloze's rain crops the picture to a multiple of four, so input and target differ in size.
@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(DEGRADATIONS)),
    height=st.integers(16, 97),
    width=st.integers(16, 97),
    severity=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_size_range_and_plain_parameters(name: str, height: int, width: int, severity: float, seed: int) -> None:
    image = np.ascontiguousarray(PHOTOS[seed % len(PHOTOS)][:height, :width])
    before = image.copy()
    degraded = run(name, seed, severity, image)
    assert degraded.pixels.shape == image.shape
    assert degraded.pixels.dtype == np.float32
    assert np.isfinite(degraded.pixels).all()
    assert degraded.pixels.min() >= 0 and degraded.pixels.max() <= 1
    assert 0 <= degraded.severity <= 1
    assert json.loads(json.dumps(degraded.params, allow_nan=False)) == degraded.params
    assert (degraded.hole is not None) == (name in LOCAL)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_the_generator_alone_decides(name: str) -> None:
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)
        single = run(name, 7)
        cv2.setNumThreads(4)
        several = run(name, 7)
    finally:
        cv2.setNumThreads(threads)
    np.testing.assert_array_equal(single.pixels, several.pixels)
    assert single.params == several.params
    assert any(run(name, seed).params != single.params for seed in range(8, 20)), "the seed changes nothing"


@pytest.mark.parametrize("name", WHOLE)
def test_damage_grows_with_severity(name: str) -> None:
    def damage(severity: float) -> float:
        errors = [
            np.square(run(name, seed, severity, image).pixels - image).mean() for image in PHOTOS for seed in range(12)
        ]
        return float(np.mean(errors))

    low, middle, high = (damage(s) for s in (0.05, 0.5, 0.95))
    assert low < middle < high


@pytest.mark.parametrize(
    ("name", "ranges"),
    [
        ("deblur", {"length": (7, 41), "angle": (0, np.pi), "radius": (2, 10), "sigma": (1, 8)}),
        ("derain", {"amount": (40, 200), "length": (30, 40), "angle": (-45, 45), "width": (3, 11)}),
        ("dehaze", {"beta": (0.6, 1.8)}),
        ("low_light", {"exposure": (0.05, 0.8), "gamma": (1, 3)}),
        ("jpeg", {"quality": (5, 40)}),
        ("pixelate", {"block": (4, 24)}),
        ("contrast", {"contrast": (0.2, 0.8)}),
        ("over_exposure", {"gain": (1.6, 5)}),
        ("inpaint", {"area": (0.05, 0.6)}),
        ("outpaint", {"area": (0.2, 0.7)}),
    ],
)
def test_parameters_stay_in_their_ranges(name: str, ranges: dict[str, tuple[float, float]]) -> None:
    seen = draws(name)
    for key, (low, high) in ranges.items():
        values = [params[key] for params in seen if key in params]
        assert values, f"{key} is never drawn"
        assert low - 1e-3 <= min(values) <= max(values) <= high + 1e-3


def test_noise_kinds_have_the_listed_strength() -> None:
    seen = draws("denoise", 120)
    sigmas = [p["sigma"] for p in seen if p["kind"] == "gaussian"]
    assert min(sigmas) >= 10 and max(sigmas) <= 50
    assert {p["kind"] for p in seen} == set(noise.KINDS)
    gray = np.full((128, 128, 3), 0.5, np.float32)
    rng = np.random.default_rng(0)
    assert (noise.add_gaussian(gray, rng, 20, gray=False) - gray).std() * 255 == pytest.approx(20, rel=0.03)
    # Poisson noise of 256 photons at white has variance x / 256.
    assert (noise.add_poisson(gray, rng, 2, gray=False) - gray).std() == pytest.approx(2 * np.sqrt(0.5 / 256), rel=0.03)
    assert np.ptp(noise.add_gaussian(gray, rng, 20, gray=True), axis=2).max() < 1e-6


# --- Real-ESRGAN ---------------------------------------------------------------------------------------------------


def test_realesrgan_draws_the_published_distribution() -> None:
    rng = np.random.default_rng(0)
    plans = [realesrgan.draw_plan(rng) for _ in range(3000)]
    share = lambda hits: pytest.approx(np.mean(list(hits)), abs=0.04)  # noqa: E731
    for stage, probabilities, scale in (
        ("first", (0.2, 0.7, 0.1), (0.15, 1.5)),
        ("second", (0.3, 0.4, 0.3), (0.3, 1.2)),
    ):
        scales = np.array([p[stage]["scale"] for p in plans])
        assert scale[0] <= scales.min() and scales.max() <= scale[1]
        assert probabilities == (share(scales > 1), share(scales < 1), share(scales == 1))
        assert share(p[stage]["noise"]["kind"] == "gaussian" for p in plans) == 0.5
        assert share(p[stage]["noise"]["gray"] for p in plans) == 0.4
        jpegs = [p[stage]["jpeg"] for p in plans]
        assert (min(jpegs), max(jpegs)) == (30, 95)
    assert share(bool(p["second"]["blur"]) for p in plans) == 0.8
    assert share(bool(p["sinc"]) for p in plans) == 0.8
    assert share(p["jpeg_last"] for p in plans) == 0.5
    blurs = [p["first"]["blur"] for p in plans]
    assert {b["size"] for b in blurs} == {7, 9, 11, 13, 15, 17, 19, 21}
    families = Counter(b["family"] for b in blurs if b["family"] != "sinc")
    assert share(b["family"] == "sinc" for b in blurs) == 0.1
    for family, expected in {"iso": 0.45, "aniso": 0.25, "generalized_iso": 0.12, "plateau_aniso": 0.03}.items():
        assert families[family] / families.total() == pytest.approx(expected, abs=0.04)
    for blur in blurs:
        if blur["family"] == "sinc":
            assert np.pi / (3 if blur["size"] < 13 else 5) - 1e-3 <= blur["cutoff"] <= np.pi + 1e-3
        else:
            assert all(0.2 <= s <= 3 for s in blur["sigma"])
            low, high = (0.5, 4) if "generalized" in blur["family"] else (1, 2)
            assert low <= blur["beta"] <= high
    levels = {
        ("first", "gaussian"): 30,
        ("first", "poisson"): 3,
        ("second", "gaussian"): 25,
        ("second", "poisson"): 2.5,
    }
    for (stage, kind), top in levels.items():
        drawn = [p[stage]["noise"]["level"] for p in plans if p[stage]["noise"]["kind"] == kind]
        assert max(drawn) <= top < 1.1 * max(drawn)


def test_choosing_by_severity_does_not_bend_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(realesrgan, "apply_plan", lambda image, plan, rng: image)  # only the choice is looked at
    rng = np.random.default_rng(1)
    chosen = [run("super_resolution", seed, rng.random()).params for seed in range(500)]
    scales = np.array([p["first"]["scale"] for p in chosen])
    assert np.mean(scales < 1) == pytest.approx(0.7, abs=0.07)
    assert np.mean([p["second"]["noise"]["kind"] == "gaussian" for p in chosen]) == pytest.approx(0.5, abs=0.07)
    hard = [run("super_resolution", seed, 0.95).params["second"]["scale"] for seed in range(60)]
    easy = [run("super_resolution", seed, 0.05).params["second"]["scale"] for seed in range(60)]
    assert np.mean(hard) < np.mean(easy)


def test_sharpening_only_feeds_the_degradation() -> None:
    image = PHOTOS[1]
    sharp = realesrgan.sharpened(image)
    assert np.abs(cv2.Laplacian(sharp, cv2.CV_32F)).mean() > 1.1 * np.abs(cv2.Laplacian(image, cv2.CV_32F)).mean()
    flat = np.full((40, 40, 3), 0.3, np.float32)
    np.testing.assert_allclose(realesrgan.sharpened(flat), flat, atol=1e-6)


# --- kernels -------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10_000))
def test_blur_kernels_sum_to_one_and_are_symmetric(seed: int) -> None:
    kernel = kernels.render(kernels.draw_blur(np.random.default_rng(seed), (0.2, 3)))
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-6)


def test_isotropic_gaussian_is_the_gaussian() -> None:
    line = cv2.getGaussianKernel(21, 2.0)
    expected = line @ line.T
    np.testing.assert_allclose(kernels.gaussian_family("iso", 21, [2.0, 2.0], 0.3, 1.0), expected, atol=1e-6)


def test_anisotropic_kernel_is_longer_along_its_angle() -> None:
    kernel = kernels.gaussian_family("aniso", 21, [3.0, 1.0], 0.0, 1.0)
    x = np.arange(21) - 10
    assert (kernel.sum(axis=0) * x**2).sum() > 4 * (kernel.sum(axis=1) * x**2).sum()


@given(length=st.floats(3, 60), angle=st.floats(0, np.pi), bend=st.floats(-2.5, 2.5))
def test_motion_does_not_shift_the_image(length: float, angle: float, bend: float) -> None:
    kernel = kernels.motion(length, angle, bend)
    axis = np.arange(len(kernel)) - len(kernel) // 2
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    assert abs((kernel.sum(axis=0) * axis).sum()) < 1e-3
    assert abs((kernel.sum(axis=1) * axis).sum()) < 1e-3


@pytest.mark.parametrize("length", [7, 20, 41])
def test_straight_motion_has_its_length(length: int) -> None:
    profile = kernels.motion(length, 0.0).sum(axis=0)
    axis = np.arange(len(profile)) - len(profile) // 2
    # A uniform segment of length L has variance L² / 12; pixels add a little.
    assert (profile * axis**2).sum() == pytest.approx(length**2 / 12, rel=0.1)


@pytest.mark.parametrize("radius", [2.0, 5.5, 10.0])
def test_disk_has_its_radius(radius: float) -> None:
    profile = kernels.disk(radius).sum(axis=0)
    axis = np.arange(len(profile)) - len(profile) // 2
    assert (profile * axis**2).sum() == pytest.approx(radius**2 / 4, rel=0.1, abs=0.2)  # variance of a disk: r² / 4


# --- light and weather ---------------------------------------------------------------------------------------------


def test_haze_is_the_scattering_model() -> None:
    image = PHOTOS[0]
    plans = (run("dehaze", seed, 0.5) for seed in range(50))
    haze = next(h for h in plans if h.params["geometry"]["kind"] == "constant")
    t = np.exp(-haze.params["beta"] * haze.params["geometry"]["distance"])
    expected = image * t + np.array(haze.params["airlight"]) * (1 - t)
    np.testing.assert_allclose(haze.pixels, expected, atol=1e-5)
    assert all(0.65 <= a <= 1 for a in haze.params["airlight"])


def test_haze_follows_the_depth_map() -> None:
    depth = np.zeros((80, 100), np.uint16)  # of another size than the picture
    depth[:, :50], depth[:, 50:] = 1000, 60_000  # left is far
    depth[30:50, 60:80] = 0  # unknown: inside the near half
    image = np.zeros((160, 200, 3), np.float32)
    hazy = run("dehaze", 0, 1.0, image, depth=depth).pixels
    assert hazy[:, :90].mean() > 0.5
    assert hazy[:, 115:].max() < 0.05


def test_rain_and_snow_only_add_light_to_a_dark_scene() -> None:
    dark = np.full((160, 200, 3), 0.05, np.float32)
    for name in ("derain", "desnow"):
        bright = run(name, 3, 0.5, dark).pixels
        assert bright.min() >= 0.05
        assert 0.005 < (bright.mean(axis=2) > 0.4).mean() < 0.5, name


def test_rain_streaks_follow_their_angle() -> None:
    seeds = weather._streaks((256, 256), np.random.default_rng(0), density=0.001, length=35, width=3, angle=0.0)
    assert np.abs(np.diff(seeds, axis=1)).mean() > 3 * np.abs(np.diff(seeds, axis=0)).mean()


def test_low_light_is_darker_and_over_exposure_brighter() -> None:
    for image in PHOTOS:
        assert (
            run("low_light", 0, 0.3, image).pixels.mean()
            < image.mean()
            < run("over_exposure", 0, 0.3, image).pixels.mean()
        )


# --- colour and compression ----------------------------------------------------------------------------------------


def test_colourless_pictures_have_no_colour_but_hints() -> None:
    kinds = Counter()
    for seed in range(30):
        degraded = run("colorize", seed, seed / 29, PHOTOS[1])
        chroma = np.ptp(degraded.pixels, axis=2)
        kind = degraded.params["kind"]
        kinds[kind] += 1
        if kind in ("gray", "lab"):
            assert chroma.max() < 1e-6
        if kind == "hints":
            assert degraded.wording == "hints"
            assert 0 < (chroma > 0.05).mean() < 0.3
        if "weights" in degraded.params:
            assert sum(degraded.params["weights"]) == pytest.approx(1, abs=1e-3)
    assert set(kinds) == {"gray", "lab", "sepia", "hints"}


@given(height=st.integers(16, 90), width=st.integers(16, 90), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_pixelated_blocks_have_one_colour(height: int, width: int, seed: int) -> None:
    image = np.ascontiguousarray(PHOTOS[0][:height, :width])
    degraded = run("pixelate", seed, 0.9, image)
    size = max(2, round(degraded.params["block"] * base.length_scale(image.shape)))
    top, left = degraded.params["offset"]
    rows = (np.arange(height) + top) // size
    columns = (np.arange(width) + left) // size
    for row, column in {(r, c) for r in rows[[0, -1]] for c in columns[[0, -1]]}:
        block = degraded.pixels[rows == row][:, columns == column]
        assert np.ptp(block, axis=(0, 1)).max() == 0


# --- holes ---------------------------------------------------------------------------------------------------------

OBJECT = np.zeros((160, 200), bool)
OBJECT[40:120, 60:90] = OBJECT[90:120, 60:150] = True


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(sorted(holes.KINDS)),
    goal=st.floats(0.06, 0.54),
    size=st.sampled_from([(160, 200), (64, 97), (131, 96)]),
    seed=st.integers(0, 2**31),
)
def test_holes_reach_their_area(kind: str, goal: float, size: tuple[int, int], seed: int) -> None:
    hole = holes.draw_hole(kind, size, np.random.default_rng(seed), goal, [OBJECT])
    assert hole.shape == size and hole.dtype == bool
    assert goal / 1.1 <= hole.mean() <= goal * 1.1


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("seed", range(12))
def test_only_the_hole_is_filled(name: str, seed: int) -> None:
    image = PHOTOS[seed % 4]
    degraded = run(name, seed, seed / 11, image)
    hole, fill = degraded.hole, degraded.params["fill"]
    np.testing.assert_array_equal(degraded.pixels[~hole], image[~hole])
    inside = degraded.pixels[hole]
    if fill == "noise-filled":
        assert inside.mean() == pytest.approx(0.5, abs=0.05) and inside.std() > 0.2
    else:
        assert (inside == {"gray": 0.5, "black": 0.0, "white": 1.0}[fill]).all()
    assert degraded.fields == {"fill": fill}


def test_severity_of_a_hole_is_its_area() -> None:
    for name in LOCAL:
        results = [run(name, seed, seed / 19) for seed in range(20)]
        areas = [float(r.hole.mean()) for r in results]
        assert np.corrcoef(areas, [r.severity for r in results])[0, 1] > 0.99
        assert np.corrcoef(areas, np.arange(20))[0, 1] > 0.97


def test_a_fill_that_cannot_be_seen_is_not_used() -> None:
    white = np.ones((160, 200, 3), np.float32)
    assert "white" not in {run("inpaint", seed, 0.5, white).params["fill"] for seed in range(40)}


def test_object_shapes_do_not_outline_the_object() -> None:
    overlaps, filled = [], 0
    for seed in range(40):
        hole = holes.draw_hole("object", OBJECT.shape, np.random.default_rng(seed), 0.15, [OBJECT])
        overlaps.append((hole & OBJECT).sum() / (hole | OBJECT).sum())
        filled += hole.any()
    assert filled == 40
    assert np.mean(overlaps) < 0.3 and max(overlaps) < 0.8


def test_object_shapes_need_objects() -> None:
    assert "object" not in {run("inpaint", seed).params["kind"] for seed in range(60)}
    assert "object" in {run("inpaint", seed, masks=[OBJECT]).params["kind"] for seed in range(60)}


def test_outpainting_keeps_one_window_off_centre() -> None:
    offsets, aspects = [], []
    for seed in range(40):
        degraded = run("outpaint", seed, seed / 39)
        left, top, right, bottom = degraded.params["window"]
        expected = np.ones((160, 200), bool)
        expected[top:bottom, left:right] = False
        np.testing.assert_array_equal(degraded.hole, expected)
        offsets.append(abs((left + right) / 2 - 100) / 200 + abs((top + bottom) / 2 - 80) / 160)
        aspects.append((right - left) / (bottom - top))
    assert np.mean(np.array(offsets) > 0.02) > 0.8
    assert min(aspects) < 0.8 and max(aspects) > 2
