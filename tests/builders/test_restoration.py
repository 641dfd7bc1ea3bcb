"""The restoration builder: records, members, gates, exact masks, and what JPEG leaves alone."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
from pydantic import ValidationError
from sklearn.datasets import load_sample_images

from builders.base import Rejected, Sample, SourceImage
from builders.degradations import DEGRADATIONS
from builders.restoration import Restoration, RestorationParams
from builders.templates import load_templates
from schemas.codec import decode_raw, decode_rgb, encode_jpeg, encode_png
from schemas.identity import generator, uid_of
from schemas.instructions import lint_instruction
from schemas.masks import encode_rle
from schemas.records import Captions, Entity, ImageRecord
from schemas.vocabulary import STREAMS

LOCAL = ("inpaint", "outpaint")
WHOLE = [name for name in DEGRADATIONS if name not in LOCAL]


def _source(pixels: np.ndarray, depth_png: bytes = b"", **fields: object) -> SourceImage:
    jpeg = encode_jpeg(pixels)
    height, width = pixels.shape[:2]
    return SourceImage(ImageRecord(uid=uid_of(jpeg), width=width, height=height, **fields), jpeg, depth_png)


def _photo(index: int, size: tuple[int, int] = (381, 301)) -> np.ndarray:
    return cv2.resize(load_sample_images().images[index], size, interpolation=cv2.INTER_AREA)


CHINA, FLOWER = (_source(_photo(i)) for i in (0, 1))
BUILDER = Restoration(RestorationParams())


def build(name: str, image: SourceImage = CHINA, seed: int = 0, builder: Restoration = BUILDER) -> Sample:
    outcome = builder.build(image, name, generator(seed, f"{image.record.uid}/{name}", builder.name))
    assert not isinstance(outcome, Rejected), outcome
    (sample,) = outcome
    return sample


def reject(name: str, image: SourceImage, **params: object) -> Rejected:
    outcome = Restoration(RestorationParams(**params)).build(image, name, np.random.default_rng(0))
    assert isinstance(outcome, Rejected)
    return outcome


# --- parameters and attempts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"subtasks": {"deblurr": 1}}, "did you mean 'deblur'"),
        ({"subtasks": {"deblur": 0}}, "greater than 0"),
        ({"subtasks": {}}, "at least 1"),
        ({"subtasks": ["deblur"], "per_image": 2}, "exceeds the 1 subtask"),
        ({"severity": (0.9, 0.1)}, "not a range inside"),
        ({"severity": (0, 1.5)}, "not a range inside"),
        ({"psnr": (40, 8)}, "not a range"),
        ({"per_images": 2}, "Extra inputs"),
    ],
)
def test_wrong_parameters_name_the_culprit(params: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RestorationParams(**params)


def test_attempts_are_distinct_weighted_and_deterministic() -> None:
    weights = {"deblur": 6.0, "denoise": 1.0, "inpaint": 1.0}
    builder = Restoration(RestorationParams(subtasks=weights, per_image=2))
    runs = [builder.attempts(CHINA.record, np.random.default_rng(seed)) for seed in range(300)]
    assert all(len(set(names)) == 2 and set(names) <= set(weights) for names in runs)
    assert runs == [builder.attempts(CHINA.record, np.random.default_rng(seed)) for seed in range(300)]
    first = Counter(names[0] for names in runs)
    assert first["deblur"] / 300 == pytest.approx(0.75, abs=0.08)
    every = Restoration(RestorationParams(subtasks=list(DEGRADATIONS), per_image=len(DEGRADATIONS)))
    assert sorted(every.attempts(CHINA.record, np.random.default_rng(0))) == sorted(DEGRADATIONS)


# --- samples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_every_subtask_makes_a_complete_sample(name: str) -> None:
    sample = build(name)
    record = sample.record
    assert list(sample.members) == list(STREAMS["restore"].members)
    assert (record.stream, record.task, record.subtask) == ("restore", "restore", name)
    assert record.input_roles == ("degraded",) and record.edit_source_index == 0
    assert record.real_output and not record.real_input and record.output_kind == "photo"
    assert record.parents == (CHINA.record.uid,)
    op = record.ops[-1]
    assert op.name == f"degrade_{name}" and json.loads(op.params)["severity"] == record.severity
    mask = decode_raw(sample.images["edit_mask.png"])
    source, target = (decode_rgb(sample.images[m]) for m in ("input_1.jpg", "output.jpg"))
    assert source.shape == target.shape == (301, 381, 3) and mask.shape == (301, 381)
    assert set(np.unique(mask)) <= {0, 255}
    assert record.edit_area_ratio == pytest.approx((mask == 255).mean(), abs=1e-6)
    assert record.change.l1_inside == pytest.approx(np.abs(source.astype(int) - target)[mask == 255].mean(), abs=1e-3)
    assert len({record.instruction, *record.instruction_variants}) == 3
    assert sample.members == build(name).members, "not deterministic"


@pytest.mark.parametrize("name", WHOLE)
def test_whole_image_targets_pass_through(name: str) -> None:
    sample = build(name)
    assert sample.images["output.jpg"] == CHINA.jpeg
    assert (decode_raw(sample.images["edit_mask.png"]) == 255).all()
    assert sample.record.edit_area_ratio == 1.0


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("seed", range(6))
def test_blocks_away_from_the_hole_decode_identically(name: str, seed: int) -> None:
    sample = build(name, FLOWER, seed)
    mask = decode_raw(sample.images["edit_mask.png"]) > 0
    differs = (decode_rgb(sample.images["input_1.jpg"]) != decode_rgb(sample.images["output.jpg"])).any(axis=2)
    height, width = (-(-n // 8) * 8 for n in mask.shape)
    padded = np.zeros((2, height, width), bool)
    padded[:, : mask.shape[0], : mask.shape[1]] = mask, differs
    masked, changed = padded.reshape(2, height // 8, 8, width // 8, 8).any(axis=(2, 4))
    assert masked.any() and not masked.all()
    assert not (changed & ~masked).any()
    assert sample.record.aligned and sample.record.align.psnr_outside > 40 and sample.record.align.shift_px < 0.1


@pytest.mark.parametrize("seed", range(6))
def test_edit_mask_is_the_hole(seed: int) -> None:
    """UniWorld re-derives masks from differences and loses every region when several are equally large."""
    builder = Restoration(RestorationParams(subtasks=["inpaint"], per_image=1))
    sample = build("inpaint", CHINA, seed, builder)
    params = json.loads(sample.record.ops[-1].params)
    mask = decode_raw(sample.images["edit_mask.png"]) > 0
    source = decode_rgb(sample.images["input_1.jpg"]).astype(int)
    assert mask.mean() == pytest.approx(params["area"], abs=1e-3)
    if params["fill"] != "noise-filled":
        level = {"gray": 128, "black": 0, "white": 255}[params["fill"]]
        inside = cv2.erode(mask.astype(np.uint8), np.ones((17, 17))) > 0  # whole JPEG blocks of one colour
        assert not inside.any() or np.abs(source[inside] - level).max() <= 1
        assert np.abs(source[mask] - level).mean() < 4
    assert params["fill"] in sample.record.instruction


def test_severity_is_balanced_and_kept_in_its_range() -> None:
    severities = [build("contrast", FLOWER, seed).record.severity for seed in range(60)]
    counts, _ = np.histogram(severities, bins=4, range=(0, 1))
    assert counts.min() >= 8
    narrow = Restoration(RestorationParams(severity=(0.4, 0.5)))
    assert all(0.4 <= build("contrast", FLOWER, seed, narrow).record.severity <= 0.5 for seed in range(5))


def test_measured_alignment_of_degraded_pairs() -> None:
    aligned = [build(name, CHINA, seed).record.aligned for name in WHOLE for seed in range(2)]
    assert np.mean(aligned) > 0.9


def test_depth_entities_and_captions_are_used() -> None:
    folder = Path(skimage.data.__file__).parent
    left = cv2.cvtColor(cv2.imread(str(folder / "motorcycle_left.png")), cv2.COLOR_BGR2RGB)
    disparity = np.load(folder / "motorcycle_disp.npz")["arr_0"]
    disparity = np.where(np.isfinite(disparity), disparity, 0)
    size = (371, 250)
    depth = cv2.resize(disparity, size, interpolation=cv2.INTER_NEAREST) / disparity.max() * 65535
    mask = np.zeros((250, 371), bool)
    mask[60:200, 80:300] = True
    entity = Entity(phrase="a motorcycle", box=(80, 60, 300, 200), mask=encode_rle(mask))
    image = _source(
        cv2.resize(left, size, interpolation=cv2.INTER_AREA),
        encode_png(depth.astype(np.uint16)),
        entities=(entity,),
        captions=Captions(short="A red motorcycle in a garage."),
    )
    assert json.loads(build("dehaze", image).record.ops[-1].params)["geometry"] == {"kind": "depth"}
    always = Restoration(RestorationParams(caption_probability=1))
    holes = [build("inpaint", image, seed, always).record for seed in range(25)]
    assert "object" in {json.loads(record.ops[-1].params)["kind"] for record in holes}
    assert all("A red motorcycle in a garage" in record.instruction for record in holes)
    assert "motorcycle" not in build("deblur", image, 0, always).record.instruction


# --- gates ---------------------------------------------------------------------------------------------------------


def test_a_gray_picture_cannot_be_colourised() -> None:
    gray = np.repeat(cv2.cvtColor(_photo(0), cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    rejected = reject("colorize", _source(gray), severity=(0.25, 0.25))
    assert rejected.reason == "no_op" and rejected.value > 40 and rejected.detail == "colorize"


def test_a_lost_picture_is_unrecoverable() -> None:
    bright = (200 + _photo(0) * 0.2).astype(np.uint8)
    rejected = reject("low_light", _source(bright), severity=(1, 1))
    assert rejected.reason == "unrecoverable" and rejected.value < 8


@pytest.mark.parametrize(("name", "side"), [("super_resolution", 255), ("deblur", 127), ("inpaint", 127)])
def test_small_pictures_are_rejected(name: str, side: int) -> None:
    image = _source(_photo(0, (300, side)))
    rejected = reject(name, image)
    assert (rejected.reason, rejected.value, rejected.detail) == ("too_small", side, name)


def test_hole_area_is_gated() -> None:
    outcome = BUILDER._gate("inpaint", _punched(0.7), CHINA.pixels, CHINA.pixels)
    assert outcome is not None and outcome.reason == "hole_area" and outcome.value == pytest.approx(0.7, abs=0.01)
    assert BUILDER._gate("inpaint", _punched(0.3), CHINA.pixels, CHINA.pixels) is None


def _punched(area: float) -> object:
    from builders.degradations import Degraded

    hole = np.zeros((301, 381), bool)
    hole[: round(301 * area)] = True
    return Degraded(CHINA.pixels.astype(np.float32) / 255, {}, 0.5, hole=hole)


# --- templates -----------------------------------------------------------------------------------------------------

TEMPLATES = load_templates("restoration")
FIELDS = {"image": "<img><|image_1|></img>", "fill": "gray", "caption": "a red bus on a bridge"}


def test_templates_cover_every_subtask_and_wording() -> None:
    wordings = {"colorize_hints", "colorize_sepia", "inpaint_caption", "outpaint_caption"}
    assert set(TEMPLATES) == set(DEGRADATIONS) | wordings


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_many_distinct_and_whole(name: str) -> None:
    """A missing comma merges two of VisualCloze's templates into one: the count drops and the sentence runs on."""
    texts = TEMPLATES[name]
    assert len({re.sub(r"\W", "", text).lower() for text in texts}) == len(texts) >= 10
    needed = {"image"} | ({"fill"} if "paint" in name else set()) | ({"caption"} if "caption" in name else set())
    for text in texts:
        assert {field for _, field, _, _ in string.Formatter().parse(text) if field} == needed, text
        assert text.count("{image}") == 1, text
        filled = text.format(**FIELDS)
        assert lint_instruction(filled, 1) == []
        assert filled[-1] in '.?!>"', text
        assert not re.search(r"[.?!,:;][A-Za-z]|\s\s|\.\.|[a-z][A-Z]", text), text
        assert len(text) < 160, text
    starts = Counter(text.startswith("{image}") for text in texts)
    assert min(starts[True], starts[False]) >= 2, "the image always stands in the same place"
