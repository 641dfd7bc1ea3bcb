"""Trains the shipped tokenizer: a small LLaMA-style BPE with the special tokens of Phi-3 and OmniGen.

    python -m fine_tune.tiny.train_tokenizer --out fine_tune/tiny/tokenizer

The words come from the vocabulary of CLIP, which is ordered by frequency in web captions (package `open_clip_torch`).
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

NUM_WORDS = 5000
RESERVED = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
# Phi-3 swallows the white space after its chat tokens, hence `rstrip`.
ADDED = [
    AddedToken("<|endoftext|>", special=True),
    *(AddedToken(token, special=True, rstrip=True) for token in ("<|assistant|>", "<|end|>", "<|user|>")),
    *(AddedToken(token, special=True) for token in ("<img>", "</img>", "<|diffusion|>", "<cfg>")),
]


def load_words() -> list[str]:
    """The most frequent English words of web captions, most frequent first."""
    path = resources.files("open_clip") / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(path.read_bytes()).decode().splitlines()[1:]
    words = [merge.replace(" ", "").removesuffix("</w>") for merge in merges if merge.endswith("</w>")]
    return [word for word in words if re.fullmatch("[a-z]{2,}", word)][:NUM_WORDS]


def corpus() -> Iterator[str]:
    """Every word by Zipf's law, lower case and (a tenth as often) capitalised, and all printable ASCII."""
    for rank, word in enumerate(load_words(), start=1):
        count = 1 + 10 * NUM_WORDS // rank
        yield " ".join([word] * count + [word.capitalize()] * (count // 10))
    yield from (chr(code) for code in range(32, 127))


def train(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocab_size` tokens in the layout of LLaMA's `tokenizer.json`."""
    learner = Tokenizer(BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    size = vocab_size - len(RESERVED) - len(ADDED)
    learner.train_from_iterator((f" {text}" for text in corpus()), trainers.BpeTrainer(vocab_size=size))
    learned = json.loads(learner.to_str())["model"]

    pieces = [*RESERVED, *sorted(learned["vocab"], key=learned["vocab"].__getitem__)]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [(left, right) for left, right in learned["merges"]]
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(ADDED)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny tokenizer.")
    parser.add_argument("--out", type=Path, required=True, help="folder to save the tokenizer to")
    parser.add_argument("--vocab-size", type=int, default=3072)
    args = parser.parse_args()
    train(args.vocab_size).save_pretrained(args.out)


if __name__ == "__main__":
    main()
