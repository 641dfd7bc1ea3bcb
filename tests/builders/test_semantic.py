"""Semantic and panoptic maps by tiny segmentation models with random weights."""

import json

import numpy as np
import pytest
import skimage.data
import torch
from transformers import (
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    OneFormerImageProcessor,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    SwinConfig,
)

from builders.annotators.annotator import Artefact
from builders.annotators.semantic import SemanticSegmenter
from builders.annotators.stored import Semantic
from builders.base import Rejected, SourceImage
from builders.colours import COLOURS
from filters.models import ModelMissing
from schemas.codec import decode_raw, encode_jpeg, encode_png
from schemas.identity import uid_of
from schemas.records import ImageRecord

LABELS = ("wall", "sky", "cat", "cup", "table", "person", "the floor")
NAMES = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}


def source(pixels, **fields):
    jpeg = encode_jpeg(pixels)
    return SourceImage(ImageRecord(uid=uid_of(jpeg), width=pixels.shape[1], height=pixels.shape[0]), jpeg, **fields)


PHOTOS = [
    source(skimage.data.chelsea()[:121, :160]),
    source(skimage.data.coffee()[:121, :160]),
    source(skimage.data.astronaut()[:120, :97]),
]


def _spread(model, factor=1.0):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, factor * parameter[0].numel() ** -0.5)
    return model


def save_segformer(folder):
    torch.manual_seed(0)
    config = SegformerConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16, **NAMES
    )
    _spread(SegformerForSemanticSegmentation(config)).save_pretrained(folder)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def _swin():
    return SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def save_mask2former(folder):
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=_swin(),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=12,
        **NAMES,
    )
    _spread(Mask2FormerForUniversalSegmentation(config)).save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 128}
    Mask2FormerImageProcessor(size=size, size_divisor=32, num_labels=len(LABELS)).save_pretrained(folder)
    return folder


def save_oneformer(folder):
    torch.manual_seed(0)
    config = OneFormerConfig(
        backbone_config=_swin(),
        conv_dim=32,
        mask_dim=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        query_dec_layers=1,
        num_attention_heads=2,
        num_queries=12,
        text_encoder_width=32,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=64,
        text_encoder_context_length=77,
        task_seq_len=77,
        text_encoder_n_ctx=4,
        is_training=False,
        **NAMES,
    )
    _spread(OneFormerForUniversalSegmentation(config)).save_pretrained(folder)
    classes = {str(i): {"name": label, "isthing": 1} for i, label in enumerate(LABELS)}
    (folder / "classes.json").write_text(json.dumps(classes))
    size = {"shortest_edge": 64, "longest_edge": 128}
    OneFormerImageProcessor(
        size=size, repo_path=str(folder), class_info_file="classes.json", num_labels=len(LABELS), num_text=8
    ).save_pretrained(folder)
    (folder / "classes.json").unlink()  # published ones are in a data set of the hub
    words = folder / "words"
    words.mkdir()
    (words / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3}')
    (words / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(words).save_pretrained(folder)
    return folder


def segmenter(folder, **params):
    return SemanticSegmenter(SemanticSegmenter.Params(model=str(folder), device="cpu", **params))


@pytest.mark.parametrize("save", [save_segformer, save_mask2former, save_oneformer])
def test_class_ids_of_the_whole_photo(save, tmp_path):
    made = segmenter(save(tmp_path))
    made.preflight()
    found = made.annotate(PHOTOS)
    assert found == made.annotate(PHOTOS)
    for image, artefact in zip(PHOTOS, found, strict=True):
        ids = decode_raw(artefact.members["semantic.png"])
        assert ids.dtype == np.uint8 and ids.shape == image.pixels.shape[:2]
        segments = {each["id"]: each for each in artefact.data["segments"]}
        assert set(np.unique(ids)) == set(segments)
        assert all(each["label"] == LABELS[each["class_id"]] for each in segments.values())
        (alone,) = made.annotate([image])
        assert (decode_raw(alone.members["semantic.png"]) == ids).mean() > 0.999  # ties, by float noise


@pytest.mark.parametrize("save", [save_mask2former, save_oneformer])
def test_panoptic_maps_tell_things_of_one_class_apart(save, tmp_path):
    made = segmenter(save(tmp_path), kind="panoptic", min_score=0.0)
    made.preflight()
    found = made.annotate(PHOTOS)
    ids = decode_raw(found[0].members["semantic.png"])
    segments = found[0].data["segments"]
    assert [each["id"] for each in segments] == list(range(1, len(segments) + 1)) and segments
    assert set(np.unique(ids)) <= {0, *(each["id"] for each in segments)}


def test_not_every_network_is_panoptic(tmp_path):
    with pytest.raises(ModelMissing, match="'segformer' network gives no panoptic map"):
        segmenter(save_segformer(tmp_path), kind="panoptic").preflight()


def stored(ids, *labels):
    segments = [{"id": i, "label": label, "class_id": i} for i, label in enumerate(labels, start=1)]
    artefact = Artefact({"segments": segments}, {"semantic.png": encode_png(ids)})
    return source(np.zeros((*ids.shape, 3), np.uint8), artefacts={"semantic": artefact})


def test_colours_follow_the_legend():
    ids = np.zeros((40, 60), np.uint16)
    ids[:, :30], ids[:20, 30:], ids[30:, 30:] = 1, 2, 300
    segments = [{"id": i, "label": label, "class_id": i} for i, label in ((1, "wall"), (2, "a cat"), (300, "rug"))]
    image = source(
        np.zeros((40, 60, 3), np.uint8),
        artefacts={"semantic": Artefact({"segments": segments}, {"semantic.png": encode_png(ids)})},
    )
    seen = set()
    for seed in range(5):
        found = Semantic(image)(image.pixels, np.random.default_rng(seed))
        legend = {number: (name, colour) for number, name, colour in found.params["legend"]}
        assert {number: name for number, (name, _) in legend.items()} == {1: "wall", 2: "cat", 300: "rug"}
        for number, (name, colour) in legend.items():
            assert (found.image[ids == number] == COLOURS[colour]).all()
            assert f"{colour} for {name}" in found.words["legend"]
        assert not found.image[ids == 0].any()
        seen.add(found.words["legend"])
    assert len(seen) > 1  # the palette is drawn per sample


def test_scenes_of_few_classes_are_refused():
    ids = np.repeat(np.array([[1, 2]], np.uint8), 20, axis=0).repeat(20, axis=1)
    image = stored(ids, "wall", "sky")
    assert Semantic(image)(image.pixels, np.random.default_rng(0)) == Rejected("names_too_low", 2.0)
