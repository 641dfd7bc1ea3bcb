"""Share of each stage that is spent outside of model calls: reading, decoding, drawing, encoding, writing.

    python benchmarks/model_share.py --photos build/demo/photos

Builds a corpus in this process from the demo's photographs, for each scorer, annotator and builder with a packaged
model, and counts the time inside calls of torch modules and onnxruntime sessions. The models are loaded before, by the
same work.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import onnxruntime
import torch

from builders.annotators import hed
from pipelines import engine
from pipelines.engine import Context
from pipelines.recipes import RECIPE
from pipelines.stages import STAGES
from pipelines.storage import Folder

# Of one stage at a time, so that one model is counted. Each has its model inside a pip package.
PARTS: dict[str, dict[str, Any]] = {
    "score: nsfw": {"score": {"nsfw": {}}},
    "score: features": {"score": {"features": {}}},
    "score: text": {"score": {"text": {}}},
    "annotate: crop_features": {"annotate": {"crop_features": {}}},
    "annotate: ocr": {"annotate": {"ocr": {}}},
    "build: soft edges": {"build": {"condition_maps": {"maps": ["softedge"], "per_image": 1}}},
    "build: style, trained": {"build": {"style": {"styles": ["neural"]}}},
    "build: text_render, read back": {"build": {"text_render": {"verify": "rapidocr"}}},
}


class ModelClock:
    """Time inside model calls; a model inside a model counts once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.depth = 0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds += time.perf_counter() - start

        return timed


def measure(clock: ModelClock, part: dict[str, Any], measured: str, photos: Path, folder: Path) -> tuple[int, float]:
    """Rows of the stage `measured`, and its seconds; all stages before it run as well."""
    source = {"name": "photos", "type": "manifest", "path": str(photos / "manifest.jsonl")}
    recipe = {"name": "share", "sources": [source], "ingest": {"max_pixels": 262144}, "build": {}} | part
    context = Context(Folder(str(folder)), RECIPE.model_validate(recipe), ".")
    for name, kind in STAGES.items():
        stage = kind(context)
        clock.seconds, start = 0.0, time.perf_counter()
        markers = engine.run_stage(stage, context, stage.tasks(), 0, progress=lambda *_: None)
        if name == measured:
            return sum(marker.counts["inputs"] for marker in markers), time.perf_counter() - start
    raise ValueError(measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    options = parser.parse_args()
    cv2.setNumThreads(1)
    clock = ModelClock()
    torch.nn.Module.__call__ = clock.around(torch.nn.Module.__call__)
    onnxruntime.InferenceSession.run = clock.around(onnxruntime.InferenceSession.run)
    hed.edge_probability = clock.around(hed.edge_probability)  # its layers are functions
    print("| work | rows | seconds | in the model | outside |\n|---|---|---|---|---|")
    for name in options.parts:
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            stage = name.partition(":")[0]
            measure(clock, PARTS[name], stage, options.photos, Path(first))
            rows, seconds = measure(clock, PARTS[name], stage, options.photos, Path(second))
        print(
            f"| {name} | {rows} | {seconds:.1f} | {clock.seconds:.1f} | {1 - clock.seconds / seconds:.0%} |", flush=True
        )


if __name__ == "__main__":
    main()
