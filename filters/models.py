"""Finding, loading and running models: what every scorer and annotator with a model shares.

A model that is absent, incomplete or not what the recipe says is a `ModelMissing`, if possible before a job starts:
`Checkpoint.check` reads configuration and file names, never weights. Heavy libraries are imported where they are used.

Values do not depend on the number of workers: batches are cut inside a unit, arithmetic on a CPU uses one thread (the
workers are the parallelism), and scores are rounded to five decimals. Another kind of device gives other float noise.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from schemas.codec import decode_rgb
from schemas.models import ModelName, ModelParams

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Choice = Sequence[str]  # file name patterns of which one has to be there

CONFIG: Choice = ("config.json",)
WEIGHTS: Choice = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
PREPROCESSOR: Choice = ("preprocessor_config.json", "processor_config.json")
_THREADS = min(8, os.cpu_count() or 1)


class ModelMissing(Exception):
    """A model that cannot be used as the recipe says. Not the fault of any image: it ends the job.

    Args:
        parameter: the key of the recipe section that names it.
        message: what was looked for, where, and what to do.
    """

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(parameter, message)
        self.parameter, self.message = parameter, message

    def __str__(self) -> str:
        return f"{self.parameter}: {self.message}"


@dataclass(frozen=True)
class Checkpoint:
    """The files of a model: a local directory, a local file, or one commit of a hub repository."""

    name: ModelName
    parameter: str = "model"

    @property
    def root(self) -> Path | None:
        """Where the files of a local model are; None for a hub model.

        Raises:
            ModelMissing: there is nothing.
        """
        if not self.name.is_path:
            return None
        path = Path(self.name.model).expanduser()
        if not path.exists():
            raise self.missing(f"there is no {path}; give an existing directory or a hub id with its revision")
        return path.parent if path.is_file() else path

    @property
    def revision(self) -> str:
        """What pins the content: the commit, or `sha256:` and 16 digits of a local model's files."""
        return content_revision(Path(self.name.model).expanduser()) if self.name.is_path else self.name.revision

    @property
    def provenance(self) -> dict[str, str]:
        return {"model": self.name.model, "revision": self.revision}

    def missing(self, message: str) -> ModelMissing:
        """A `ModelMissing` that names this model."""
        return ModelMissing(self.parameter, f"{self.name.model!r}: {message}")

    def check(self, *needed: Choice) -> None:
        """Raise `ModelMissing` unless there is a file for each choice. Fetches no weights, only the index of shards."""
        names = self._names_at_hand()
        if self.name.is_hub and _absent(needed, names):
            names = self._names_on_hub()
        indices = [name for name in names if name.endswith(".index.json") and _absent(needed, names - {name})]
        shards = {shard for index in indices for shard in self.config(index).get("weight_map", {}).values()}
        if absent := [*_absent(needed, names), *sorted(shards - names)]:
            place = f"revision {self.name.revision} of the hub model" if self.name.is_hub else "the model"
            raise self.missing(f"{place} has no {', no '.join(absent)}; give a complete model")

    def config(self, name: str = "config.json") -> dict[str, Any]:
        """A JSON file of the model.

        Raises:
            ModelMissing: it is not there or not a JSON object.
        """
        try:
            config = json.loads(self._read(name))
        except ValueError as error:
            raise self.missing(f"{name} is not JSON ({error}); fetch the model again") from error
        if not isinstance(config, dict):
            raise self.missing(f"{name} is not a JSON object; fetch the model again")
        return config

    def file(self, *patterns: str) -> Path:
        """The one local file that matches the first pattern that any file matches, downloaded if need be.

        Raises:
            ModelMissing: no file, or several, match.
        """
        folder = self.fetch(patterns)
        found = ([n for n in self._names_at_hand() if fnmatch(n, pattern)] for pattern in patterns)
        names = next(filter(None, found), [])
        if len(names) != 1:
            raise self.missing(f"one file {' or '.join(patterns)} is needed, and there are {len(names)}")
        return folder / names[0]

    def fetch(self, patterns: Choice) -> Path:
        """The local folder of the model, with all files that match a pattern downloaded.

        Raises:
            ModelMissing: there is no such model, or the hub cannot be reached.
        """
        if self.root:
            return self.root
        from huggingface_hub import snapshot_download

        with self._hub_errors():
            folder = snapshot_download(self.name.model, revision=self.name.revision, allow_patterns=list(patterns))
        return Path(folder)

    def _read(self, name: str) -> bytes:
        if self.root:
            return self.file(name).read_bytes()
        from huggingface_hub import hf_hub_download

        with self._hub_errors():
            return Path(hf_hub_download(self.name.model, name, revision=self.name.revision)).read_bytes()

    def _names_at_hand(self) -> frozenset[str]:
        """Files that need no network."""
        if root := self.root:
            path = Path(self.name.model).expanduser()
            return frozenset({path.name} if path.is_file() else _files_in(root))
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = snapshot_download(self.name.model, revision=self.name.revision, local_files_only=True)
        except LocalEntryNotFoundError:
            return frozenset()
        return frozenset(_files_in(Path(folder)))

    def _names_on_hub(self) -> frozenset[str]:
        from huggingface_hub import HfApi

        with self._hub_errors():
            return frozenset(HfApi().list_repo_files(self.name.model, revision=self.name.revision))

    @contextmanager
    def _hub_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the client's errors have no base in common (transport, HTTP, offline, cache)
            commit = self.name.revision
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise self.missing(
                f"revision {commit} is not in the local cache and the hub does not give it ({reason}); check the id, "
                f"log in if it is gated, or run `hf download {self.name.model} --revision {commit}` where there is a "
                f"network and copy the files"
            ) from error


