"""Time of sampling an edit: ours with and without the KV cache, against diffusers' `OmniGenPipeline`.

    python benchmarks/sampling.py [--repeats 5] [--side 256] [--steps 10]

All three open the same folder (random weights, the included VAE and tokenizer) and draw the same edit of one photograph
with the same seed and both guidances. On a CPU the model is small; with CUDA it is OmniGen-v1's size.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from skimage.data import astronaut

from fine_tune.layouts import save_pipeline
from fine_tune.model import OmniGen, OmniGenConfig
from fine_tune.presets import tiny
from fine_tune.sample import Pipeline
from fine_tune.state import initialise
from fine_tune.tiny import TOKENIZER_DIR, VAE_DIR
from fine_tune.tokens import NEGATIVE_PROMPT

PROMPT = "Make the suit of the woman in <img><|image_1|></img> blue and leave everything else as it is."


def make_folder(folder: Path, device: str) -> None:
    """A pipeline with random weights: of OmniGen-v1's size on a GPU, 40 M parameters on a CPU."""
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_layers": 12, "num_attention_heads": 8}
    small = tiny().model.architecture | sizes | {"num_key_value_heads": 8, "pos_embed_max_size": 192}
    small["rope_scaling"] = {"short_factor": [1.0] * 32, "long_factor": [1.0] * 32, "type": "su"}
    config = OmniGenConfig() if device == "cuda" else OmniGenConfig(**small)
    model = OmniGen(config)
    initialise(model, torch.Generator().manual_seed(0))
    save_pipeline(folder, config, model.state_dict(), vae=VAE_DIR, tokenizer=TOKENIZER_DIR)


def samplers(folder: Path, device: str, side: int, steps: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    from diffusers import OmniGenPipeline

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    photo = Image.fromarray(astronaut()).resize((side, side))
    same = {
        "height": side,
        "width": side,
        "num_inference_steps": steps,
        "guidance_scale": 2.5,
        "img_guidance_scale": 1.6,
    }
    ours = Pipeline.from_pretrained(folder, device, dtype)
    theirs = OmniGenPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    theirs.set_progress_bar_config(disable=True)

    def run_ours(use_kv_cache: bool) -> object:
        return ours(PROMPT, [photo], **same, use_kv_cache=use_kv_cache, negative_prompt=NEGATIVE_PROMPT, seed=0)  # type: ignore[arg-type]

    return {
        "x2i, KV cache": lambda: run_ours(True),
        "x2i, no cache": lambda: run_ours(False),
        "diffusers": lambda: theirs(PROMPT, [photo], **same, generator=torch.Generator().manual_seed(0)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of sampling an edit.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), device)
        ways = samplers(Path(folder), device, options.side, options.steps)
        for repeat in range(options.repeats + 1):  # in turns; the first round warms up
            for name, sample in ways.items():
                start = time.perf_counter()
                sample()
                if repeat:
                    seconds.setdefault(name, []).append(time.perf_counter() - start)
    print(f"an edit at {options.side} px, {options.steps} steps, {device}, medians of {options.repeats}\n")
    print("| way | seconds | times as fast as diffusers |\n|---|---|---|")
    for name, values in seconds.items():
        ratios = [theirs / ours for ours, theirs in zip(values, seconds["diffusers"], strict=True)]
        print(f"| {name} | {statistics.median(values):.2f} | {statistics.median(ratios):.2f} |")


if __name__ == "__main__":
    main()
