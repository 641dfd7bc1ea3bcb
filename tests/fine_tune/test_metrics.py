"""FLOPs, loss tables and the files of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fine_tune.metrics import LossTable, MetricLog, block_parameters, read_metrics, training_flops
from fine_tune.model import OmniGen, OmniGenConfig


def test_flops_by_hand() -> None:
    config = OmniGenConfig(
        hidden_size=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        num_layers=3,
        vocab_size=10,
        pad_token_id=0,
        rope_scaling={"short_factor": [1.0] * 2, "long_factor": [1.0] * 2, "type": "su"},
        pos_embed_max_size=4,
    )
    weights = 3 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 8 * 32 + 16 * 8)  # q, k and v, out, gate and up, down
    assert block_parameters(config) == weights
    layers = OmniGen(config).layers
    assert weights == sum(p.numel() for name, p in layers.named_parameters() if "layernorm" not in name)
    # Three tokens of which the last sees all: a multiply and an add per weight and token, per pair and channel for
    # q·k and again for the values, and twice as much in the backward pass.
    forward = 2 * weights * 3 + 3 * (2 + 2) * 8 * (1 + 2 + 3)
    assert training_flops(config, 3, 6) == 3 * forward
    without_weight_gradients = 3 * forward - 2 * weights * 3
    assert training_flops(config, 3, 6, adapter_parameters=5) == without_weight_gradients + 6 * 5 * 3


@pytest.mark.parametrize(
    ("tokens", "pairs_per_square", "adapter", "teraflops"),
    [(4197, 0.98, 0, 111.5), (8253, 0.75, 0, 239.4), (4197, 0.98, 1, 81.1)],
)
def test_flops_of_omnigen_v1(tokens: int, pairs_per_square: float, adapter: int, teraflops: float) -> None:
    """Worked out by hand for 1024 px: text-to-image, edit, and text-to-image with frozen weights.

    The share of pairs is known to two digits.
    """
    config = OmniGenConfig()
    assert block_parameters(config) == 3_623_878_656
    flops = training_flops(config, tokens, int(pairs_per_square * tokens**2), adapter)
    assert flops / 1e12 == pytest.approx(teraflops, rel=0.01)


def test_loss_table_means_by_task_and_timestep() -> None:
    table = LossTable(["edit", "subject", "style"])
    table.add(["edit", "subject"], torch.tensor([0.05, 0.95]), torch.tensor([4.0, 2.0]), torch.tensor([1.0, 2.0]))
    table.add(["edit"], torch.tensor([0.99]), torch.tensor([8.0]), torch.tensor([3.0]))
    report = table.read()
    assert report["loss"] == pytest.approx(14 / 3)
    assert report["loss_unweighted_by_task"] == {"edit": 2.0, "subject": 2.0}
    assert report["loss_by_t"]["edit"] == [4.0, *[None] * 8, 8.0]
    assert report["samples"] == 3
    assert table.read()["samples"] == 0


def test_metrics_after_the_last_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, 0, tensorboard=False)
    for step in (1, 2, 3):
        log.write(step, "train", {"loss": float(step)})
    with log.file.open("a") as file:
        file.write('{"step": 4, "lo')  # the process was killed here
    MetricLog(tmp_path, 2, tensorboard=False).write(3, "train", {"loss": -3.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 1),
        (2, 2),
        (3, -3),
    ]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step"\n{"step": 1}\n')
    with pytest.raises(json.JSONDecodeError):
        read_metrics(file)


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricLog(tmp_path, 0, tensorboard=True)
    log.write(1, "train", {"loss": 2.0, "loss_by_t": {"edit": [None, 0.5]}})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss", "train/loss_by_t/edit/1"]
    assert events.Scalars("train/loss")[0].value == 2.0
