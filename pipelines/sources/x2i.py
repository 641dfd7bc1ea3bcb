"""Finished samples in the official OmniGen / OmniGen2 JSONL, with their images beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines.images import BadInput
from pipelines.sources.base import Item, ItemReader, ReadySample
from pipelines.sources.fields import clean_caption
from pipelines.sources.files import list_files, read_file
from pipelines.sources.records import FileIndex, folder_of_images, listed, read_records, record_values
from schemas.instructions import lint_instruction, placeholder
from schemas.sources import X2ISource
from schemas.vocabulary import normalise_task, stream_for

# `output_images` is what OmniGen's documentation says, `output_image` what its loader reads.
_KEYS = ("task_type", "instruction", "input_images", "output_image", "output_images")


class X2IReader(ItemReader[X2ISource]):
    """One item and one sample per line."""

    def list(self) -> Iterator[Item]:
        for file in list_files(self.url, self.root):
            index = FileIndex(folder_of_images(self.root, file.name, self.config.image_root))
            for record in read_records(self.root, file.name):
                values = {key: record.row[key] for key in _KEYS if key in record.row}
                values |= self.parser.rename(record.row)
                yield listed(file.name, record, values, _names(values), index)

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
        images = folder_of_images(self.root, extra["file"], self.config.image_root)
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

    def _task(self, values: dict[str, Any]) -> tuple[str, str]:
        name = str(values.get("task_type") or self.config.default_task)
        try:
            return normalise_task(self.config.tasks.get(name, name))
        except ValueError as error:
            raise BadInput("unknown_task", str(error)) from error

    def _instruction(self, values: dict[str, Any], inputs: int) -> str:
        text = values.get("instruction")
        if not isinstance(text, str):
            raise BadInput("bad_instruction", f"instruction is a {type(text).__name__}, not text")
        text = clean_caption(text, self.config.max_caption_chars, what="instruction")
        if text and not lint_instruction(text, 0):  # OmniGen2 writes no placeholders: inputs come first, in order
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
