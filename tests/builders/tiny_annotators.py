"""Tiny annotator models with random weights, saved the way that the real ones are published. Always the same."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    BartTokenizer,
    BertTokenizer,
    CLIPImageProcessor,
    CLIPTokenizer,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    Sam2Config,
    Sam2ImageProcessor,
    Sam2Model,
    Sam2Processor,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
)

from tests.conftest import CAPTIONS

_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# segformer_b2_clothes
CLOTHES = (
    *("Background", "Hat", "Hair", "Sunglasses", "Upper-clothes", "Skirt", "Pants", "Dress", "Belt", "Left-shoe"),
    *("Right-shoe", "Face", "Left-leg", "Right-leg", "Left-arm", "Right-arm", "Bag", "Scarf"),
)
_QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def save_qwen_vl(folder: Path) -> Path:
    """A Qwen3-VL with a byte-level tokenizer trained on the captions of the test photographs."""
    vocabulary, merges = _byte_pairs(400)
    tokenizer = Qwen2Tokenizer(vocabulary, merges, extra_special_tokens=list(_QWEN_TOKENS), eos_token="<|im_end|>")
    ids: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in _QWEN_TOKENS}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "rope_parameters": rope,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 8,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    images: dict[str, Any] = {"patch_size": 8, "size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(**images), tokenizer, Qwen3VLVideoProcessor(**images), chat_template=_CHAT
    )
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return _save(_spread(model), processor, folder)


def save_florence2(folder: Path) -> Path:
    """A Florence-2: an encoder-decoder that is asked with task tokens instead of a chat."""
    vocabulary, merges = _byte_pairs(400, ("<s>", "<pad>", "</s>", "<unk>", "<mask>"))
    tokenizer = BartTokenizer(vocabulary, merges, extra_special_tokens={"image_token": "<image>"})
    config = Florence2Config(
        text_config={
            "model_type": "bart",
            "vocab_size": len(tokenizer),
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "max_position_embeddings": 128,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "decoder_start_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "embed_dim": [8, 16],
            "num_heads": [2, 2],
            "num_groups": [2, 2],
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "window_size": 4,
            "projection_dim": 32,
        },
        image_token_id=tokenizer.image_token_id,
    )
    size = {"height": 32, "width": 32}
    images: Any = CLIPImageProcessor(size=size, do_center_crop=False)
    images.image_seq_length = 17  # 4x4 places and their mean
    torch.manual_seed(1)
    model = Florence2ForConditionalGeneration(config)
    return _save(_spread(model), Florence2Processor(images, tokenizer), folder)


def save_owlv2(folder: Path) -> Path:
    """An OWLv2 grounder: 16 boxes per image."""
    vocabulary, merges = _byte_pairs(400, ("<none>", "<|startoftext|>", "<|endoftext|>"), "</w>")  # 0 means no query
    tokenizer = CLIPTokenizer(vocabulary, merges, pad_token="<|endoftext|>", model_max_length=16)
    layers = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Owlv2Config(
        text_config={
            **layers,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 16,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**layers, "image_size": 64, "patch_size": 16},
        projection_dim=32,
    )
    torch.manual_seed(2)
    model = Owlv2ForObjectDetection(config)
    images = Owlv2ImageProcessor(size={"height": 64, "width": 64})
    return _save(_spread(model), Owlv2Processor(images, tokenizer), folder)


def save_grounding_dino(folder: Path) -> Path:
    """A GroundingDINO with a tiny Swin and BERT."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "a", *_words()]
    tokenizer = BertTokenizer({word: i for i, word in enumerate(dict.fromkeys(words))})
    config = GroundingDinoConfig(
        backbone_config={
            "model_type": "swin",
            "image_size": 64,
            "embed_dim": 8,
            "depths": [1, 1, 1],
            "num_heads": [1, 1, 1],
            "window_size": 2,
            "out_features": ["stage2", "stage3"],
        },
        text_config={
            "model_type": "bert",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=12,
        num_feature_levels=3,
        disable_custom_kernels=True,
    )
    torch.manual_seed(3)
    model = GroundingDinoForObjectDetection(config)
    images = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    return _save(_spread(model), GroundingDinoProcessor(images, tokenizer), folder)


def save_sam2(folder: Path) -> Path:
    """A SAM 2 of images of 64 px."""
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "image_size": [64, 64],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 1, 1, 1],
        "window_size_per_stage": [8, 4, 4, 2],
        "global_attention_blocks": [3],
        "window_positional_embedding_background_size": [4, 4],
    }
    config = Sam2Config(
        vision_config={
            "backbone_config": backbone,
            "backbone_channel_list": [64, 32, 16, 8],
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            "fpn_hidden_size": 32,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 16},
        mask_decoder_config={
            "hidden_size": 32,
            "mlp_dim": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 32,
        },
    )
    torch.manual_seed(4)
    processor = Sam2Processor(Sam2ImageProcessor(size={"height": 64, "width": 64}))
    return _save(_spread(Sam2Model(config)), processor, folder)


def save_human_parser(folder: Path, labels: Sequence[str] = CLOTHES) -> Path:
    torch.manual_seed(0)
    config = SegformerConfig(
        hidden_sizes=[8, 8, 16, 16],
        depths=[1] * 4,
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    processor = SegformerImageProcessor(size={"height": 64, "width": 64})
    return _save(_spread(SegformerForSemanticSegmentation(config)), processor, folder)


def _words() -> list[str]:
    return sorted({word.strip(".,").lower() for caption in CAPTIONS.values() for word in caption.split()})


def _byte_pairs(size: int, special: Sequence[str] = (), suffix: str = "") -> tuple[dict[str, int], list[Any]]:
    """Vocabulary and merges of a byte-level BPE trained on the captions."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=suffix))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=sorted(alphabet),
        end_of_word_suffix=suffix,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CAPTIONS.values(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _spread(model: torch.nn.Module) -> Any:
    """Random weights as initialised give nearly the same output for every image; larger ones tell images apart."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model


def _save(model: Any, processor: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder
