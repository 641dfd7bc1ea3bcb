"""Diffusion models behind the small interfaces: loaded as real ones are, the same every time, and named if unusable."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from builders.annotators.editors import EDITORS, DiffusersInpainter, EditorParams, InpainterParams, InstructionEditor
from filters.models import ModelMissing
from tests.builders.tiny_editors import (
    save_flux_kontext,
    save_inpainter,
    save_instruct_pix2pix,
    save_qwen_image_edit,
)

SAVE: dict[str, Callable[[Path], Path]] = {
    "inpainter": save_inpainter,
    "instruct_pix2pix": save_instruct_pix2pix,
    "flux_kontext": save_flux_kontext,
    "qwen_image_edit": save_qwen_image_edit,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {name: str(save(root / name)) for name, save in SAVE.items()}


@pytest.fixture
def photo(photographs: dict[str, np.ndarray]) -> np.ndarray:
    return photographs["coffee"][:133, :201]  # no side is a multiple of anything


def inpainter(model: str, **params: object) -> DiffusersInpainter:
    return DiffusersInpainter(InpainterParams.model_validate({"model": model, "steps": 1, "resolution": 64} | params))


def editor(model: str, **params: object) -> InstructionEditor:
    return InstructionEditor(EditorParams.model_validate({"model": model, "steps": 1, "resolution": 64} | params))


def test_an_inpainter_fills_the_hole_and_leaves_alone_what_it_does_not_see(models, photo):
    mask = np.zeros(photo.shape[:2], bool)
    mask[2:20, 3:30] = True
    filler = inpainter(models["inpainter"], strength=1.0, negative_prompt="cup")
    filler.preflight()
    first, again, other = (filler.inpaint(photo, mask, "a flower", np.random.default_rng(n)) for n in (0, 0, 1))
    assert first.shape == photo.shape and first.dtype == np.uint8
    assert (first == again).all() and (first != other)[mask].any()
    assert (first != photo)[mask].mean() > 0.5
    assert (first[:, 120:] == photo[:, 120:]).all() and (first[100:] == photo[100:]).all()
    assert (filler.inpaint(photo, ~mask & mask, "", np.random.default_rng(0)) == photo).all()


@pytest.mark.parametrize("name", ["instruct_pix2pix", "flux_kontext", "qwen_image_edit"])
def test_an_editor_gives_the_size_that_went_in_and_the_same_for_the_same_seed(models, photo, name):
    follow = editor(models[name])
    follow.preflight()
    first, again, other = (follow.edit(photo, "make the cup red", np.random.default_rng(n)) for n in (0, 0, 1))
    assert first.shape == photo.shape and first.dtype == np.uint8
    assert (first == again).all() and (first != other).any() and (first != photo).any()
    assert follow.name == models[name] and re.fullmatch(r"sha256:\w{16}", follow.version)


def test_a_model_of_another_kind_is_refused_with_those_that_are_known(models, tmp_path):
    with pytest.raises(ModelMissing, match="a StableDiffusionInpaintPipeline cannot be used here") as error:
        editor(models["inpainter"]).preflight()
    assert all(name in str(error.value) for name in EDITORS)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "MusicPipeline"}))
    with pytest.raises(ModelMissing, match=r"a MusicPipeline cannot .*StableDiffusionInpaintPipeline"):
        inpainter(str(tmp_path)).preflight()


def test_what_is_missing_is_named_before_anything_is_loaded(models, tmp_path):
    with pytest.raises(ModelMissing, match="model: '/nowhere/flux': there is no /nowhere/flux"):
        editor("/nowhere/flux").preflight()
    with pytest.raises(ModelMissing, match=r"has no model_index.json"):
        editor(str(tmp_path)).preflight()
    copy = tmp_path / "copy"
    shutil.copytree(models["flux_kontext"], copy)
    next((copy / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(ModelMissing, match=r"has no transformer/\*\.safetensors"):
        editor(str(copy)).preflight()


def test_an_option_that_the_pipeline_does_not_have_is_named(models):
    editor(models["instruct_pix2pix"], image_guidance=1.5).preflight()
    with pytest.raises(ModelMissing, match=r"^image_guidance: .* is a FluxKontextPipeline, which has no"):
        editor(models["flux_kontext"], image_guidance=1.5).preflight()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"model": "timbrooks/instruct-pix2pix"}, "needs the commit"),
        ({"model": "/models/x", "trust_remote_code": True}, "trust_remote_code"),
        ({"model": "/models/x", "batch_size": 4}, "batch_size"),
        ({"model": "/models/x", "strength": 0.5}, "strength"),
    ],
)
def test_parameters_that_cannot_be_are_refused(params, message):
    with pytest.raises(ValidationError, match=message):
        EditorParams(**params)
