"""Task vocabulary: streams with their fixed field sets, and the alias table for task names seen in the wild.

A *task* is a family (`control`), a *stream* is a task with one fixed set of tar members (`control`, `control_2`),
a *subtask* says exactly what is asked (`canny`). Readers such as Hugging Face `datasets` and Ray Data break on
shards whose samples have different members, so every sample of a stream has exactly the members listed here.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Stream:
    """One task family with one fixed field set.

    Args:
        name: stream and shard name.
        task: task family.
        inputs: file extension of each input image, in placeholder order (`input_1` first).
        output: file extension of the target image. Maps are `png` (lossless), photographs `jpg`.
        edit_mask: whether samples carry `edit_mask.png` (8-bit, 255 = may change, output size).
    """

    name: str
    task: str
    inputs: tuple[str, ...]
    output: str
    edit_mask: bool = False

    @property
    def members(self) -> tuple[str, ...]:
        """Tar members of one sample, without the key, in the order in which they are written."""
        inputs = tuple(f"input_{i}.{ext}" for i, ext in enumerate(self.inputs, start=1))
        mask = ("edit_mask.png",) if self.edit_mask else ()
        return (*inputs, f"output.{self.output}", *mask, "txt", "json")

    @property
    def image_members(self) -> tuple[str, ...]:
        return tuple(m for m in self.members if m not in ("txt", "json"))


STREAMS: dict[str, Stream] = {
    s.name: s
    for s in (
        Stream("text_to_image", "text_to_image", (), "jpg"),
        Stream("edit", "edit", ("jpg",), "jpg", edit_mask=True),
        Stream("style", "style", ("jpg",), "jpg", edit_mask=True),
        Stream("restore", "restore", ("jpg",), "jpg", edit_mask=True),
        *(Stream(f"control{n}", "control", ("png",) * k, "jpg") for k, n in ((1, ""), (2, "_2"), (3, "_3"))),
        Stream("perceive", "perceive", ("jpg",), "png"),
        *(Stream(f"subject_{k}", "subject", ("jpg",) * k, "jpg") for k in (1, 2, 3)),
        Stream("extract", "extract", ("jpg",), "jpg"),
        Stream("try_on", "try_on", ("jpg", "jpg"), "jpg"),
        Stream("text_render", "text_render", (), "jpg"),
        # Examples of one group may be photographs or maps, so all are lossless.
        *(Stream(f"few_shot_{k}", "few_shot", ("png",) * (2 * k + 1), "png") for k in (1, 2)),
    )
}

TASKS: tuple[str, ...] = tuple(dict.fromkeys(s.task for s in STREAMS.values()))

# Spellings found in public OmniGen / OmniGen2 data and in its issues -> (task, subtask).
_ALIASES: dict[str, tuple[str, str]] = {
    "text_to_iamge": ("text_to_image", "caption"),
    "text2image": ("text_to_image", "caption"),
    "t2i": ("text_to_image", "caption"),
    "image_edit": ("edit", "instruction"),
    "image_editing": ("edit", "instruction"),
    "i2i": ("edit", "instruction"),
    "style_transfer": ("style", "transfer"),
    "segementation": ("perceive", "segmentation"),
    "segmentation": ("perceive", "segmentation"),
    "seg": ("perceive", "segmentation"),
    "ade": ("perceive", "segmentation"),
    "coco2017": ("perceive", "segmentation"),
    "reasonseg": ("perceive", "segmentation"),
    "pose": ("perceive", "pose"),
    "skeleton": ("perceive", "pose"),
    "depth": ("perceive", "depth"),
    "canny": ("perceive", "canny"),
    "hed": ("perceive", "hed"),
    "deblur": ("restore", "deblur"),
    "gopro": ("restore", "deblur"),
    "derain": ("restore", "derain"),
    "raindrop": ("restore", "derain"),
    "weather_stream": ("restore", "derain"),
    "dehaze": ("restore", "dehaze"),
    "denoise": ("restore", "denoise"),
    "enhance": ("restore", "low_light"),
    "low_light": ("restore", "low_light"),
    "super_resolution": ("restore", "super_resolution"),
    "inpainting": ("restore", "inpaint"),
    "inpaint": ("restore", "inpaint"),
    "outpainting": ("restore", "outpaint"),
    "outpaint": ("restore", "outpaint"),
    "colorization": ("restore", "colorize"),
    "colorize": ("restore", "colorize"),
    "subject_driven": ("subject", "reference"),
    "ic": ("subject", "reference"),
    "tryon": ("try_on", "try_on"),
    "virtual_try_on": ("try_on", "try_on"),
    "in_context": ("few_shot", "group"),
    "icl": ("few_shot", "group"),
}
_DEFAULT_SUBTASK = {
    "text_to_image": "caption",
    "edit": "instruction",
    "style": "transfer",
    "subject": "reference",
    "few_shot": "group",
}


def normalise_task(name: str) -> tuple[str, str]:
    """Map a task name in any known spelling to `(task, subtask)`.

    `task/subtask` is accepted as well, e.g. `restore/deblur`.

    Raises:
        ValueError: the name is unknown; the message suggests the closest known names.
    """
    slug = re.sub(r"[^a-z0-9/]+", "_", name.strip().lower()).strip("_")
    task, _, subtask = slug.partition("/")
    if task in TASKS:
        return task, subtask or _DEFAULT_SUBTASK.get(task, task)
    if not subtask and slug in _ALIASES:
        return _ALIASES[slug]
    near = difflib.get_close_matches(slug, [*TASKS, *_ALIASES], n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; tasks are {', '.join(TASKS)}"
    raise ValueError(f"unknown task {name!r}{hint}")


def stream_for(task: str, inputs: int) -> Stream:
    """The stream that holds samples of `task` with that many input images.

    Raises:
        ValueError: no stream of the task takes this number of inputs.
    """
    of_task = [s for s in STREAMS.values() if s.task == task]
    for stream in of_task:
        if len(stream.inputs) == inputs:
            return stream
    takes = " or ".join(str(len(s.inputs)) for s in of_task) or "no"
    raise ValueError(f"task {task!r} takes {takes} input image(s), not {inputs}")
