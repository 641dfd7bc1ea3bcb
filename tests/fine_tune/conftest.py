"""A corpus of photographs to train on, and settings with which a step takes a fraction of a second on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fine_tune.presets import Config, preset
from tests.corpora import make_corpus

SMALL_MODEL = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "num_layers": 2,
    "vocab_size": 3072,
    "pad_token_id": 3064,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"short_factor": [1.0] * 16, "long_factor": [1.0] * 16, "type": "su"},
    "pos_embed_max_size": 16,
}


@pytest.fixture(scope="session")
def photo_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six streams of four training samples, one `val` and one `test` sample each. Do not change it."""
    path = tmp_path_factory.mktemp("photo") / "corpus"
    make_corpus(path, per_shard=3)
    return path


@pytest.fixture
def small_config(photo_corpus: Path, tmp_path: Path) -> Callable[..., Config]:
    """`small_config("lr=0.1", ...)`: the preset `tiny` at 64 pixels with a smaller model and nothing observed."""

    def make(*assignments: str) -> Config:
        return preset(
            "tiny",
            (
                f"model.architecture={SMALL_MODEL}",
                f"data.corpus={photo_corpus}",
                f"run.folder={tmp_path / 'run'}",
                *("max_side=64", "budget=320", "device=cpu", "tensorboard=false", "warmup_steps=2"),
                *("eval_every=0", "sample_every=0", "held_out_samples=0", "save_every=0", "log_every=1", "steps=4"),
                *assignments,
            ),
        )

    return make
