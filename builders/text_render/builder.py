"""text_render: an instruction that spells out a text -> a picture that holds exactly this text, legibly.

Fonts, layout and colours are drawn; the ink has to stand out from what is really behind it. Lines and words are
recorded with their boxes as entities, so that the text can be checked by reading the picture.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from PIL import __version__ as pillow_version
from pydantic import Field, field_validator

from builders.base import (
    Builder,
    BuilderParams,
    Outcome,
    Rejected,
    Sample,
    SourceImage,
    Weights,
    check_names,
    draft,
    draw_names,
)
from builders.captions import Style, strip_meta_talk, usable_captions
from builders.templates import Phrasing, phrase
from builders.text_render.fonts import Font, fonts_for, shipped_fonts
from builders.text_render.layout import Box, Line, draw, entities, least_contrast, luminance_behind, place
from builders.text_render.reading import character_error_rate, read_text
from builders.text_render.scenes import COLOURS, ON_PHOTO, SCENES, Scene, with_scrim
from filters.models import ModelMissing
from filters.packaged import RAPID_OCR
from schemas.codec import decode_rgb, encode_jpeg
from schemas.records import Captions, ImageRecord, Op

CAPTIONS: tuple[Style, ...] = ("short", "long", "alt")
SCRIMS = (0.0, 0.35, 0.6, 0.8)  # opacities that are tried until some ink is legible
VARIANTS = 2  # further phrasings kept beside the instruction
OVERHANG = 2.0  # px that a box may stand out of the picture: italics lean out of theirs


class FontFile(BuilderParams):
    """A font beside the shipped ones: absolute path, family, licence, and how an instruction calls it."""

    path: Path
    family: str = Field(min_length=1)
    license: str = Field(min_length=1)
    look: str = Field(min_length=1, description='an adjective, e.g. "bold serif"')


class TextRenderParams(BuilderParams):
    """The `text_render` section of a recipe.

    Args:
        scenes: weights of `word, sentence, page, list` and, for images with a caption, `sign, poster, caption_strip`.
        per_image: how many different ones are made for each image.
        fonts: used in place of those that matplotlib ships.
        min_side: images with a shorter side are rejected.
        min_size: least font size in px; with less, letters do not survive an 8x8 latent grid.
        contrast: least contrast of ink and background; 4.5 is level AA of WCAG 2.2.
        verify: read every picture and reject those that say something else than they should.
        max_cer: character error rate that a reader is allowed; its own mistakes are in it.
    """

    scenes: Weights = Field(default_factory=lambda: dict.fromkeys(SCENES, 1.0))
    per_image: int = Field(1, ge=1)
    fonts: tuple[FontFile, ...] = ()
    min_side: int = Field(224, ge=64)
    min_size: int = Field(20, ge=8)
    contrast: float = Field(4.5, ge=1, le=21)
    verify: Literal["none", "rapidocr"] = "none"
    max_cer: float = Field(0.1, ge=0)

    @field_validator("scenes")
    @classmethod
    def _scenes_are_known(cls, scenes: Weights) -> Weights:
        return check_names(scenes, SCENES, "text scene")


class TextRender(Builder):
    """An attempt is the name of a scene; it makes one sample."""

    name: ClassVar[str] = "text_render"
    version: ClassVar[str] = "1"
    Params: ClassVar[type[BuilderParams]] = TextRenderParams
    params: TextRenderParams

    @cached_property
    def fonts(self) -> tuple[Font, ...]:
        given = (Font(font.path, font.family, font.look, font.license) for font in self.params.fonts)
        return tuple(given) or shipped_fonts()

    def preflight(self) -> None:
        for font in self.fonts:
            if not font.path.is_file():
                raise ModelMissing("fonts", f"there is no {font.path}")
        if self.params.verify == "rapidocr":
            _ = RAPID_OCR.path  # raises ModelMissing

    def attempts(self, record: ImageRecord, rng: np.random.Generator) -> list[str]:
        """Scenes drawn by weight; those that show the photo only where it has a caption."""
        captioned = bool(_caption(record.captions))
        possible = {name: w for name, w in self.params.scenes.items() if captioned or name not in ON_PHOTO}
        return draw_names(possible, self.params.per_image, rng) if possible else []

    def build(self, image: SourceImage, attempt: str, rng: np.random.Generator) -> Outcome:
        side = min(image.pixels.shape[:2])
        if side < self.params.min_side:
            return Rejected("too_small", side, attempt)
        scene = SCENES[attempt](image.pixels, _caption(image.record.captions), rng)
        layout = self._layout(scene, rng)
        if isinstance(layout, Rejected):
            return layout
        font, lines = layout
        boxes = [line.box(font) for line in lines]
        canvas, ink, contrast = self._legible(scene, boxes, rng)
        if contrast < self.params.contrast:
            return Rejected("contrast", contrast, attempt)
        jpeg = encode_jpeg(draw(canvas, lines, font, COLOURS[ink]))
        scores = {"contrast": contrast, "font_size": min(line.size for line in lines)}
        if self.params.verify == "rapidocr":
            scores["cer"] = character_error_rate(read_text(decode_rgb(jpeg)), scene.text)
            if scores["cer"] > self.params.max_cer:
                return Rejected("misread", scores["cer"], scene.text)
        record = draft(
            image.record,
            "text_render",
            attempt,
            self._op(attempt, scene, font, ink, lines),
            **vars(_instruction(attempt, scene, font, ink, rng)),
            output_kind="text",
            real_output=False,
            entities=json.dumps([entity.model_dump(mode="json") for entity in entities(lines, font)]),
            scores=json.dumps(scores, sort_keys=True),
        )
        return [Sample(record, {"output.jpg": jpeg})]

    def _layout(self, scene: Scene, rng: np.random.Generator) -> tuple[Font, list[Line]] | Rejected:
        usable = fonts_for(scene.text, self.fonts)
        if not usable:
            return Rejected("no_glyphs", 0, scene.text)
        font = usable[rng.integers(len(usable))]
        lines = place(scene.blocks, font, self.params.min_size)
        if lines is None:
            return Rejected("does_not_fit", len(scene.text), scene.text)
        beyond = _beyond([line.box(font) for line in lines], scene.canvas)
        return Rejected("off_canvas", beyond, scene.text) if beyond > OVERHANG else (font, lines)

    def _legible(self, scene: Scene, boxes: list[Box], rng: np.random.Generator) -> tuple[np.ndarray, str, float]:
        """(canvas, ink, contrast): a random ink that is legible, with a scrim if none is without; else the best."""
        best = (scene.canvas, "", 0.0)
        inks = [str(ink) for ink in rng.permutation(list(COLOURS))]
        white_first = bool(rng.random() < 0.5)
        for opacity in SCRIMS if scene.scrim else SCRIMS[:1]:
            for white in (white_first, not white_first) if opacity else (white_first,):
                canvas = with_scrim(scene, opacity, white) if opacity else scene.canvas
                behind = luminance_behind(canvas, boxes)
                for ink in inks:
                    contrast = least_contrast(COLOURS[ink], behind)
                    if contrast > best[2]:
                        best = (canvas, ink, contrast)
                    if contrast >= self.params.contrast:
                        return best
        return best

    def _op(self, scene_name: str, scene: Scene, font: Font, ink: str, lines: list[Line]) -> Op:
        return Op.of(
            f"text:{scene_name}",
            f"{self.version}, pillow {pillow_version}",
            text=scene.text,
            font={"file": font.path.name, "family": font.family, "license": font.license},
            sizes=sorted({line.size for line in lines}, reverse=True),
            ink=ink,
            **scene.params,
        )


def _caption(captions: Captions) -> str:
    """The shortest usable caption as one sentence, or ""."""
    usable = usable_captions(captions, CAPTIONS)
    if isinstance(usable, Rejected):
        return ""
    text = min((strip_meta_talk(text) for text in usable.values()), key=len).replace('"', "'")
    return text if text[-1] in ".!?" else f"{text}."


def _instruction(name: str, scene: Scene, font: Font, ink: str, rng: np.random.Generator) -> Phrasing:
    words = {**scene.words, "letters": f"{font.look} letters in {ink}"}
    firsts = {f"{key}_first": value[:1].upper() + value[1:] for key, value in words.items()}
    return phrase("text_render", name, rng, VARIANTS, **words, **firsts)


def _beyond(boxes: list[Box], canvas: np.ndarray) -> float:
    """By how many pixels the boxes stand out of the picture."""
    height, width = canvas.shape[:2]
    return max(max(-x0, -y0, x1 - width, y1 - height) for x0, y0, x1, y1 in boxes)
