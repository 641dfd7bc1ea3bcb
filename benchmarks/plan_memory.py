"""The memory plan of a training step: against what is really allocated, and for OmniGen-v1 on cards of several sizes.

    python benchmarks/plan_memory.py                 both tables, on any machine
    python benchmarks/plan_memory.py --cards-only

The first table makes real steps on this CPU. Nothing of the second is run: shapes are enough to plan, and OmniGen-v1's
and SDXL's are written down here, so that no model is loaded. On a GPU `full_size.py` compares plan and peak.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import get_args

import torch
from diffusers import AutoencoderKL
from full_size import WAYS, make_batch
from latents import SDXL

from fine_tune.memory import allocated_peak, measure
from fine_tune.model import Checkpointing, OmniGenConfig
from fine_tune.packing import Sequence
from fine_tune.planner import Candidate, Planner, typical_pack
from fine_tune.presets import Config, override, preset, tiny
from fine_tune.state import build_state
from fine_tune.train import train_step

SIDE = 128


def compare() -> Iterator[str]:
    """Lines of the first table: the preset `tiny` at 128 px in every way to train it."""
    for level, way in product(get_args(Checkpointing), ("lora", "full-fp32", "full-bf16")):
        config = override(tiny(), [f"max_side={SIDE}", "budget=640", "device=cpu", *WAYS[way]])
        config = override(config, [f"gradient_checkpointing={level}"])
        sequences = typical_pack(config)
        planned = measure(config, sequences, "cpu", rows=config.data.budget).total
        peak = allocated_peak(partial(make_steps, config, sequences))
        yield f"| {way} | {level} | {planned / 1e6:.1f} | {peak / 1e6:.1f} | {planned / peak - 1:+.1%} |"


def make_steps(config: Config, sequences: list[Sequence]) -> None:
    """Two updates from nothing."""
    state = build_state(config)
    batch = make_batch(config, sequences, "cpu", encoded=False)
    for _ in range(2):
        train_step(state, [batch])


def write_shapes(folder: Path) -> None:
    """A pipeline without weights: what the planner reads of OmniGen-v1."""
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(OmniGenConfig().to_dict()))
    with torch.device("meta"):
        AutoencoderKL(**SDXL).save_config(folder / "vae")


def plan_cards(source: str, gigabytes: list[int]) -> Iterator[str]:
    """Lines of the second table: the first way to train that fits, and the least recomputation with which it does."""
    for name, ranks in (("lora", 1), ("full", 1), ("full", 8)):
        for size in gigabytes:
            config = preset(name, [f"source={source}"])
            planner = Planner(config, typical_pack(config), size * 10**9, "cuda", ranks)
            fitting = [candidate for candidate in planner.propose() if candidate.fits]
            yield f"| {name} | {ranks} x {size} GB | {_describe(fitting[0]) if fitting else 'does not fit | | |'}"


def _describe(candidate: Candidate) -> str:
    settings = "`" + " ".join(candidate.settings) + "`" if candidate.settings else "as it is"
    taken = candidate.memory
    host = f" and {taken.host / 1e9:.0f} of the host" if taken.host else ""
    return f"{settings} | {taken.total / 1e9:.1f}{host} | {candidate.budget:,} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=int, nargs="+", default=[24, 40, 48, 80, 141])
    parser.add_argument("--cards-only", action="store_true", help="only the second table")
    options = parser.parse_args()
    if not options.cards_only:
        print(f"Preset tiny at {SIDE} px, torch {torch.__version__}, CPU\n")
        print("| way | recomputed | planned MB | allocated MB | off by |\n|---|---|---|---|---|")
        for line in compare():
            print(line, flush=True)
    print("\n| preset | devices | settings | GB of each | `data.budget` up to |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write_shapes(Path(folder))
        for line in plan_cards(folder, options.gigabytes):
            print(line, flush=True)


if __name__ == "__main__":
    main()
