"""caption: what a vision-language model says about an image, in several lengths, with its confidence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import Field

from builders.annotators.annotator import Artefact
from builders.annotators.captioners import Answer, Captioner, check_captioner, open_captioner
from builders.annotators.hub import at_most
from builders.annotators.model import ModelAnnotator
from builders.base import SourceImage
from builders.captions import caption_problem, normalise_caption
from filters.models import ModelMissing
from schemas.models import ModelParams, VisionLanguageParams
from schemas.records import ImageRecord, Op

Style = Literal["short", "long", "tags"]

_ONLY_SEEN = "Describe only what can be seen; do not guess names, places or intentions."
PROMPTS: Mapping[str, str] = {
    "short": f"Describe this image in one sentence of at most 20 words. {_ONLY_SEEN} Answer with the sentence alone.",
    "long": (
        "Describe this image in one paragraph of 80 to 150 words: the main things and their colours, materials and "
        f"positions, the background, the light and the kind of picture. {_ONLY_SEEN} Answer with the paragraph alone."
    ),
    "tags": (
        "List up to 15 things that can be seen in this image, the most important first, as short nouns separated by "
        "commas. Answer with the list alone."
    ),
}
# Florence-2 knows tasks, not prompts; for tags it has none.
_FLORENCE: Mapping[str, str] = {"short": "<CAPTION>", "long": "<MORE_DETAILED_CAPTION>"}
_MAX_TAGS = 20
_SENTENCE_END = re.compile(r"[.!?][\"'”’)]*(?=\s|$)")


class CaptionParams(VisionLanguageParams):
    """Parameters of the `caption` annotator."""

    styles: tuple[Style, ...] = Field(default=("short", "long"), min_length=1)
    prompts: dict[Style, str] = Field(default={}, description="instead of the built-in ones")
    max_tokens: int = Field(default=320, ge=1, description="longer answers are cut after their last whole sentence")


class Caption(ModelAnnotator):
    """Data: `captions`, by style: `text, tokens, mean_logprob, finished` and `problem`, "" or why it is not used.

    Models: any `AutoModelForImageTextToText` with a chat template (Qwen3-VL, SmolVLM, InternVL, Gemma 3, ...),
    Florence-2, or whatever stands behind `base_url`. Of a server, `revision` is what the recipe says it serves.
    """

    name: ClassVar[str] = "caption"
    version: ClassVar[str] = "1"
    Params: ClassVar[type[ModelParams]] = CaptionParams
    params: CaptionParams

    def op(self) -> Op:
        if not self.params.base_url:
            return super().op()
        params = self.params.model_dump(
            mode="json", exclude={"model", "revision", "batch_size", *self.params.resources}
        )
        op = Op.of(f"annotate:{self.name}", self.version, **params, backend="server")
        return op.model_copy(update={"model": self.params.model, "revision": self.params.revision})

    def preflight(self) -> None:
        check_captioner(self.params)
        _ = self._prompts

    def annotate(self, images: Sequence[SourceImage]) -> list[Artefact]:
        pictures = [at_most(image.pixels, self.params.max_pixels) for image in images]
        answers = {
            style: self._captioner.answer(pictures, prompt, self.params.max_tokens)
            for style, prompt in self._prompts.items()
        }
        return [
            Artefact({"captions": {style: _caption(style, said[i]) for style, said in answers.items()}})
            for i in range(len(images))
        ]

    def enrich(self, record: ImageRecord, artefact: Artefact) -> ImageRecord:
        """Captions that the source left empty are filled; what people wrote stays."""
        good = {style: said["text"] for style, said in artefact.data["captions"].items() if not said["problem"]}
        empty = {style: text for style, text in good.items() if not getattr(record.captions, style)}
        return record.model_copy(update={"captions": record.captions.model_copy(update=empty)})

    @cached_property
    def _captioner(self) -> Captioner:
        return open_captioner(self.params)

    @cached_property
    def _prompts(self) -> dict[str, str]:
        """What to ask for each style.

        Raises:
            ModelMissing: the model cannot be asked for a style.
        """
        prompts: dict[str, str] = {**PROMPTS}
        prompts.update(self.params.prompts.items())
        if not self.params.base_url and self.checkpoint.config().get("model_type") == "florence2":
            prompts = dict(_FLORENCE)
        if unknown := [style for style in self.params.styles if style not in prompts]:
            raise ModelMissing(
                "styles", f"{self.params.model!r} is a Florence-2, which cannot write {', '.join(unknown)}"
            )
        return {style: prompts[style] for style in self.params.styles}


def _caption(style: str, answer: Answer) -> dict[str, Any]:
    text = _tags(answer.text) if style == "tags" else _prose(answer)
    problem = caption_problem(text) if style != "tags" else None
    return {**asdict(answer), "text": text, "problem": problem.reason if problem else ""}


def _prose(answer: Answer) -> str:
    """In one line and without quotes around it; of an unfinished answer, its whole sentences if there are any."""
    text = normalise_caption(answer.text)
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1]
    if answer.finished:
        return text
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else text


def _tags(text: str) -> str:
    """`cat, wooden table`: lower case, each once, without bullets, numbers or full stops."""
    parts = (re.sub(r"^[\s\d.)*•-]+", "", part).strip(" .\"'").lower() for part in re.split(r"[,;\n]", text))
    return ", ".join([tag for tag in dict.fromkeys(parts) if tag][:_MAX_TAGS])
