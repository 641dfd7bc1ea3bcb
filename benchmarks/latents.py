"""What cached latents save: tokens per second of training with and without them, and the time to load a sample.

    python benchmarks/latents.py [--repeats 5] [--threads 1] [--quick]

A corpus of real photographs is built: a third each of text to image, edits and two-reference samples, all square. Per
VAE and side, on this machine's CPU:

* **load**: what the loader does for one sample (range read, decoding and fitting or reading moments, tokenising),
* **VAE**: encoding of a pack's images, or drawing from their cached moments,
* **rest**: forward, backward and AdamW of the transformer of the preset `tiny`,
* tokens per second of all three, one after the other.

`tiny` is the VAE of that preset, `sdxl` the architecture of SDXL's with random weights. The transformer is a thousandth
of OmniGen's, so the encoder's share says what the cache removes and not what it is worth at full size: for that, the
exact FLOPs of SDXL's encoder are set against those of a training step of OmniGen-v1. Medians of `--repeats`, in turns.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import skimage.data
import sklearn.datasets
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from torch.utils.flop_counter import FlopCounterMode

from fine_tune.data import Batch, Example, Loader
from fine_tune.index import Corpus, CountRule, open_index
from fine_tune.latents import open_latents
from fine_tune.metrics import training_flops
from fine_tune.model import OmniGenConfig
from fine_tune.objective import encode, make_generators
from fine_tune.presets import preset
from fine_tune.state import TrainState, build_state
from fine_tune.tiny import VAE_DIR
from fine_tune.train import check_records, make_loader, train_step
from pipelines.engine import Context
from pipelines.recipes import RECIPE
from pipelines.run import build, encode_latents
from pipelines.storage import Folder
from schemas.instructions import placeholder
from schemas.latents import Latents

SDXL: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.13025,
}
INSTRUCTIONS = {
    "text_to_image": "A photograph.",
    "edit": f"{placeholder(1)} Mirror the picture.",
    "subject": f"Bring together what is in {placeholder(1)} and in {placeholder(2)}.",
}


def photographs(side: int) -> Iterator[Image.Image]:
    """Nine photographs, cropped and scaled to squares."""
    names = ("astronaut", "chelsea", "coffee", "rocket", "retina", "hubble_deep_field")
    pixels = [getattr(skimage.data, name)() for name in names]
    pixels += [*sklearn.datasets.load_sample_images().images, skimage.data.stereo_motorcycle()[0]]
    return (ImageOps.fit(Image.fromarray(image), (side, side), Image.Resampling.LANCZOS) for image in pixels)


def make_corpus(folder: Path, side: int) -> Path:
    """One sample per photograph and kind, as finished samples through the pipeline."""
    folder.mkdir(parents=True)
    names = []
    for number, image in enumerate(photographs(side)):
        names.append(f"{number}.jpg")
        image.save(folder / names[-1], quality=95, subsampling=0)
        ImageOps.mirror(image).save(folder / f"mirrored-{number}.jpg", quality=95, subsampling=0)
    lines = []
    for number, name in enumerate(names):
        inputs: dict[str, list[str]] = {
            "text_to_image": [],
            "edit": [f"mirrored-{number}.jpg"],
            "subject": [names[number - 1], names[number - 2]],
        }
        for task, of_task in inputs.items():
            line = {"task_type": task, "instruction": INSTRUCTIONS[task], "input_images": of_task, "output_image": name}
            lines.append(json.dumps(line))
    (folder / "samples.jsonl").write_text("\n".join(lines))
    source = {"name": "photos", "type": "x2i", "path": str(folder / "samples.jsonl")}
    recipe = {"name": "latents", "sources": [source], "build": {}, "ingest": {"max_pixels": 1 << 22}}
    corpus = folder / "corpus"
    build(Context(Folder(str(corpus)), RECIPE.model_validate(recipe), ""), workers=0)
    return corpus


def open_state(corpus: Path, side: int, vae: Path) -> TrainState:
    budget = 3 * (side // 16) ** 2 + 200
    return build_state(
        preset(
            "tiny",
            (
                f"data.corpus={corpus}",
                f"model.vae={vae}",
                f"max_side={side}",
                *(f"budget={budget}", "mixture={text_to_image: 1, edit: 1, subject: 1}", "drop_all=0"),
                *("architecture.max_position_embeddings=20000", "architecture.original_max_position_embeddings=20000"),
                *(f"architecture.pos_embed_max_size={max(32, side // 16)}", "device=cpu", "block=27", "prefetch=0"),
            ),
        )
    )


def open_loader(state: TrainState, with_latents: bool) -> Loader:
    data = state.config.data
    corpus, rule = Corpus(data.corpus), CountRule(state.tokenizer, data.max_side, data.budget)
    index = open_index(corpus, "train", rule)
    latents = open_latents(corpus, index, state.vae, rule.sides) if with_latents else []
    if with_latents and latents[0].cached < len(index):
        raise SystemExit(f"not all is cached: {latents[0]}")
    return make_loader(corpus, index, state, latents)


def timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def load_times(loader: Loader, draws: int, images: int) -> list[float]:
    """Seconds per sample of so many images."""
    times = []
    for draw in (draw for number in range(draws) for draw in loader.plan.pack(number)):
        start = time.perf_counter()
        example = loader.load(draw)
        spent = time.perf_counter() - start
        if isinstance(example, Example) and len(example.inputs) + 1 == images:
            times.append(spent)
    return times


def step_times(state: TrainState, batch: Batch) -> dict[str, float]:
    """Seconds of the VAE's part of a step, and of the rest of it."""
    vae = timed(lambda: encode(state, batch, make_generators(state, batch)))
    whole = timed(lambda: train_step(state, [batch]))
    check_records(state)
    return {"VAE": vae, "rest": whole - vae}


