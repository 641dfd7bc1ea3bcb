"""The work of the `latents` stage; apart from it because this imports torch.

Images are read, cropped and scaled by the trainer's own functions, and encoded one by one in float32 on one thread, so
that the bytes depend neither on batches nor on the number of workers. Another kind of device gives other float noise.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from functools import cached_property
from hashlib import sha256
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from filters.models import Checkpoint, inference
from fine_tune.data import SampleSettings, fit_sample, read_images
from fine_tune.index import Corpus
from fine_tune.latents import DTYPES
from fine_tune.tiny import VAE_DIR
from fine_tune.vae import FrozenVAE
from pipelines.corpus import Shard, read_index
from pipelines.engine import describe
from pipelines.storage import Folder
from schemas.arrow import LATENTS
from schemas.latents import FACTOR, ITEM_BYTES, Latents, image_names

_TYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # as safetensors calls them
_REMEMBERED = 64  # images: samples that share one follow each other


class Encoder:
    """The VAE of a recipe, on the images of a corpus."""

    def __init__(self, corpus: Folder, wanted: Latents) -> None:
        self.wanted = wanted
        self._reader = Corpus(corpus.url)
        self._recent = OrderedDict[bytes, Tensor]()

    def encode(self, sample: Mapping[str, Any], side: int) -> list[Tensor]:
        """Moments [2C, h, w] of the input images and the target of a sample, on the CPU, in the dtype of the recipe.

        Args:
            sample: row of the sample index.
            side: longest side in pixels.

        Raises:
            SampleError: an image cannot be read, or an edit's source and target cannot be aligned.
        """
        fitted = fit_sample(sample, read_images(self._reader, sample), SampleSettings(max_side=side))
        return [self._encode_image(pixels) for pixels in fitted.tensors]

    def _encode_image(self, pixels: Tensor) -> Tensor:
        key = sha256(f"{list(pixels.shape)}".encode() + pixels.numpy().tobytes()).digest()
        if key not in self._recent:
            with inference(self.wanted.params) as device:
                self.vae.module.to(device)
                self._recent[key] = self.vae.encode(pixels).moments.to("cpu", DTYPES[self.wanted.dtype])
        self._recent.move_to_end(key)
        if len(self._recent) > _REMEMBERED:
            self._recent.popitem(last=False)
        return self._recent[key]

    @cached_property
    def vae(self) -> FrozenVAE:
        """Raises ModelMissing if it cannot be loaded or shrinks images by another factor than OmniGen's."""
        name = self.wanted.checkpoint_name
        if not name:
            return FrozenVAE.from_pretrained(VAE_DIR)
        checkpoint, subfolder = Checkpoint(self.wanted.params, "vae"), self.wanted.subfolder
        folder = checkpoint.fetch([f"{subfolder}/*" if subfolder else "*"])
        try:
            vae = FrozenVAE.from_pretrained(folder, subfolder=subfolder or None)
        except (OSError, ValueError, RuntimeError) as error:
            raise checkpoint.missing(f"it cannot be loaded as an AutoencoderKL of diffusers: {error}") from error
        if vae.factor != FACTOR:
            raise checkpoint.missing(f"it shrinks images by {vae.factor}, OmniGen's does by {FACTOR}")
        return vae


class LatentWriter:
    """Writes the moments of one shard as a safetensors file, and a table of where each tensor is.

    A safetensors file begins with the places of its tensors, so the data wait in a temporary file.
    """

    def __init__(self, corpus: Folder, folder: str, shard: Shard, made: Mapping[str, Any], vae_name: str) -> None:
        self.corpus, self.shard, self.made, self.vae_name = corpus, shard, made, vae_name
        self.path = f"{folder}/{shard.stem}"
        self.outputs: dict[str, dict[str, Any]] = {}
        self._shapes: dict[int, list[list[int]]] = {}  # by row of the shard

    def __enter__(self) -> LatentWriter:
        self._data = tempfile.TemporaryFile()
        return self

    def add(self, index: int, row: Any, moments: list[Tensor]) -> None:
        for tensor in moments:
            self._data.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        self._shapes[index] = [list(tensor.shape) for tensor in moments]

    def __exit__(self, *error: Any) -> None:
        with self._data:
            if error[0] is None:
                self._write()

    def _write(self) -> None:
        rows = self._places()
        made = {name: str(self.made[name]) for name in sorted(self.made)}
        header = self._header(rows, made)
        data, table = f"{self.path}.safetensors", f"{self.path}.parquet"
        with self.corpus.writing(data) as local, local.open("wb") as file:
            file.write(header)
            self._data.seek(0)
            shutil.copyfileobj(self._data, file, 1 << 22)
        described = describe(self.corpus, data)
        self.outputs[data] = described | {"shard_sha256": self.made["shard_sha256"]}
        for row in rows:
            row["offset"] += len(header) if row["shape"] else 0
        made |= {"vae_name": self.vae_name, "images": str(sum(bool(row["shape"]) for row in rows))}
        made |= {name: str(value) for name, value in described.items()}
        self.corpus.write_table(table, pa.Table.from_pylist(rows, LATENTS.with_metadata(made)))
        self.outputs[table] = describe(self.corpus, table)

    def _places(self) -> list[dict[str, Any]]:
        """A row of the table per input and target of the shard; offsets count from the first tensor."""
        rows, offset = list[dict[str, Any]](), 0
        for number, sample in enumerate(read_index(self.corpus, self.shard, ["key", "members"]).to_pylist()):
            names = image_names(sample["members"])
            for name, shape in zip(names, self._shapes.get(number, [[]] * len(names)), strict=True):
                rows.append({"key": sample["key"], "member": name, "offset": offset if shape else -1, "shape": shape})
                offset += self._bytes(shape)
        return rows

    def _header(self, rows: list[dict[str, Any]], made: Mapping[str, str]) -> bytes:
        """Its length in 8 bytes, then JSON (https://github.com/huggingface/safetensors#format)."""
        entries: dict[str, Any] = {"__metadata__": made}
        for row in (row for row in rows if row["shape"]):
            place = [row["offset"], row["offset"] + self._bytes(row["shape"])]
            kind = _TYPES[DTYPES[self.made["dtype"]]]
            entries[f"{row['key']}.{row['member']}"] = {"dtype": kind, "shape": row["shape"], "data_offsets": place}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def _bytes(self, shape: list[int]) -> int:
        return math.prod(shape) * ITEM_BYTES[self.made["dtype"]] if shape else 0
