"""Tensors of many ranks as safetensors files on any fsspec path: storage for `torch.distributed.checkpoint`.

Every rank streams its pieces of tensors to one file. Where a piece belongs stands in the metadata of the file, under
the names that torch's `HuggingFaceStorageReader` reads; unlike torch's own format nothing in it is a pickle. A file
that holds only whole tensors is an ordinary safetensors file.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from math import prod
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    ChunkStorageMetadata,
    LoadPlan,
    LoadPlanner,
    Metadata,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
    TensorStorageMetadata,
    WriteItem,
)
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fine_tune.storage import Location

SUFFIX = ".safetensors"
_SHARDING = "DCP_SHARDING_INFO"
_COMPARED_TENSORS = 16
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn},
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """A block of a tensor in a file: its place in the tensor, and the first byte of it in the file."""

    file: Location
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def read(self, offsets: tuple[int, ...] | None = None, lengths: tuple[int, ...] | None = None) -> Tensor:
        """A part of the piece; only the rows that it touches are read."""
        offsets, lengths = offsets or (0,) * len(self.shape), lengths or self.shape
        if not prod(lengths):
            return torch.empty(lengths, dtype=self.dtype)
        row = prod(self.shape[1:]) * self.dtype.itemsize
        first, rows = (offsets[0], lengths[0]) if self.shape else (0, 1)
        start = self.start + first * row
        data = bytearray(self.file.read(start, start + rows * row))
        if len(data) != rows * row:
            raise OSError(f"{self.file} ends before byte {start + rows * row}")
        whole = torch.frombuffer(data, dtype=self.dtype).view(lengths[:1] + self.shape[1:])
        return whole[tuple(slice(o, o + n) for o, n in zip((0, *offsets[1:]), lengths, strict=False))]


def read_pieces(file: Location) -> dict[str, Piece]:
    """What a safetensors file holds, from its header.

    Raises:
        OSError: it is cut off or no safetensors file.
    """
    try:
        size = int.from_bytes(file.read(0, 8), "little")
        header = json.loads(file.read(8, 8 + size))
    except ValueError as error:
        raise OSError(f"{file} is no safetensors file: {error}") from error
    metadata = header.pop("__metadata__", {})
    places = json.loads(metadata.get(_SHARDING, "{}"))
    pieces = {}
    for name, entry in header.items():
        shape = tuple(entry["shape"])
        offsets = tuple(places[name]["saved_offsets"]) if name in places else (0,) * len(shape)
        pieces[name] = Piece(file, _DTYPES[entry["dtype"]], shape, offsets, 8 + size + entry["data_offsets"][0])
    return pieces


class ShardWriter(StorageWriter):
    """Each rank writes `shard-00001-of-00008.safetensors`, and reads back its header and a sample of its tensors.

    Args:
        folder: where to.
        stem: write a Hugging Face index `<stem>.safetensors.index.json` too if no tensor was cut into pieces.
    """

    def __init__(self, folder: Location, stem: str | None = None) -> None:
        super().__init__()
        self.folder, self.stem = folder, stem

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        names = (f"shard-{number:05d}-of-{len(plans):05d}{SUFFIX}" for number in range(1, len(plans) + 1))
        return [replace(plan, storage_data=name) for plan, name in zip(plans, names, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        file = self.folder / plan.storage_data
        if plan.items:
            file.write(
                lambda stream: _write_items(stream, plan.items, planner),
                lambda: _compare(file, plan.items, planner),
            )
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(item.index, _nbytes(item), plan.storage_data) for item in plan.items])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files = {result.index.fqn: result.storage_data for part in results for result in part}
        if self.stem and len(files) == sum(map(len, results)):
            total = sum(result.size_in_bytes for part in results for result in part)
            index = {"metadata": {"total_size": total}, "weight_map": files}
            (self.folder / f"{self.stem}{SUFFIX}.index.json").write_json(index)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _write_items(stream: IO[bytes], items: list[WriteItem], planner: SavePlanner) -> None:
    """Header, then one tensor after the other, so that only one at a time is copied to the host."""
    offsets = {item.index.fqn: {"saved_offsets": list(_data(item).chunk.offsets)} for item in items}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "DCP_VERSION": "1.0", _SHARDING: json.dumps(offsets)}}
    position = 0
    for item in items:
        data = _data(item)
        end = position + _nbytes(item)
        header[item.index.fqn] = {
            "dtype": _NAMES[data.properties.dtype],
            "shape": list(data.chunk.sizes),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for item in items:
        stream.write(_bytes_of(planner.resolve_data(item)))


def _bytes_of(tensor: Any) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _data(item: WriteItem) -> Any:
    """What DCP knows of a tensor that is written; only tensors are, numbers are made 0-dimensional ones."""
    return item.tensor_data


def _nbytes(item: WriteItem) -> int:
    return prod(_data(item).chunk.sizes) * _data(item).properties.dtype.itemsize


def _compare(file: Location, items: list[WriteItem], planner: SavePlanner) -> None:
    saved = read_pieces(file)
    intact = saved.keys() == {item.index.fqn for item in items}
    for item in items[:: max(1, len(items) // _COMPARED_TENSORS)]:
        intact = intact and bytes(_bytes_of(saved[item.index.fqn].read())) == bytes(
            _bytes_of(planner.resolve_data(item))
        )
    if not intact:
        raise OSError(f"{file} does not hold what was written; is the disk full?")


class ShardReader(StorageReader):
    """Reads what `ShardWriter` has written, and any other safetensors files; every rank only the rows it needs."""

    def __init__(self, files: Iterable[Location]) -> None:
        super().__init__()
        self.files = list(files)

    @cached_property
    def pieces(self) -> dict[str, list[Piece]]:
        """By name of the tensor."""
        found: dict[str, list[Piece]] = defaultdict(list)
        for file in self.files:
            for name, piece in read_pieces(file).items():
                found[name].append(piece)
        return dict(found)

    def shape(self, name: str) -> tuple[int, ...]:
        ends = ([o + n for o, n in zip(piece.offsets, piece.shape, strict=True)] for piece in self.pieces[name])
        return tuple(max(sizes) for sizes in zip(*ends, strict=True))

    def describe(self) -> dict[str, Tensor]:
        """All tensors on the meta device: names, dtypes and shapes."""
        return {
            name: torch.empty(self.shape(name), dtype=pieces[0].dtype, device="meta")
            for name, pieces in self.pieces.items()
        }

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, put together."""
        first, *others = self.pieces[name]
        if not others:
            return first.read()
        whole = torch.empty(self.shape(name), dtype=first.dtype)
        for piece in (first, *others):
            whole[tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.shape, strict=True))] = piece.read()
        return whole

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        entries: dict[str, Any] = {}
        places: dict[MetadataIndex, Piece] = {}
        for name, pieces in self.pieces.items():
            chunks = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.shape)) for p in pieces]
            properties = TensorProperties(dtype=pieces[0].dtype)
            entries[name] = TensorStorageMetadata(properties, torch.Size(self.shape(name)), chunks)
            places |= {MetadataIndex(name, torch.Size(piece.offsets)): piece for piece in pieces}
        return Metadata(entries, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._places: Mapping[MetadataIndex, Piece] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            piece = self._places[item.storage_index]
            target = planner.resolve_tensor(item).detach()
            target.copy_(piece.read(tuple(item.storage_offsets), tuple(item.lengths)))
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def split_by_size(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Names in order, in groups of at most `limit` bytes; those of one block of a model stay together.

    Args:
        sizes: bytes by name.
        limit: of a group; a block that is larger makes a group of its own.
    """

    def unit(name: str) -> str:
        return ".".join(name.split(".")[:2]) if name.startswith("layers.") else name

    group: list[str] = []
    for _, members in groupby(sizes, key=unit):
        names = list(members)
        if group and sum(sizes[name] for name in group + names) > limit:
            yield group
            group = []
        group += names
    if group:
        yield group