def measure(name: str, vae: Path, side: int, repeats: int, folder: Path) -> None:
    corpus = make_corpus(folder / f"{name}-{side}", side)
    took = timed(lambda: encode_latents(Folder(str(corpus)), Latents(vae=str(vae), sides=(side,)), workers=0))
    state = open_state(corpus, side, vae)
    loaders = {"images": open_loader(state, False), "cached latents": open_loader(state, True)}
    found: dict[str, dict[str, list[float]]] = {way: {} for way in loaders}
    for turn in range(repeats + 1):
        for way, loader in loaders.items():
            spent = {"load": timed(lambda p=loader, n=turn: [p.load(draw) for draw in p.plan.pack(n)])}  # type: ignore[misc]
            batch = next(loader.batches(turn))
            spent |= step_times(state, batch)
            spent["tokens/s"] = batch.pack.num_tokens / sum(spent.values())
            for part, value in spent.items() if turn else ():  # the first turn warms up
                found[way].setdefault(part, []).append(value)
    report(name, side, found)
    describe(corpus, took)


def report(name: str, side: int, found: dict[str, dict[str, list[float]]]) -> None:
    """A row of the table per way; how many times as fast, with the range over turns, which meet the same machine."""
    for way, parts in found.items():
        load, vae, rest, rate = (statistics.median(parts[part]) for part in ("load", "VAE", "rest", "tokens/s"))
        ratios = [own / plain for own, plain in zip(parts["tokens/s"], found["images"]["tokens/s"], strict=True)]
        times = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        milliseconds = " | ".join(f"{part * 1e3:,.0f}" for part in (load, vae, rest))
        print(
            f"| {name} | {side} | {way} | {milliseconds} | {vae / (vae + rest):.0%} | {rate:,.0f} | {times} |",
            flush=True,
        )


def describe(corpus: Path, seconds: float) -> None:
    (entry,) = Folder(str(corpus)).read_json("manifest.json")["latents"]
    shards = entry["shards"].values()
    images, size = sum(shard["images"] for shard in shards), sum(shard["bytes"] for shard in shards)
    tars = sum(file.stat().st_size for file in corpus.glob("data/*/*.tar"))
    print(
        f"<!-- {images} images: latents {size / images / 1e3:,.1f} kB each, shards {tars / images / 1e3:,.1f} kB each; "
        f"encoded in {seconds:.1f} s -->",
        flush=True,
    )


def measure_loading(side: int, repeats: int, folder: Path) -> None:
    """Print the time to load a sample of three images."""
    corpus = make_corpus(folder / f"loading-{side}", side)
    encode_latents(Folder(str(corpus)), Latents(vae="tiny", sides=(side,)), workers=0)
    state = open_state(corpus, side, VAE_DIR)
    ways = {"images": open_loader(state, False), "cached latents": open_loader(state, True)}
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, loader in ways.items():
            found[way] += load_times(loader, 12, 3)
    for way, times in found.items():
        low, high = min(times) * 1e3, max(times) * 1e3
        print(f"| {way} | {len(times)} | {statistics.median(times) * 1e3:.1f} | {low:.1f} to {high:.1f} |", flush=True)


def print_flops() -> None:
    """FLOPs of SDXL's encoder beside those of a training step of OmniGen-v1 on the same images."""
    with torch.device("meta"):
        vae: Any = AutoencoderKL(**SDXL)
        config = OmniGenConfig()
    for side, inputs in ((256, 0), (256, 1), (1024, 0), (1024, 2)):
        with FlopCounterMode(display=False) as counter:
            vae.encode(torch.empty(1, 3, side, side, device="meta"))
        encoding = counter.get_total_flops() * (1 + inputs)
        patches = (side // 16) ** 2
        condition = 80 + inputs * patches
        tokens = condition + 1 + patches
        pairs = condition * condition // 2 + (1 + patches) * tokens
        training = training_flops(config, tokens, pairs)
        share = encoding / (encoding + training)
        print(f"| {side} | {1 + inputs} | {encoding / 1e12:.2f} | {training / 1e12:.1f} | {share:.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="the tiny VAE at 64 px only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = Path(tempfile.mkdtemp())
    try:
        print("| VAE | side | from | load ms | VAE ms | rest ms | VAE's share of the step | tokens/s | times |")
        print("|---|---|---|---|---|---|---|---|---|")
        measure("tiny", VAE_DIR, 64 if options.quick else 128, options.repeats, folder)
        if options.quick:
            return
        torch.manual_seed(0)
        sdxl: Any = AutoencoderKL(**SDXL)
        sdxl.save_pretrained(folder / "sdxl")
        measure("sdxl", folder / "sdxl", 256, options.repeats, folder)
        print("\n| a sample of three images at 1024 px from | samples | ms | range |\n|---|---|---|---|")
        measure_loading(1024, options.repeats, folder)
        print("\n| side | images | TFLOP of encoding | TFLOP of training | share |\n|---|---|---|---|---|")
        print_flops()
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
