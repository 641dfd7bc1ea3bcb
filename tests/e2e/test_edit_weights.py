"""From a recipe to the loss weight: pairs built from a photograph weigh most exactly where they were edited."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image

from fine_tune.data import SampleSettings, make_example, read_images
from fine_tune.flow import EditWeighting
from fine_tune.index import Corpus, iter_rows
from fine_tune.tiny import TOKENIZER_DIR, VAE_DIR
from fine_tune.tokens import Tokenizer
from fine_tune.vae import FrozenVAE
from pipelines.engine import Context
from pipelines.lint import lint
from pipelines.recipes import load
from pipelines.run import build
from pipelines.storage import Folder

RECIPE = """\
name: edits
seed: 1
sources:
  - {name: photos, type: folder, path: photos}
build:
  edit_pairs: {operations: [recolor, attribute, text_add, text_replace], per_image: 4}
"""
REACH = 4  # latent cells by which the VAE's encoder carries a change across the mask's rim


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("edits")
    photos = root / "photos"
    photos.mkdir()
    flower = cv2.cvtColor(load_sample_image("flower.jpg")[0:416, 100:516], cv2.COLOR_RGB2BGR)
    cv2.imwrite(str(photos / "flower.png"), cv2.resize(flower, (256, 256), interpolation=cv2.INTER_AREA))
    outline = [[48, 90, 92, 54, 166, 52, 208, 96, 212, 150, 186, 204, 126, 220, 74, 200, 44, 150]]
    entity = {"phrase": "the orange dahlia", "label": "flower", "box": [43, 52, 213, 221], "mask": outline}
    (photos / "flower.json").write_text(json.dumps({"caption": "A dahlia in a garden.", "entities": [entity]}))
    (root / "recipe.yaml").write_text(RECIPE)
    build(Context(Folder(str(root / "corpus")), load(root / "recipe.yaml"), str(root)), workers=0)
    assert lint(Folder(str(root / "corpus"))) == []
    return root / "corpus"


def test_the_loss_weighs_more_exactly_where_the_latents_of_the_edit_differ(corpus: Path) -> None:
    opened = Corpus(str(corpus))
    rows = [row for path in opened.list_indexes() for row in iter_rows(opened, path)]
    subtasks = {row["key"].split("-edit-")[1].rsplit("-", 1)[0] for row in rows}
    assert subtasks >= {"attribute", "recolor", "text_add", "text_remove", "text_replace"}
    vae, tokenizer = FrozenVAE.from_pretrained(VAE_DIR), Tokenizer.from_pretrained(TOKENIZER_DIR)
    settings = SampleSettings(max_side=256, drop_all=0.0, edit_masks=True)
    for row in rows:
        example = make_example(row, read_images(opened, row), tokenizer, settings, seed=0, epoch=0)
        assert example.edit_mask is not None and example.edit_source_index == 0
        source, target = (vae.encode(image).mean for image in (example.inputs[0], example.target))
        difference = (target - source).abs()
        rule = EditWeighting()
        assert rule.identical < difference.mean() < rule.overall, row["key"]
        weights = rule.weights(target, [source], 0)
        assert weights is not None
        torch.testing.assert_close(weights > 1, difference > rule.changed)
        assert (weights > 1).any()

        factor = example.edit_mask.shape[0] // target.shape[1]
        edited = F.max_pool2d(example.edit_mask[None].float(), factor) > 0
        near = F.max_pool2d(edited.float(), 2 * REACH + 1, 1, REACH) > 0
        assert not ((weights > 1) & ~near).any(), row["key"]
        by_mask = EditWeighting(mode="mask").weights(target, [source], 0, example.edit_mask)
        assert by_mask is not None
        torch.testing.assert_close(by_mask > 1, edited.expand_as(by_mask))
