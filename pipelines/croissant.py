"""Croissant metadata (MLCommons, version 1.0): what a corpus holds, and how to load its records.

A stream has a record set of its samples, from the sample index, and one per kind of image, from the shards; both say
the sample's key. Files are named relative to `croissant.json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.corpus import SAMPLE_INDEX
from schemas.vocabulary import STREAMS

VERSION = "http://mlcommons.org/croissant/1.0"
_OWN_TERMS = (
    *("citeAs", "column", "equivalentProperty", "extract", "field", "fileProperty", "fileObject", "fileSet", "format"),
    *("includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex"),
    *("repeated", "replace", "samplingRate", "separator", "source", "subField", "transform"),
)
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "dct": "http://purl.org/dc/terms/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{term: f"cr:{term}" for term in _OWN_TERMS},
}
_COLUMNS = {
    "instruction": ("sc:Text", "what is asked; `<img><|image_1|></img>` stands for the first input"),
    "task": ("sc:Text", "family of tasks"),
    "subtask": ("sc:Text", "what exactly is asked"),
    "split": ("sc:Text", "train, val or test; all samples of a scene are in one"),
    "license": ("sc:Text", "of all photographs that it descends from, an SPDX expression where known"),
    "scene_id": ("sc:Text", "photographs of one scene share it"),
    "edit_area_ratio": ("sc:Float", "share of the output that an edit may change, -1 if there is none"),
    "aligned": ("sc:Boolean", "whether the edited input and the output agree outside the mask, as measured"),
}
_MIME = {"jpg": "image/jpeg", "png": "image/png"}


def render_croissant(manifest: Mapping[str, Any], counts: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON-LD document.

    Args:
        manifest: see `pipelines.publish`.
        counts: see `pipelines.corpus.summary`.
    """
    streams = manifest["streams"]
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": manifest["name"],
        "conformsTo": VERSION,
        "description": (
            f"An any-to-image training corpus of {manifest['samples']} samples: an instruction with zero or more input "
            "images and one output image. Built with x2i."
        ),
        "license": _licenses(counts),
        "keywords": ["any-to-image", "webdataset", *streams],
        "distribution": [node for name in streams for node in _files(name, streams[name])],
        "recordSet": [record_set for name in streams for record_set in _record_sets(name)],
    }


def _licenses(counts: Mapping[str, Any]) -> list[str]:
    subtasks = (subtask for stream in counts["streams"].values() for subtask in stream["subtasks"].values())
    return sorted({name for subtask in subtasks for name in subtask["licenses"]} - {""}) or ["not stated"]


def _files(stream: str, entry: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The shards, the sample index, and each kind of image within the shards."""
    for shard in entry["shards"]:
        yield {
            "@type": "cr:FileObject",
            "@id": shard["name"],
            "name": shard["name"],
            "contentUrl": f"data/{stream}/{shard['name']}",
            "contentSize": f"{shard['bytes']} B",
            "encodingFormat": "application/x-tar",
            "sha256": shard["sha256"],
        }
    yield {
        "@type": "cr:FileSet",
        "@id": f"{stream}-index",
        "name": f"{stream}-index",
        "encodingFormat": "application/x-parquet",
        "includes": f"{SAMPLE_INDEX}/{stream}-[0-9][0-9][0-9][0-9][0-9][0-9].parquet",
    }
    for member in STREAMS[stream].image_members:
        yield {
            "@type": "cr:FileSet",
            "@id": f"{stream}-{member}",
            "name": f"{stream}-{member}",
            "containedIn": [{"@id": shard["name"]} for shard in entry["shards"]],
            "encodingFormat": _MIME[member.rpartition(".")[2]],
            "includes": f"*.{member}",
        }


def _record_sets(stream: str) -> Iterator[dict[str, Any]]:
    index = {"fileSet": {"@id": f"{stream}-index"}}
    columns = {"key": ("sc:Text", "unique in the corpus"), **_COLUMNS}
    yield _record_set(
        stream,
        [
            _field(f"{stream}/{name}", kind, text, index | {"extract": {"column": name}})
            for name, (kind, text) in columns.items()
        ],
    )
    for member in STREAMS[stream].image_members:
        name, files = f"{stream}-images-{member}", {"fileSet": {"@id": f"{stream}-{member}"}}
        before_dot = {"extract": {"fileProperty": "filename"}, "transform": {"regex": r"^([^.]+)\."}}
        content = {"extract": {"fileProperty": "content"}}
        yield _record_set(
            name,
            [
                _field(f"{name}/key", "sc:Text", f"key of the sample, as in {stream}", files | before_dot),
                _field(f"{name}/image", "sc:ImageObject", f"its {member}", files | content),
            ],
        )


def _record_set(name: str, fields: list[dict[str, Any]]) -> dict[str, Any]:
    return {"@type": "cr:RecordSet", "@id": name, "name": name, "key": {"@id": f"{name}/key"}, "field": fields}


def _field(name: str, kind: str, description: str, source: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": name,
        "name": name,
        "description": description,
        "dataType": kind,
        "source": dict(source),
    }
