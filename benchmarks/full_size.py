"""Training OmniGen-v1 at full size on a GPU: every way to train, size and task, measured against the plan.

    python benchmarks/full_size.py                               the whole table: needs a GPU of 80 GB, about an hour
    python benchmarks/full_size.py --toy --device cpu --repeats 1  the same code on toy sizes, to see that it runs

Real training steps (`fine_tune.train.train_step`) on random weights and cached latents, one pack of as many samples as
`--budget` holds: tokens/s, MFU by exact FLOPs (recomputation not counted), and the peak of memory as allocated and as
planned. Recomputation is the least that the plan says will fit, unless `--checkpointing` says so. With `--official` the
same samples also go the way of the public trainer (`official_way.py`; latents encoded beforehand).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import dataclass, replace
from itertools import product
from typing import get_args

import torch
from official_way import PaddedOmniGen, Way
from train_step import make_sequence

from fine_tune.adapters import add_adapter
from fine_tune.data import Batch, Example
from fine_tune.memory import Memory
from fine_tune.metrics import peak_flops, training_flops
from fine_tune.model import Checkpointing, OmniGen, OmniGenConfig
from fine_tune.optim import build_optimizer
from fine_tune.packing import Sequence, pack
from fine_tune.planner import Planner
from fine_tune.presets import Config, ConfigError, override, tiny
from fine_tune.state import TrainState, build_state
from fine_tune.train import train_step
from schemas.vocabulary import TASKS

WAYS = {
    "lora": ("model.adapter=lora", "model.dtype=bfloat16"),
    "full-fp32": (),
    "full-bf16": ("model.dtype=bfloat16", "optim.name=adamw_sr"),
    "full-8bit": ("model.dtype=bfloat16", "optim.name=adamw8bit"),
    "full-offload": ("model.dtype=bfloat16", "optim.offload=true"),
}


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    way: str
    side: int
    task: str
    backend: str


def make_config(case: Case, options: argparse.Namespace) -> Config:
    """Random weights of OmniGen-v1's sizes, or those of the preset `tiny`."""
    budget = options.budget or max(8448, 128 * -(-2 * (case.side // 16) ** 2 // 128) + 256)
    assignments = [
        *(f"data.max_side={case.side}", f"data.budget={budget}", f"run.device={options.device}"),
        *(f"model.attention_backend={case.backend}", f"model.compile={options.compile}"),
        *WAYS[case.way],
    ]
    config = tiny()
    if not options.toy:
        config = replace(config, model=replace(config.model, architecture={"num_layers": 32}))
    return override(config, assignments)


def fill(config: Config, task: str) -> list[Sequence]:
    """As many samples of one kind as the budget holds."""
    patches = (config.data.max_side // 16, config.data.max_side // 16)
    sequence = make_sequence(80, [patches] if task == "edit" else [], patches)
    return [sequence] * (config.data.budget // len(sequence))


def choose(config: Config, sequences: list[Sequence], options: argparse.Namespace) -> tuple[Config, Memory] | None:
    """The least recomputation that fits, with the plan; None if nothing does."""
    limit = int(options.memory * 1e9)
    if options.device == "cuda" and not limit:
        limit = torch.cuda.get_device_properties(0).total_memory
    levels = get_args(Checkpointing) if options.checkpointing == "auto" else (options.checkpointing,)
    for level in levels:
        changed = override(config, [f"model.gradient_checkpointing={level}"])
        planner = Planner(changed, sequences, limit, options.device)
        memory = planner.measure()
        if not limit or memory.total <= planner.usable or options.checkpointing != "auto":
            return changed, memory
    return None


def make_batch(config: Config, sequences: list[Sequence], device: str, encoded: bool = True) -> Batch:
    """With posterior moments, as cached latents come, or else with images."""

    def content(size: tuple[int, int]) -> torch.Tensor:
        return torch.randn(8, 2 * size[0], 2 * size[1]) if encoded else torch.zeros(3, 16 * size[0], 16 * size[1])

    examples = [
        Example(
            key=str(number),
            shard="",
            task=TASKS[0],
            seed=number,
            sequence=sequence,
            inputs=[content(size) for size in sequence.input_sizes],
            shown=list(range(len(sequence.input_sizes))),
            target=content(sequence.target_size),
            edit_source_index=-1,
            edit_mask=None,
            encoded=encoded,
        )
        for number, sequence in enumerate(sequences)
    ]
    return Batch(0, pack(sequences, config.data.budget), examples, []).to(device)


def median_seconds(step: object, repeats: int, device: str, warm_up: int = 2) -> float:
    """Of a call, the device's work included."""
    seconds = []
    for number in range(warm_up + repeats):
        start = time.perf_counter()
        step()  # type: ignore[operator]
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= warm_up:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure_case(case: Case, options: argparse.Namespace) -> str:
    """The line of a case."""
    config = make_config(case, options)
    sequences = fill(config, case.task)
    line = f"| {case.way} | {case.side} | {case.task} | {case.backend} "
    chosen = choose(config, sequences, options)
    if chosen is None:
        return f"{line}| does not fit | | | | | | |"
    config, planned = chosen
    line += f"| {config.model.gradient_checkpointing} "
    try:
        state = build_state(config)
    except ConfigError as error:
        return f"{line}| {error} | | | | {planned.total / 1e9:.1f} | |"
    batch = make_batch(config, sequences, options.device)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds = median_seconds(lambda: train_step(state, [batch]), options.repeats, options.device)
    except torch.OutOfMemoryError:
        return f"{line}| out of memory | | | | {planned.total / 1e9:.1f} | |"
    measured = torch.cuda.max_memory_allocated() / 1e9 if options.device == "cuda" else float("nan")
    tokens = batch.pack.num_tokens
    flops = training_flops(state.model.config, tokens, batch.pack.attended_pairs, state.adapter_parameters)
    peak = peak_flops(state.device)
    mfu = f"{flops / seconds / peak:.1%}" if peak else "unknown peak"
    ratio = official_seconds(state, sequences, options) / seconds if options.official else float("nan")
    return (
        f"{line}| {seconds:.3f} | {tokens / seconds:,.0f} | {mfu} | {measured:.1f} | {planned.total / 1e9:.1f} | "
        f"{ratio:.2f} |"
    )


def official_seconds(state: TrainState, sequences: list[Sequence], options: argparse.Namespace) -> float:
    """Of the public trainer's way on the same samples and sizes of weights; nan if it runs out of memory."""
    config, device = state.config, state.device
    architecture: OmniGenConfig = state.model.config
    with torch.device("meta"):
        model: OmniGen = PaddedOmniGen(architecture)
        if config.model.adapter != "none":
            add_adapter(model, config.model, 0)
    model = model.to_empty(device=device).to(getattr(torch, config.model.dtype))
    model.load_state_dict(state.model.state_dict())
    model.set_checkpointing("full")
    trained = [p for p in model.parameters() if p.requires_grad]
    way = Way("official", model, build_optimizer(trained, config.optim, 0), [sequences])
    try:
        return median_seconds(way.run, options.repeats, options.device)
    except torch.OutOfMemoryError:
        return float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--sides", nargs="+", type=int, default=[512, 1024, 2240])
    parser.add_argument("--tasks", nargs="+", choices=["t2i", "edit"], default=["t2i", "edit"])
    parser.add_argument("--backends", nargs="+", default=["flex"])
    parser.add_argument("--checkpointing", choices=["auto", *get_args(Checkpointing)], default="auto")
    parser.add_argument("--budget", type=int, default=0, help="rows of a pack; 0 takes what one sample needs, or 8,448")
    parser.add_argument("--memory", type=float, default=0.0, help="GB that may be used; 0 takes all of the device")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--official", action="store_true", help="also the public trainer's way")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.toy:
        options.sides, options.backends, options.budget = [64], ["sdpa"], options.budget or 512
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, medians of {options.repeats}\n")
    columns = "training | side | task | attention | recomputed | s/step | tokens/s | MFU | peak GB | planned GB | times"
    print(f"| {columns} official |\n|{'---|' * 11}")
    for way, side, task, backend in product(options.ways, options.sides, options.tasks, options.backends):
        print(measure_case(Case(way, side, task, backend), options), flush=True)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
