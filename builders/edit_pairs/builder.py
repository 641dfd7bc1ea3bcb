"""edit: pairs of a photograph and an edit of it, both ways where the way back is true as well.

Stream `edit`: `input_1.jpg`, `output.jpg`, `edit_mask.png`. Most operations work without weights; an `inpainter` makes
better ones of some and adds `replace`, an `editor` adds those that follow an instruction. An edit is pasted into the
original pixels, the mask is the set of pixels that were allowed to change, and both sides are encoded from pixels by
the same encoder, so every 8x8 block that is free of the mask decodes identically. The decoded pair is then judged
against what its instruction claims, and by the models under `gates`; what is refused stays in the ledger with all its
scores.

The forward sample has the photograph as its input. The inverse one (add, from remove; move back; bring into focus) has
it as its target, which is the better way round to train on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from builders.annotators.base import Editor, Inpainter
from builders.annotators.editors import (
    DiffusersInpainter,
    EditorParams,
    EditRefused,
    InpainterParams,
    InstructionEditor,
)
from builders.annotators.grabcut import GrabCut
from builders.annotators.inpaint import PatchInpainter
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
from builders.edit_pairs import generative, lettering, looks, objects, whole
from builders.edit_pairs.edit import Edit, Wording
from builders.edit_pairs.gates import EditGates, Verdict, blocks, judge
from builders.edit_pairs.model_gates import Pair, model_gates, within
from builders.edit_pairs.scene import Scene
from builders.edit_pairs.things import MaskFinder
from builders.edit_pairs.wording import plain, say
from builders.templates import load_templates
from builders.text_render.fonts import Font, shipped_fonts
from filters.models import Checkpoint
from schemas.codec import decode_rgb, encode_jpeg, encode_mask
from schemas.instructions import lint_instruction
from schemas.records import ImageRecord, Op

Direction = Literal["forward", "inverse"]
Operation = Callable[[Scene, np.random.Generator], Edit | Rejected]

OBJECT_OPERATIONS: dict[str, Operation] = {
    "remove": objects.remove,
    "move": objects.move,
    "resize": objects.resize,
    "flip": objects.flip,
    "recolor": looks.recolor,
    "attribute": looks.attribute,
    "background": looks.background,
}
TEXT_OPERATIONS = ("text_add", "text_replace")
PICTURE_OPERATIONS: dict[str, Operation] = {"mirror": whole.mirror, "rotate": whole.rotate}
COMPOSE = "compose"
PARTS = ("recolor", "attribute", "text_add", "remove")  # local operations that can be asked for in one breath
WEIGHTS: dict[str, float] = {
    **dict.fromkeys(OBJECT_OPERATIONS, 2.0),
    **dict.fromkeys(TEXT_OPERATIONS, 1.0),
    **dict.fromkeys(PICTURE_OPERATIONS, 0.25),
    COMPOSE: 1.0,
}
REPLACE = "replace"
EDITOR_OPERATIONS: dict[str, Operation] = {
    "material": generative.material,
    "surroundings": generative.surroundings,
    "restyle_scene": generative.restyle_scene,
}
NEEDS = {REPLACE: "inpainter", **dict.fromkeys(EDITOR_OPERATIONS, "editor")}
_WITHOUT_ENTITIES = {*TEXT_OPERATIONS, *PICTURE_OPERATIONS, "restyle_scene"}


class EditPairsParams(BuilderParams):
    """The `edit_pairs` section of a recipe.

    Args:
        operations: which edits, with weights (or a list: equal weights). Those in `NEEDS` need a model.
        per_image: how many different ones are tried on each image.
        directions: forward (the photograph is the input) and inverse (it is the target).
        area: range of an edited thing's share of the picture.
        segment_boxes: cut entities that come without a mask out of their box (GrabCut); otherwise they are left out.
        min_side: images with a shorter side are rejected.
        gates: thresholds of the verdict, and models that check it.
        inpainter: fills holes where the surroundings are not even, too; null: continues even ones without a model.
        editor: follows instructions.
        replacements: groups of things that may stand for each other, by any name.
    """

    operations: Weights = Field(default_factory=lambda: dict(WEIGHTS))
    per_image: int = Field(default=3, ge=1)
    directions: tuple[Direction, ...] = Field(default=("forward", "inverse"), min_length=1)
    area: tuple[float, float] = (0.004, 0.6)
    segment_boxes: bool = True
    min_side: int = Field(default=128, ge=32)
    gates: EditGates = EditGates()
    inpainter: InpainterParams | None = None
    editor: EditorParams | None = None
    replacements: dict[str, tuple[str, ...]] = Field(
        default_factory=lambda: {name: tuple(group) for name, group in load_templates("edit_things").items()}
    )

    @field_validator("operations")
    @classmethod
    def _operations_are_known(cls, operations: Weights) -> Weights:
        return check_names(operations, (*WEIGHTS, *NEEDS), "edit operation")

    @model_validator(mode="after")
    def _models_are_there(self) -> EditPairsParams:
        for name in self.operations:
            if name in NEEDS and getattr(self, NEEDS[name]) is None:
                raise ValueError(
                    f"operation {name!r} needs a model; add `{NEEDS[name]}: {{model: ...}}`, or leave it out"
                )
        return self

    @model_validator(mode="after")
    def _ranges_make_sense(self) -> EditPairsParams:
        if not 0 < self.area[0] < self.area[1] <= 1:
            raise ValueError(f"area {list(self.area)} is not a range inside (0, 1]")
        return self


class EditPairs(Builder):
    """An attempt is the name of an operation; it makes a forward sample, and an inverse one if that is sayable."""

    name: ClassVar[str] = "edit_pairs"
    version: ClassVar[str] = "1"
    Params: ClassVar[type[BuilderParams]] = EditPairsParams
    params: EditPairsParams

    def __init__(self, params: EditPairsParams) -> None:
        super().__init__(params)
        gates = params.gates
        self.inpainter: Inpainter = (
            DiffusersInpainter(params.inpainter) if params.inpainter is not None else PatchInpainter()
        )
        self.editor: Editor | None = InstructionEditor(params.editor) if params.editor is not None else None
        self.model_gates = model_gates(gates.recheck, gates.clip, gates.judge)
        self.masks = MaskFinder(GrabCut() if params.segment_boxes else None)

    @cached_property
    def fonts(self) -> tuple[Font, ...]:
        """Those that text is written in."""
        return shipped_fonts()

    def preflight(self) -> None:
        if {COMPOSE, *TEXT_OPERATIONS} & set(self.params.operations):
            shipped_fonts()
        for name, model in (("inpainter", self.inpainter), ("editor", self.editor)):
            if isinstance(model, DiffusersInpainter | InstructionEditor):
                with within(name):
                    model.preflight()
        for name, gate in self.model_gates.items():
            with within(f"gates.{name}"):
                gate.preflight()

    @property
    def num_gpus(self) -> float:
        """One worker holds all models."""
        p = self.params
        return sum(model.num_gpus for model in (p.inpainter, p.editor, p.gates.recheck, p.gates.clip) if model)

    def attempts(self, record: ImageRecord, rng: np.random.Generator) -> list[str]:
        possible = {n: w for n, w in self.params.operations.items() if record.entities or n in _WITHOUT_ENTITIES}
        return draw_names(possible, self.params.per_image, rng) if possible else []

    def build(self, image: SourceImage, attempt: str, rng: np.random.Generator) -> Outcome:
        side = min(image.pixels.shape[:2])
        if side < self.params.min_side:
            return Rejected("too_small", side, _detail(attempt))
        try:
            edits = self._edits(self._scene(image), attempt, rng)
        except EditRefused as error:
            return Rejected("unsafe_result", 1.0, _detail(attempt, because=str(error)))
        if isinstance(edits, Rejected):
            return replace(edits, detail=_detail(attempt, because=edits.detail))
        edit = merge(edits)
        pair = [encode_jpeg(image.pixels if edit.source is None else edit.source), encode_jpeg(edit.pixels)]
        before, after = (decode_rgb(side) for side in pair)
        verdict = self._judge(before, after, edit, plain([e.forward for e in edits]))
        if verdict.rejected is not None:
            said = {"said": verdict.said} if verdict.said else {}
            return replace(
                verdict.rejected, detail=_detail(attempt, **edit.params, **edit.scores, **verdict.scores, **said)
            )
        wordings = {
            "forward": [e.forward for e in edits],
            "inverse": [e.inverse for e in edits if e.inverse is not None],
        }
        asked = [d for d in self.params.directions if len(wordings[d]) == len(edits)]
        if not asked:
            return Rejected("no_inverse", 0.0, _detail(attempt))
        mask = encode_mask(edit.mask)
        return [
            self._sample(
                image,
                attempt,
                edit,
                verdict,
                direction=direction,
                wordings=wordings[direction],
                members=[*pair, mask],
                rng=rng,
            )
            for direction in asked
        ]

    @cached_property
    def _provenance(self) -> dict[str, dict[str, str]]:
        """`model` and `revision` of the inpainter and of the editor, as far as they are models."""
        models = {"inpainting": self.params.inpainter, "editing": self.params.editor}
        return {name: Checkpoint(params).provenance for name, params in models.items() if params is not None}

    def _scene(self, image: SourceImage) -> Scene:
        # A model can make up what is behind a thing; the gates judge how well.
        surroundings = self.params.gates.surroundings if self.params.inpainter is None else math.inf
        return Scene(image, self.inpainter, self.masks, self.params.area, surroundings, self.editor, **self._provenance)

    def _judge(self, source: np.ndarray, target: np.ndarray, edit: Edit, request: str) -> Verdict:
        """The verdict of the measurements and, if they find no fault, of one model after the other."""
        verdict = judge(source, target, edit.mask, edit.claims, self.params.gates, in_place=edit.in_place)
        pair = Pair(source, target, edit.mask, edit.presences, edit.captions, request)
        for gate in self.model_gates.values():
            if verdict.rejected is None:
                verdict = verdict.with_finding(gate.check(pair))
        return verdict

    def _edits(self, scene: Scene, attempt: str, rng: np.random.Generator) -> list[Edit] | Rejected:
        return self._compose(scene, rng) if attempt == COMPOSE else self._edit(scene, attempt, rng)

    def _edit(self, scene: Scene, name: str, rng: np.random.Generator) -> list[Edit] | Rejected:
        edit = self._operation(name)(scene, rng)
        if isinstance(edit, Rejected):
            return edit
        wordings = [w for w in (edit.forward, edit.inverse) if w is not None]
        if problems := [p for w in wordings for text in w.fields.values() for p in lint_instruction(text, 0)]:
            return Rejected("unusable_name", len(problems), problems[0])
        return [edit]

    def _operation(self, name: str) -> Operation:
        writers = {"text_add": lettering.add_text, "text_replace": lettering.replace_text}
        if name in writers:
            return partial(writers[name], fonts=self.fonts)
        if name == REPLACE:
            return partial(generative.replace_thing, groups=self.params.replacements)
        return (OBJECT_OPERATIONS | PICTURE_OPERATIONS | EDITOR_OPERATIONS)[name]

    def _compose(self, scene: Scene, rng: np.random.Generator) -> list[Edit] | Rejected:
        """Two edits of the photograph that share no 8x8 block, each of which holds on its own."""
        found: list[Edit] = []
        for name in rng.permutation(PARTS):
            edits = self._edit(scene, str(name), rng)
            if isinstance(edits, Rejected):
                continue
            (edit,) = edits
            alone = judge(scene.pixels, edit.pixels, edit.mask, edit.claims, self.params.gates)
            apart = not any((blocks(edit.mask) & blocks(other.mask)).any() for other in found)
            if alone.rejected is None and apart:
                found.append(edit)
            if len(found) == 2:
                return found
        return Rejected("nothing_to_compose", len(found))

    def _sample(
        self,
        image: SourceImage,
        attempt: str,
        edit: Edit,
        verdict: Verdict,
        *,
        direction: Direction,
        wordings: list[Wording],
        members: list[bytes],
        rng: np.random.Generator,
    ) -> Sample:
        before, after, mask = members
        forward = direction == "forward"
        assert verdict.measure is not None
        subtask = attempt if forward else edit.inverse_subtask or attempt
        photograph_used = edit.source is None
        record = draft(
            image.record,
            "edit",
            subtask,
            Op.of(f"edit_{attempt}", self.version, **edit.params).model_copy(update=edit.model),
            variant=int(not forward),
            **vars(say(wordings, rng)),
            direction=direction,
            input_roles=("edit_source",),
            real_input=forward and photograph_used,
            real_output=not forward and photograph_used,
            edit_source_index=0 if edit.in_place else -1,
            edit_area_ratio=round(float(edit.mask.mean()), 6),
            aligned=edit.in_place and verdict.measure.aligned,
            align=verdict.measure.align,
            change=verdict.measure.change,
            scores=json.dumps({**verdict.scores, **_rounded(edit.scores)}, sort_keys=True),
        )
        source, target = (before, after) if forward else (after, before)
        return Sample(record, {"input_1.jpg": source, "output.jpg": target, "edit_mask.png": mask})


def merge(edits: list[Edit]) -> Edit:
    """Edits of one photograph with disjoint masks as one edit."""
    first, *rest = edits
    for other in rest:
        first = replace(
            first,
            pixels=np.where(other.mask[..., None], other.pixels, first.pixels),
            mask=first.mask | other.mask,
            claims=(*first.claims, *other.claims),
            params={"first": first.params, "second": other.params},
            scores=first.scores | other.scores,
            inverse_subtask="",
            presences=(*first.presences, *other.presences),
            captions=None,
            model=first.model | other.model,
        )
    return first


def _detail(attempt: str, **measured: Any) -> str:
    return json.dumps({"operation": attempt, **_rounded(measured)}, sort_keys=True)


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}