def content_revision(path: Path) -> str:
    """`sha256:` and 16 digits that change when any file of a model (a directory or a file) changes.

    Hidden files and Markdown are left out. Weights are read in full: a fine-tuned copy has the same names and sizes.
    """
    names = [path.name] if path.is_file() else [n for n in sorted(_files_in(path)) if not n.endswith(".md")]
    folder = path.parent if path.is_file() else path
    digest = hashlib.sha256()
    for name in names:
        status = (folder / name).stat()
        digest.update(f"{name}\0{_file_digest(folder / name, status.st_size, status.st_mtime_ns)}\n".encode())
    return f"sha256:{digest.hexdigest()[:16]}"


def load_pretrained(
    auto: Any, params: ModelParams, may_lack: str = "", weights: str = "float32", **options: Any
) -> Any:
    """`auto.from_pretrained` of a transformers model: evaluation mode, on its device.

    Args:
        auto: a transformers class, e.g. `AutoModel`.
        may_lack: prefix of parameters that are not used, and so may be absent from the checkpoint.
        weights: type of the weights. A model that reads all of them for every token it writes is better off with the
            type of the arithmetic (`dtype_of`), which then need not be cast each time.

    Raises:
        ModelMissing: no such model; pickled objects; code that the recipe does not trust; or a checkpoint without
            some of the weights, which would be random.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar per worker would bury the job's own progress
    checkpoint = Checkpoint(params)
    try:
        model, info = auto.from_pretrained(
            str(checkpoint.root or params.model),
            trust_remote_code=params.trust_remote_code,
            dtype=weights,
            output_loading_info=True,
            **({"revision": params.revision} if params.is_hub else {}),
            **options,
        )
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise checkpoint.missing(f"{auto.__name__} cannot load it: {error}") from error
    bad = {key for key in info["missing_keys"] if not may_lack or not key.startswith(may_lack)}
    bad |= {key for key, *_ in info["mismatched_keys"]}
    if bad:
        raise checkpoint.missing(
            f"the checkpoint has no weights for {', '.join(sorted(bad)[:3])} ({len(bad)} in all) of "
            f"{type(model).__name__}, which would be random; give a checkpoint that was trained for this"
        )
    return placed(model, params)


def load_processor(params: ModelParams) -> Callable[[np.ndarray], torch.Tensor]:
    """The image processor of a transformers model: uint8 RGB [H, W, 3] to float32 [1, 3, h, w].

    Raises:
        ModelMissing: the model has none.
    """
    from transformers import AutoImageProcessor

    checkpoint = Checkpoint(params)
    pinned = {"revision": params.revision} if params.is_hub else {}
    try:
        processor = AutoImageProcessor.from_pretrained(
            str(checkpoint.root or params.model), trust_remote_code=params.trust_remote_code, **pinned
        )
    except (OSError, ValueError) as error:
        raise checkpoint.missing(f"its image processor cannot be loaded: {error}") from error

    def prepare(pixels: np.ndarray) -> torch.Tensor:
        # Told, not guessed: an image 3 pixels high looks like one with its channels first.
        return processor(pixels, return_tensors="pt", input_data_format="channels_last")["pixel_values"]

    return prepare


def load_tensors(path: Path, parameter: str = "model") -> dict[str, torch.Tensor]:
    """Tensors of a `.safetensors` file, or of a pickle that holds nothing but tensors, on the CPU.

    Raises:
        ModelMissing: neither.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        import torch

        tensors = torch.load(path, map_location="cpu", weights_only=True)
        return dict(tensors)
    except Exception as error:  # safetensors' and the unpickler's errors have no base in common
        raise ModelMissing(
            parameter,
            f"{path} is neither safetensors nor a pickle of tensors alone ({type(error).__name__}: {error}); pickles "
            f"can run code, so convert it to safetensors where you trust it",
        ) from error


