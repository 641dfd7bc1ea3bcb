"""Finished samples in the official OmniGen / OmniGen2 JSONL, with their images beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from pipelines.images import BadInput
from pipelines.sources.base import Item, ItemReader, ReadySample
from pipelines.sources.fields import clean_caption
from pipelines.sources.files import SourceError, extension_of, list_files, read_file, resolve
from pipelines.sources.mixes import EXTENSIONS, Listing, read_mix, requested_mixture
from pipelines.sources.records import FileIndex, folder_of_images, listed, read_records, record_values
from pipelines.storage import Folder
from schemas.instructions import lint_instruction, placeholder
from schemas.sources import X2ISource
from schemas.vocabulary import normalise_task, stream_for

# `output_images` is what OmniGen's documentation says, `output_image` what its loader reads.
_KEYS = ("task_type", "instruction", "input_images", "output_image", "output_images")


class X2IReader(ItemReader[X2ISource]):
    """One item and one sample per line."""

    def list(self) -> Iterator[Item]:
        rows, indexes = Counter[tuple[str, float]](), dict[str, FileIndex]()
        for listing in self._listings():
            images = self._images(listing.name)
            index = indexes.setdefault(images.url, FileIndex(images))
            for record in read_records(self.base, listing.name):
                values = {key: record.row[key] for key in _KEYS if key in record.row}
                values |= self.parser.rename(record.row)
                if listing.task and not values.get("task_type"):
                    values["task_type"] = listing.task
                rows[self._task_name(values), listing.weight] += 1
                yield listed(listing.name, record, values, _names(values), index)
        mixture = requested_mixture(self.config.path, rows)
        self.warnings += [mixture] if mixture else []

    @property
    def is_mix(self) -> bool:
        return extension_of(self.url) in EXTENSIONS

    @cached_property
    def base(self) -> Folder:
        """What the names of JSONL files start from."""
        return Folder(resolve(self.config.image_root, self.root.url)) if self.is_mix else self.root

    def _images(self, file: str) -> Folder:
        """What the paths in a JSONL file start from."""
        is_base = self.is_mix and self.config.image_root
        return self.base if is_base else folder_of_images(self.base, file, self.config.image_root)

    def _listings(self) -> Iterator[Listing]:
        """The JSONL files of the path: of a folder as it was downloaded, of a mix, or those that it names itself."""
        self.warnings = []
        if self.is_mix:
            yield from read_mix(self.base, self.url.removeprefix(f"{self.base.url.rstrip('/')}/"))
            return
        names = [file.name for file in list_files(self.url, self.root)]
        if self.url == self.root.url:
            packed = [name for name in names if ".tar" in name.rpartition("/")[2]]
            names = [name for name in names if extension_of(name) in ("jsonl", "ndjson")]
            if not names:
                raise SourceError(f"no .jsonl in {self.url}")
            if packed:
                remedy = "unpack them where the JSONL expects them (parts: `cat NAME.tar.gz.* | tar -xz`)"
                self.warnings = [f"{len(packed)} archive(s) are not read, e.g. {packed[0]}: {remedy}"]
        yield from map(Listing, names)

    def read_item(self, item: Item, extra: dict[str, Any]) -> ReadySample:
        values = record_values(extra)
        names = _names(values)
        if len(names) != len(_listed(values, "input_images")) + 1 or not all(names):
            raise BadInput("bad_row", "images are not a list of input paths and one output path")
        task, subtask = self._task(values)
        try:
            stream = stream_for(task, len(names) - 1)
        except ValueError as error:
            raise BadInput("wrong_number_of_inputs", str(error)) from error
        images = self._images(extra["file"])
        *inputs, output = (read_file(images, name) for name in names)
        return ReadySample(
            input=item.locator,
            stream=stream.name,
            task=task,
            subtask=subtask,
            instruction=self._instruction(values, len(inputs)),
            inputs=tuple(inputs),
            output=output,
            **self.parser.provenance(values, names[-1].rpartition("/")[0]),
        )

    def _task_name(self, values: dict[str, Any]) -> str:
        try:
            return self._task(values)[0]
        except BadInput:
            return "unknown"

    def _task(self, values: dict[str, Any]) -> tuple[str, str]:
        name = str(values.get("task_type") or self.config.default_task)
        try:
            return normalise_task(self.config.tasks.get(name, name))
        except ValueError as error:
            raise BadInput("unknown_task", str(error)) from error

    def _instruction(self, values: dict[str, Any], inputs: int) -> str:
        return with_placeholders(values.get("instruction"), inputs, self.config.max_caption_chars)


def with_placeholders(text: Any, inputs: int, max_chars: int) -> str:
    """An instruction as OmniGen's processor takes it.

    Where it has no placeholders, as OmniGen2 and InstructPix2Pix write them, the inputs come first, in order.

    Raises:
        BadInput: `bad_instruction`, `instruction_encoding` or `instruction_too_long`.
    """
    if not isinstance(text, str):
        raise BadInput("bad_instruction", f"instruction is a {type(text).__name__}, not text")
    text = clean_caption(text, max_chars, what="instruction")
    if text and not lint_instruction(text, 0):
        text = f"{''.join(placeholder(k) for k in range(1, inputs + 1))} {text}".strip()
    if problems := lint_instruction(text, inputs):
        raise BadInput("bad_instruction", "; ".join(problems))
    return text


def _listed(values: dict[str, Any], key: str) -> list[Any]:
    given = values.get(key)
    return given if isinstance(given, list) else [given] if given else []


def _names(values: dict[str, Any]) -> list[str]:
    """Paths of the input images, then of the output image; what is not text is left out."""
    output = _listed(values, "output_image") or _listed(values, "output_images")
    return [name for name in [*_listed(values, "input_images"), *output] if isinstance(name, str)]
