"""The README of a corpus: a Hugging Face card with one typed configuration per stream, and what a person wants to know.

Types are declared rather than inferred: `datasets` looks at the first five samples only, so a list that is empty there
would get no type and fail later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import GenericAlias
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel

from schemas.records import SampleRecord
from schemas.vocabulary import STREAMS

_DTYPES = {str: "string", int: "int64", float: "float64", bool: "bool"}
_SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}


def shards_by_split(shards: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Shard names of one stream per split, from their manifest entries.

    `datasets` and Energon assign whole shards to splits. If any shard mixes splits, all are offered as `train`, and
    readers select by the record's `split`.
    """
    if any(len(shard["splits"]) > 1 for shard in shards):
        return {"train": [shard["name"] for shard in shards]}
    by_split: dict[str, list[str]] = {}
    for shard in shards:
        (split,) = shard["splits"]
        by_split.setdefault(split, []).append(shard["name"])
    return by_split


def render_card(manifest: Mapping[str, Any], counts: Mapping[str, Any]) -> str:
    """README.md of a corpus.

    Args:
        manifest: see `pipelines.publish`.
        counts: see `pipelines.corpus.summary`.
    """
    # Flow style for the innermost level keeps one field on one line.
    front = yaml.safe_dump(
        _front_matter(manifest), sort_keys=False, allow_unicode=True, width=120, default_flow_style=None
    )
    return f"---\n{front}---\n\n{_body(manifest, counts)}"


def stream_features(stream: str) -> list[dict[str, Any]]:
    """`datasets` features of a stream's samples, in the form that a card's YAML holds."""
    images = [{"name": name, "dtype": "image"} for name in STREAMS[stream].image_members]
    texts = [{"name": name, "dtype": "string"} for name in ("__key__", "__url__")]
    record = {"name": "json", "struct": _struct(SampleRecord)}
    return [*images, {"name": "txt", "dtype": "string"}, record, *texts]


def _struct(model: type[BaseModel]) -> list[dict[str, Any]]:
    return [{"name": name, **_feature(info.annotation)} for name, info in model.model_fields.items()]


def _feature(annotation: Any) -> dict[str, Any]:
    """A field's type; lists of scalars are written `list: string`, lists of records `list: [...]`."""
    if get_origin(annotation) is tuple:
        item = _feature(get_args(annotation)[0])
        return {"list": item.get("struct") or item["dtype"]}
    if get_origin(annotation) is Literal:
        return {"dtype": "string"}
    if not isinstance(annotation, GenericAlias) and issubclass(annotation, BaseModel):
        return {"struct": _struct(annotation)}
    return {"dtype": _DTYPES[annotation]}


def _front_matter(manifest: Mapping[str, Any]) -> dict[str, Any]:
    streams = manifest["streams"]
    size = next((label for limit, label in _SIZES.items() if manifest["samples"] < limit), "n>10M")
    return {
        "pretty_name": manifest["name"],
        "license": "other",
        "license_name": "per-sample",
        "task_categories": ["text-to-image", "image-to-image"],
        "tags": ["webdataset", "omnigen", "any-to-image"],
        "size_categories": [size],
        "configs": [{"config_name": name, "data_files": _data_files(name, streams[name])} for name in streams],
        "dataset_info": [{"config_name": name, "features": stream_features(name)} for name in streams],
    }