class _Placeable(Protocol):
    def eval(self) -> Any: ...


M = TypeVar("M", bound=_Placeable)


def placed(model: M, params: ModelParams) -> M:
    """A torch module in evaluation mode and on its device."""
    return model.eval().to(device_of(params))


def device_of(params: ModelParams) -> torch.device:
    """The device that the recipe asks for.

    Raises:
        ModelMissing: a GPU is asked for and none is to be seen.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if params.device.startswith("cuda") and not has_gpu:
        raise ModelMissing("device", f"{params.device!r}, and this worker sees no GPU; set num_gpus, or device: cpu")
    return torch.device(("cuda" if has_gpu else "cpu") if params.device == "auto" else params.device)


def dtype_of(params: ModelParams) -> torch.dtype:
    """The type of the arithmetic; weights stay float32 and sensitive operations too (autocast)."""
    import torch

    if params.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[params.dtype]
    return torch.bfloat16 if device_of(params).type == "cuda" else torch.float32


@contextmanager
def inference(params: ModelParams) -> Iterator[torch.device]:
    """No gradients, autocast if the dtype asks for it, one thread on a CPU, no TF32; gives the device."""
    import torch

    device, dtype = device_of(params), dtype_of(params)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.autocast(device.type, dtype, enabled=dtype != torch.float32))
        if device.type == "cuda":
            exact = {"benchmark": False, "deterministic": True, "allow_tf32": False}
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, **exact))
        else:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        yield device


class Encoded(Protocol):
    """Anything with an encoded image in it."""

    @property
    def data(self) -> bytes: ...


def decode_batch(items: Sequence[Encoded], prepare: Callable[[np.ndarray], T]) -> list[T]:
    """`prepare(pixels)` of each item, in order, on several threads; pixels are uint8 RGB [H, W, 3].

    Raises:
        ValueError: an item is not an image.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda item: prepare(decode_rgb(item.data)), items))


def rounded(value: float) -> float:
    """A score without the digits that are float noise."""
    return round(float(value), 5)


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows of a float [n, d] array scaled to length 1, float32; a row of zeros stays one."""
    vectors = np.asarray(vectors, np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, np.finfo(np.float32).tiny))


def label_index(config: Mapping[str, Any], label: str, checkpoint: Checkpoint) -> int:
    """Output of a transformers classifier that a label names; letter case does not matter.

    Raises:
        ModelMissing: the configuration has no such label.
    """
    labels = {str(name).lower(): int(index) for index, name in (config.get("id2label") or {}).items()}
    if label.lower() not in labels:
        raise ModelMissing("label", f"{checkpoint.name.model!r} has no label {label!r}; it has {', '.join(labels)}")
    return labels[label.lower()]


def _absent(needed: Sequence[Choice], names: frozenset[str]) -> list[str]:
    """The choices for which there is no file, in words."""
    found = [any(fnmatch(name, pattern) for name in names for pattern in choice) for choice in needed]
    return [" or ".join(choice) for choice, there in zip(needed, found, strict=True) if not there]


def _files_in(folder: Path) -> list[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]


@lru_cache(maxsize=4096)
def _file_digest(path: Path, size: int, modified: int) -> str:
    """SHA-256 of a file; size and modification time are what the cache goes by."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
