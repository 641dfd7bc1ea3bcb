"""A small VAE and tokenizer that ship with the code, so that the `tiny` preset runs anywhere (see README.md)."""

from pathlib import Path

VAE_DIR = Path(__file__).parent / "vae"
TOKENIZER_DIR = Path(__file__).parent / "tokenizer"
