"""Networks of controlnet_aux with random weights, loaded as users load them: `from_pretrained(directory)`."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from builders.annotators.annotator import Annotator
from builders.annotators.controlnet import Edges, LineartAnime, LineartRealistic, Mlsd, SoftEdges, call, fit, unfit
from builders.annotators.depth import DepthEstimator
from builders.annotators.normals import NormalEstimator
from builders.base import SourceImage
from filters.models import ModelMissing
from schemas.codec import decode_raw, encode_jpeg
from schemas.identity import uid_of
from schemas.records import ImageRecord
from tests.builders import map_models

ASTRONAUT = np.ascontiguousarray(skimage.data.astronaut()[:149, 150:361])  # sides that no network likes


def source(pixels: np.ndarray) -> SourceImage:
    jpeg = encode_jpeg(pixels)
    return SourceImage(ImageRecord(uid=uid_of(jpeg), width=pixels.shape[1], height=pixels.shape[0]), jpeg)


@dataclass(frozen=True)
class Case:
    annotator: type[Annotator]
    save: Callable[[Path], Path]
    params: dict[str, Any]


DRAWINGS = {
    "hed": Case(SoftEdges, map_models.save_hed, {}),
    "pidinet": Case(Edges, map_models.save_pidinet, {}),
    "teed": Case(Edges, map_models.save_teed, {"detector": "teed"}),
    "lineart": Case(LineartRealistic, map_models.save_lineart, {}),
    "lineart_anime": Case(LineartAnime, map_models.save_lineart_anime, {}),
}
OTHERS = {
    "mlsd": Case(Mlsd, map_models.save_mlsd, {}),
    "normalbae": Case(NormalEstimator, map_models.save_normalbae, {"detector": "normalbae"}),
}
HEAVY = {
    "leres": Case(DepthEstimator, map_models.save_leres, {"detector": "leres"}),
    "midas": Case(DepthEstimator, map_models.save_midas, {"detector": "midas"}),
    "zoe": Case(DepthEstimator, map_models.save_zoe, {"detector": "zoe"}),
}
CASES = DRAWINGS | OTHERS | HEAVY
EVERY = [pytest.param(name, marks=pytest.mark.slow if name in HEAVY else ()) for name in CASES]


@pytest.fixture(scope="module")
def annotator(tmp_path_factory):
    """Annotators by name, each with its weights; those of one test follow each other, so one is kept at a time."""
    kept: dict[str, Annotator] = {}

    def make(name: str) -> Annotator:
        if name not in kept:
            kept.clear()
            case = CASES[name]
            folder = case.save(tmp_path_factory.mktemp(name))
            kept[name] = case.annotator(
                case.annotator.Params(model=str(folder), resolution=128, device="cpu", **case.params)
            )
        return kept[name]

    return make


@pytest.mark.parametrize("name", EVERY)
def test_detectors_run_from_a_directory(name, annotator):
    made = annotator(name)
    made.preflight()
    images = [source(ASTRONAUT), source(np.ascontiguousarray(ASTRONAUT[:, ::-1]))][: 1 if name in HEAVY else 2]
    state = torch.get_rng_state(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    together = made.annotate(images)
    assert (torch.get_rng_state() == state[0]).all() and np.random.get_state()[1].tobytes() == state[1]  # noqa: NPY002
    if name not in HEAVY:  # these share all but the network, and take half a minute for an image
        assert together == [made.annotate([image])[0] for image in images]  # alone as in company, and twice the same
    assert len({str(artefact) for artefact in together}) == len(images)
    for artefact in together:
        assert artefact.data["op"] == made.op().model_dump(mode="json")
        for member, png in artefact.members.items():
            assert member == f"{made.name}.png" and decode_raw(png).shape[:2] == ASTRONAUT.shape[:2]
    assert made.op().revision.startswith("sha256:") and made.op().model == made.params.model


@pytest.mark.parametrize("name", DRAWINGS)
def test_lines_stay_on_their_pixels(name, annotator):
    """Regression: controlnet_aux rounds sides to multiples of 64, which moves lines by up to 32 pixels.

    A photo with odd sides must give what its top left corner gives in a larger photo that needs no rounding.
    """
    made = annotator(name)
    large = np.ascontiguousarray(skimage.data.astronaut()[:256, 100:356])
    whole = type(made)(made.params.model_copy(update={"resolution": 256}))
    part = type(made)(made.params.model_copy(update={"resolution": 227}))
    whole.__dict__["_network"] = part.__dict__["_network"] = made._network
    expected = whole._draw(large)
    library = call(made._network, large, made.params)[..., 0]
    np.testing.assert_array_equal(expected, library)  # nothing to round: exactly the library's own
    found = part._draw(np.ascontiguousarray(large[:227, :243]))
    inner = np.s_[16:144, 16:144]
    shift, _ = cv2.phaseCorrelate(found[inner].astype(float), expected[inner].astype(float))
    assert found.shape == (227, 243) and np.hypot(*shift) < 0.5


def blob(height: int, width: int) -> np.ndarray:
    """A soft spot a third from the left and two thirds from the top, uint8 RGB."""
    ys, xs = np.mgrid[:height, :width]
    spot = np.exp(-((xs - width // 3) ** 2 + (ys - 2 * height // 3) ** 2) / (2 * 5**2))
    return np.repeat(np.rint(255 * spot).astype(np.uint8)[..., None], 3, axis=2)


def centre(pixels: np.ndarray) -> np.ndarray:
    ys, xs = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    weight = pixels[..., 0] / pixels[..., 0].sum(dtype=float)
    return np.array([(ys * weight).sum(), (xs * weight).sum()])


@given(st.integers(80, 400), st.integers(80, 400), st.integers(64, 300), st.sampled_from([64, 256]))
def test_a_photo_comes_back_at_its_size_and_place(height, width, resolution, multiple):
    pixels = blob(height, width)
    seen, size = fit(pixels, resolution, multiple)
    assert seen.shape[0] % multiple == seen.shape[1] % multiple == 0
    assert max(size) <= 4 * resolution + 1
    back = unfit(seen, size, pixels.shape[:2])
    assert back.shape == pixels.shape
    assert np.abs(centre(back) - centre(pixels)).max() < 0.2


def test_mlsd_finds_no_lines_without_an_error(tmp_path):
    folder = map_models.save_mlsd(tmp_path)
    params = Mlsd.Params(model=str(folder), resolution=64, device="cpu", min_length=1e6)
    (found,) = Mlsd(params).annotate([source(np.zeros((70, 90, 3), np.uint8))])
    assert found.data["lines"] == []


def test_absent_weights_are_named_before_the_start(tmp_path):
    made = LineartRealistic(LineartRealistic.Params(model=str(map_models.save_teed(tmp_path))))
    with pytest.raises(ModelMissing, match=r"has no sk_model.pth, no sk_model2.pth"):
        made.preflight()


def test_weights_of_another_network_are_refused(tmp_path):
    map_models.save_teed(tmp_path)
    (tmp_path / "5_model.pth").rename(tmp_path / "ControlNetHED.pth")
    made = SoftEdges(SoftEdges.Params(model=str(tmp_path), device="cpu"))
    with pytest.raises(ModelMissing, match=r"HEDdetector cannot load ControlNetHED.pth: Error"):
        made.annotate([source(ASTRONAUT)])


def test_pickles_that_could_run_code_are_refused(tmp_path):
    class Danger:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    (tmp_path / "ControlNetHED.pth").write_bytes(pickle.dumps(Danger()))
    with pytest.raises(ModelMissing, match="ControlNetHED"):
        SoftEdges(SoftEdges.Params(model=str(tmp_path), device="cpu")).annotate([source(ASTRONAUT)])
    assert not (tmp_path / "harm").exists()


def test_half_precision_is_refused():
    with pytest.raises(ValidationError, match="controlnet_aux computes in float32, not bfloat16"):
        SoftEdges.Params(model="/weights", dtype="bfloat16")


def test_why_anyline_is_left_out():
    """AnylineDetector blends its two drawings in bytes, where 1 - (1 - a)(1 - b) wraps around. Drop with a release
    that does not."""
    from controlnet_aux import AnylineDetector

    light, dim = np.full((1, 1, 3), 200, np.uint8), np.full((1, 1, 3), 30, np.uint8)
    blended = AnylineDetector(None).combine_layers(light, dim)
    assert blended[0, 0, 0] == (1 - (1 - 30) * (1 - 200)) % 256 < 200
