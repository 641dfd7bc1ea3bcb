"""What a build unit's digest depends on: parameters and the content of the files they name, not where models run."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders.registry import BUILDERS
from builders.style import StyleParams
from pipelines.stages.build import _spec
from schemas.identity import digest_of


def edit_pairs(model: Path, **more: object) -> str:
    params = BUILDERS["edit_pairs"].Params
    return digest_of(_spec(params.model_validate({"inpainter": {"model": str(model), **more}})))


@pytest.mark.parametrize("name", BUILDERS)
def test_defaults_have_a_digest(name: str) -> None:
    assert digest_of(_spec(BUILDERS[name].Params()))


def test_a_changed_model_folder_changes_it_and_another_device_does_not(tmp_path: Path) -> None:
    weights = tmp_path / "model" / "weights.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    before = edit_pairs(weights.parent)
    assert edit_pairs(weights.parent, device="cuda", num_gpus=0.5) == before
    assert edit_pairs(weights.parent, dtype="bfloat16") != before
    weights.write_bytes(b"other")
    assert edit_pairs(weights.parent) != before


def test_a_changed_style_reference_changes_it(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"

    def digest() -> str:
        reference = {"image": str(picture), "looks": ["a woodcut"], "license": "CC0-1.0"}
        return digest_of(_spec(StyleParams.model_validate({"references": {"woodcut": reference}})))

    picture.write_bytes(b"one")
    before = digest()
    picture.write_bytes(b"other")
    assert digest() != before
