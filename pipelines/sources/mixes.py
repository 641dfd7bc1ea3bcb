"""OmniGen2's mixes: YAML files that name JSONL files, or further mixes, each with a ratio.

Source of the format: omnigen2/dataset/omnigen2_train_dataset.py. There a ratio has no effect (each resampled part is
thrown away); here it says how often a sample is to be seen compared with others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from pipelines.sources.files import SourceError, extension_of, resolve
from pipelines.storage import Folder

EXTENSIONS = ("yml", "yaml")
_LINES = ("jsonl", "ndjson")


@dataclass(frozen=True)
class Listing:
    """A JSONL file, relative to the folder where all paths start; the task of its rows, "" if only they say it."""

    name: str
    task: str = ""
    weight: float = 1.0


def read_mix(
    base: Folder, name: str, weight: float = 1.0, task: str = "", above: tuple[str, ...] = ()
) -> Iterator[Listing]:
    """The files of a mix, in its order; the ratios of nested mixes are multiplied. Those with ratio 0 are left out.

    Raises:
        SourceError: a mix is not of the form `data: [{path, type, ratio}]`, names itself, a file of another type, or
            one that lies outside of `base`.
    """
    if name in above:
        raise SourceError(f"{name} names itself, by way of {' and '.join(above)}")
    for entry in _entries(base, name):
        path, own = _inside(base, entry["path"], name), weight * float(entry.get("ratio", 1))
        kind = "" if entry.get("type", "default") == "default" else str(entry["type"])
        if own == 0:
            continue
        if extension_of(path) in EXTENSIONS:
            yield from read_mix(base, path, own, kind or task, (*above, name))
        elif extension_of(path) in _LINES:
            yield Listing(path, kind or task, own)
        elif found := [file for file in base.list(path) if extension_of(file) in _LINES]:
            yield from (Listing(file, kind or task, own) for file in found)
        else:
            kinds = ", .".join((*_LINES, *EXTENSIONS))
            raise SourceError(f"{name}: {path} is neither .{kinds} nor a folder of JSONL files")


def requested_mixture(name: str, rows: Mapping[tuple[str, float], int]) -> str:
    """How to train with the ratios of a mix, "" if they change nothing.

    Args:
        name: of the mix.
        rows: number of rows by task and weight.

    Raises:
        SourceError: files of one task have different ratios, which no mixture of tasks can express.
    """
    if len({weight for _, weight in rows}) < 2:
        return ""
    weights = defaultdict[str, set[float]](set)
    for task, weight in rows:
        weights[task].add(weight)
    for task, of_task in sorted(weights.items()):
        if len(of_task) > 1:
            ratios = " and ".join(f"{weight:g}" for weight in sorted(of_task))
            raise SourceError(
                f"{name}: files of the task {task} have the ratios {ratios}, but training mixes tasks, not files: give "
                "them one ratio, or leave a part of their lines out"
            )
    total = sum(weight * count for (_, weight), count in rows.items())
    shares = ", ".join(f"{task}: {weight * count / total:.4g}" for (task, weight), count in sorted(rows.items()))
    return f"{name} asks for other shares than it has samples: train with 'data.mixture={{{shares}}}'"


def _entries(base: Folder, name: str) -> list[dict[str, Any]]:
    try:
        entries = yaml.safe_load(base.read_bytes(name))["data"]
        if entries and all(isinstance(entry["path"], str) and float(entry.get("ratio", 1)) >= 0 for entry in entries):
            return list(entries)
    except FileNotFoundError as error:
        raise SourceError(f"no file at {base.path(name)}") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, TypeError, KeyError, AttributeError):
        pass
    raise SourceError(
        f"{name} is not a mix `data: [{{path: a.jsonl, type: edit, ratio: 1}}]` with ratios of at least 0"
    )


def _inside(base: Folder, path: str, mix: str) -> str:
    full, root = resolve(path, base.url), base.url.rstrip("/")
    if not full.startswith(f"{root}/"):
        raise SourceError(f"{mix} names {path}, outside of {root}: set `image_root` to a folder that holds it")
    return full[len(root) + 1 :]