def _data_files(stream: str, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tars only: another type beside them would make `datasets` choose another reader."""
    splits = shards_by_split(entry["shards"])
    if len(splits) == 1:
        return [{"split": split, "path": f"data/{stream}/*.tar"} for split in splits]
    return [{"split": s, "path": [f"data/{stream}/{name}" for name in names]} for s, names in splits.items()]


def _body(manifest: Mapping[str, Any], counts: Mapping[str, Any]) -> str:
    name, streams = manifest["name"], manifest["streams"]
    stream = next(iter(streams))
    split = next(iter(shards_by_split(streams[stream]["shards"])))
    shard = f"data/{stream}/{streams[stream]['shards'][0]['name']}"
    versions = ", ".join(f"{library} {version}" for library, version in sorted(manifest["versions"].items()))
    return f"""# {name}

An any-to-image (X2I) training corpus built with x2i: {manifest["samples"]:,} samples in {counts["shards"]:,} WebDataset
shards, {_size(manifest["bytes"])}. Every sample is an instruction with zero or more input images and one output image.
A *stream* is one task family with one fixed set of files per sample; it is one configuration of this dataset.

## Samples

{_table(("stream", "subtask", "samples", "mean output", "real output", "size"), _sample_rows(counts))}

{_table(("licence", "samples", "share"), _share_rows(counts, "licenses"))}

{_table(("split", "samples", "share"), _share_rows(counts, "splits"))}

{_split_note(streams)}

## Fields

{_table(("stream", "members of a sample"), ((s, ", ".join(f"`{m}`" for m in streams[s]["members"])) for s in streams))}

`txt` is the instruction; `<img><|image_1|></img>` stands for `input_1`. `json` is the record: task, roles of the
inputs, which input is edited and whether it is pixel-aligned with the output, captions, scores, parents, operations
with models and seeds, licence and split. It has the same keys in every sample and no nulls: unknown text is `""`,
unknown numbers are -1. `edit_mask.png` is 255 where the output may differ from the edited input. Maps and masks are
lossless. `meta/samples/*.parquet` holds the same records with the byte range of every member.
{_latents_note(manifest.get("latents", []))}
## Open it

`root` is the folder of this file.

```python
import webdataset as wds

samples = wds.WebDataset(f"{{root}}/{shard}", shardshuffle=False).decode("pil")
```

```python
from datasets import load_dataset

samples = load_dataset(root, "{stream}", split="{split}", streaming=True)
```

```python
import ray

samples = ray.data.read_webdataset(f"{{root}}/data/{stream}", file_extensions=["tar"])
```

```python
from megatron.energon import (
    Cooker, DefaultTaskEncoder, Sample, WorkerConfig,
    basic_sample_keys, edataclass, get_loader, get_val_dataset, stateless,
)


@edataclass
class X2ISample(Sample):
    members: dict


@stateless
def cook(members: dict) -> X2ISample:
    return X2ISample(**basic_sample_keys(members), members=members)


class X2IEncoder(DefaultTaskEncoder):
    cookers = [Cooker(cook)]


samples = get_loader(
    get_val_dataset(
        f"{{root}}/data/{stream}",
        split_part="{split}",
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        task_encoder=X2IEncoder(),
    )
)
```

```python
import pyarrow.parquet as pq

index = pq.read_table(f"{{root}}/meta/samples")
```

`index/*-wids.json` are shard indexes for `wids`. `x2i export` writes the JSONL that OmniGen's own trainer reads.

## Provenance

`recipe.yaml` (sha256 `{manifest["recipe_sha256"]}`) made this corpus, with {versions}.
`manifest.json` lists the sha256 of every shard.
"""


def _sample_rows(counts: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for stream, entry in counts["streams"].items():
        for subtask, c in entry["subtasks"].items():
            mean = f"{c['output_width']:.0f}×{c['output_height']:.0f}"
            yield (
                stream,
                subtask,
                f"{c['samples']:,}",
                mean,
                f"{c['real_output'] / c['samples']:.0%}",
                _size(c["bytes"]),
            )


def _share_rows(counts: Mapping[str, Any], name: str) -> Iterator[tuple[str, ...]]:
    """Samples by value over all subtasks, largest first."""
    total: Counter[str] = Counter()
    for entry in counts["streams"].values():
        for subtask in entry["subtasks"].values():
            total.update(subtask[name])
    for value, n in sorted(total.items(), key=lambda item: (-item[1], item[0])):
        yield value or "not stated", f"{n:,}", f"{n / counts['samples']:.1%}"


def _latents_note(entries: Iterable[Mapping[str, Any]]) -> str:
    """Cached latents, a line per VAE and side."""
    lines = [
        f"* `{entry['folder']}`: {entry['side']} px by the VAE {entry['vae_name']}, {entry['dtype']}, "
        f"{_size(sum(shard['bytes'] for shard in entry['shards'].values()))}"
        for entry in entries
    ]
    note = "Posterior moments (means and log-variances, scaled) of every input and output image, by `x2i latents`:"
    return "\n".join(["", note, "", *lines, ""]) if lines else ""


def _split_note(streams: Mapping[str, Any]) -> str:
    mixed = [name for name, s in streams.items() if any(len(shard["splits"]) > 1 for shard in s["shards"])]
    if not mixed:
        return "Every shard belongs to one split."
    return (
        f"Shards of {', '.join(mixed)} hold samples of several splits, so readers offer them as `train`: "
        "**select by the record's `split`** before you train or evaluate."
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines])


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
