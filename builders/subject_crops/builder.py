"""subject_1, subject_2, subject_3: references of things and the photograph that shows them; extract: the way back.

Streams `subject_k`: `input_1.jpg` ... `output.jpg`, where the target is always the photograph as it is. A reference
comes from the target itself or, with `record.pairs`, from another photograph of the same subject. Of the references
that come from the target, at most half in any one sample are the identical crop, hence also in any corpus.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveInt, field_validator

from builders.annotators.entities import box_iou
from builders.annotators.grabcut import GrabCut
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
    joint_rights,
)
from builders.captions import usable_captions
from builders.edit_pairs.things import MaskFinder, name_alone
from builders.subject_crops.acceptance import (
    Subject,
    SubjectRules,
    accept,
    covered,
    refused_kind,
    whole_pixels,
)
from builders.subject_crops.backgrounds import PLAIN
from builders.subject_crops.described import about, describe, scores_of
from builders.subject_crops.forms import CROP, FORMS, PHOTO, Reference, extracted, make_reference, possible_forms
from builders.subject_crops.sentences import CAPTION_MIX, FILE, Mention, instruct
from builders.subject_crops.words import pointers
from builders.templates import phrase
from filters.scorers.phash import gray_thumbnail, phash
from schemas.codec import encode_jpeg
from schemas.instructions import lint_instruction
from schemas.records import Entity, ImageRecord, Op, Pair

Stream = Literal["subject_1", "subject_2", "subject_3", "extract"]
WEIGHTS = {"crop": 1.0, "augmented": 2.0, "cutout": 2.0, "scene": 2.0, "group": 1.0, "photo": 1.0}
PAIR = "pair"  # attempts of record.pairs; they make samples of subject_1
_TOO_CLOSE = 0.6  # overlap of two subjects' boxes, for them to be one thing
_WHITE_FIRST = 0.6


class SubjectCropsParams(BuilderParams):
    """The `subject_crops` section of a recipe.

    Args:
        per_image: how many samples of each stream to try on an image; a stream that is left out is not made.
        pairs: make a subject_1 sample of every pair of photographs, and use them in subject_2 and subject_3.
        forms: weights of the forms of references; `photo` only comes from other photographs.
        accept: rules for subjects.
        segment_boxes: cut entities that come without a mask out of their box (GrabCut).
    """

    per_image: dict[Stream, PositiveInt] = Field(
        default={"subject_1": 2, "subject_2": 1, "subject_3": 1, "extract": 1}, min_length=1
    )
    pairs: bool = True
    forms: Weights = Field(default_factory=lambda: dict(WEIGHTS))
    accept: SubjectRules = SubjectRules()
    segment_boxes: bool = True

    @field_validator("forms")
    @classmethod
    def _forms_are_known(cls, forms: Weights) -> Weights:
        if not set(check_names(forms, FORMS, "form of a reference")) - {CROP, PHOTO}:
            raise ValueError("crop and photo alone are not enough: at most half of the references are identical crops")
        return forms


@dataclass(frozen=True)
class _Shot:
    """A subject of the target, as another photograph shows it, or the target itself (`pair` is None)."""

    image: SourceImage
    subject: Subject
    target: Entity
    pair: Pair | None = None


class SubjectCrops(Builder):
    """An attempt is a stream, or `pair`, and a number: of an entity, a pair or, with several subjects, a try."""

    name: ClassVar[str] = "subject_crops"
    version: ClassVar[str] = "1"
    Params: ClassVar[type[BuilderParams]] = SubjectCropsParams
    params: SubjectCropsParams

    def __init__(self, params: SubjectCropsParams) -> None:
        super().__init__(params)
        self.masks, self.masks_of_others = (MaskFinder(GrabCut() if params.segment_boxes else None) for _ in range(2))

    def attempts(self, record: ImageRecord, rng: np.random.Generator) -> list[str]:
        names = []
        for stream, count in self.params.per_image.items():
            numbers = self._numbers(record, stream, rng)
            names += [f"{stream}-{n}" for n in numbers[:count]]
        if self.params.pairs and "subject_1" in self.params.per_image:
            names += [f"{PAIR}-{n}" for n in range(len(record.pairs))]
        return names

    def _numbers(self, record: ImageRecord, stream: Stream, rng: np.random.Generator) -> list[int]:
        """Of entities, those with a mask first; or, where a sample has several of them, of tries."""
        count = len(record.entities)
        if stream in ("subject_2", "subject_3"):
            return list(range(self.params.per_image[stream])) if count >= int(stream[-1]) else []
        drawn = sorted(map(int, rng.permutation(count)), key=lambda i: not record.entities[i].mask)
        # A target has to be better than an input: it is not cut out of a mere box.
        return [i for i in drawn if record.entities[i].mask] if stream == "extract" else drawn

    def build(self, image: SourceImage, attempt: str, rng: np.random.Generator) -> Outcome:
        kind, number = attempt.rsplit("-", 1)
        if kind == "extract":
            return self._extract(image, int(number), rng)
        if kind == PAIR:
            shots = self._paired(image, image.record.pairs[int(number)])
        elif kind == "subject_1":
            shots = self._own(image, int(number))
        else:
            shots = self._several(image, int(kind[-1]), rng)
        if isinstance(shots, Rejected):
            return shots
        return self._subjects(image, shots, int(number), rng)

    def _own(self, image: SourceImage, number: int) -> list[_Shot] | Rejected:
        subject = accept(image, number, self.masks, self.params.accept)
        if isinstance(subject, Rejected):
            return about(subject, image.record.entities[number])
        return [_Shot(image, subject, subject.entity)]

    def _paired(self, image: SourceImage, pair: Pair) -> list[_Shot] | Rejected:
        """The subject in the other photograph. Its rules of shape do not matter where the whole photograph is shown."""
        other, entity = _other(image, pair), image.record.entities[pair.entity]
        if other.record.split != image.record.split:
            return about(Rejected("other_split", detail=other.record.split), entity)
        theirs = other.record.entities[pair.other_entity]
        for record, thing in ((image.record, entity), (other.record, theirs)):
            if (refused := refused_kind(thing, record, self.params.accept)) is not None:
                return about(refused, thing)
        if _is_copy(image, entity, other, theirs):
            return about(Rejected("copy"), entity)
        subject = accept(other, pair.other_entity, self.masks_of_others, self.params.accept)
        if isinstance(subject, Rejected):
            size = (other.record.height, other.record.width)
            subject = Subject(pair.other_entity, theirs, whole_pixels(theirs.box, size), None, "", subject)
        return [_Shot(other, subject, entity, pair)]

    def _several(self, image: SourceImage, count: int, rng: np.random.Generator) -> list[_Shot] | Rejected:
        """Accepted subjects that are not one thing, in random order, each from another photograph if there is one."""
        refused: dict[str, str] = {}
        subjects = []
        for number, entity in enumerate(image.record.entities):
            subject = accept(image, number, self.masks, self.params.accept)
            if isinstance(subject, Rejected):
                refused[entity.phrase] = subject.reason
            else:
                subjects.append(subject)
        possible = [
            group
            for group in combinations(subjects, count)
            if all(box_iou(a.box, b.box) <= _TOO_CLOSE for a, b in combinations(group, 2))
        ]
        if not possible:
            return Rejected("too_few_subjects", len(subjects), json.dumps(refused, sort_keys=True))
        group = possible[int(rng.integers(len(possible)))]
        return [self._best_shot(image, group[i]) for i in rng.permutation(count)]

    def _best_shot(self, image: SourceImage, subject: Subject) -> _Shot:
        for pair in image.record.pairs if self.params.pairs else ():
            if pair.entity == subject.number:
                shots = self._paired(image, pair)
                if not isinstance(shots, Rejected):
                    return shots[0]
        return _Shot(image, subject, subject.entity)

    def _subjects(self, image: SourceImage, shots: Sequence[_Shot], number: int, rng: np.random.Generator) -> Outcome:
        references = self._references(shots, rng)
        if isinstance(references, Rejected):
            return references
        mentions = _mentions(image.record, shots, references, rng)
        if isinstance(mentions, Rejected):
            return mentions
        captions = usable_captions(image.record.captions, CAPTION_MIX)
        wording, withheld = instruct(mentions, {} if isinstance(captions, Rejected) else captions, rng)
        stream = f"subject_{len(shots)}"
        is_cross = any(shot.pair is not None for shot in shots)
        record = draft(
            image.record,
            stream,
            "cross_image" if is_cross else "in_image",
            *_ops_of_others(image, shots),
            Op.of(self.name, self.version, withheld=withheld, masks=[shot.subject.origin for shot in shots]),
            variant=number,
            **vars(wording),
            input_roles=("reference",) * len(shots),
            real_input=all(reference.form in (CROP, PHOTO) for reference in references),
            references=json.dumps(
                [
                    describe(s.image.record, s.subject.entity, s.subject.box, r.form, r.changes, pair=s.pair)
                    for s, r in zip(shots, references, strict=True)
                ],
                sort_keys=True,
            ),
            scores=scores_of([shot.subject for shot in shots]),
        )
        parents = [image.record, *(shot.image.record for shot in shots if shot.pair is not None)]
        uids = tuple(dict.fromkeys(parent.uid for parent in parents))
        record = record.model_copy(update={**joint_rights(parents), "parents": uids})
        inputs = {f"input_{i}.jpg": reference.jpeg for i, reference in enumerate(references, start=1)}
        return [Sample(record, {**inputs, "output.jpg": image.jpeg})]

    def _references(self, shots: Sequence[_Shot], rng: np.random.Generator) -> list[Reference] | Rejected:
        """One per shot. At most half of those that come from the target are its identical crop."""
        budget = sum(shot.pair is None for shot in shots) // 2
        made = []
        for shot in shots:
            is_cross = shot.pair is not None
            forms = possible_forms(shot.image, shot.subject, is_cross=is_cross)
            allowed = {f: w for f, w in self.params.forms.items() if f in forms and (is_cross or budget or f != CROP)}
            if not allowed:
                return about(shot.subject.why_no_mask or Rejected("no_form"), shot.subject.entity)
            reference = make_reference(shot.image, shot.subject, draw_names(allowed, 1, rng)[0], rng)
            if isinstance(reference, Rejected):
                return about(reference, shot.subject.entity)
            budget -= reference.form == CROP and not is_cross
            made.append(reference)
        return made

    def _extract(self, image: SourceImage, number: int, rng: np.random.Generator) -> Outcome:
        entity = image.record.entities[number]
        subject = accept(image, number, self.masks, self.params.accept)
        if isinstance(subject, Rejected):
            return about(subject, entity)
        if subject.mask is None:
            return about(subject.why_no_mask or Rejected("no_mask"), entity)
        if (hidden := covered(image, subject)) > self.params.accept.covered:
            return about(Rejected("covered", hidden), entity)
        size = (image.record.height, image.record.width)
        named = name_alone(image.record.entities, number, size)
        if named is None or lint_instruction(named[0], 0):
            return about(Rejected("ambiguous_name"), entity)
        colours = [str(name) for name in rng.permutation(list(PLAIN))]
        if rng.random() < _WHITE_FIRST:
            colours = ["white", *(name for name in colours if name != "white")]
        found = extracted(image.pixels, subject.mask, colours)
        if isinstance(found, Rejected):
            return about(found, entity)
        pixels, background = found
        record = draft(
            image.record,
            "extract",
            "subject",
            Op.of(self.name, self.version, thing=named[0], mask=subject.origin, background=background),
            variant=number,
            **vars(phrase(FILE, "extract", rng, thing=named[0], background=background)),
            direction="inverse",
            input_roles=("photo",),
            output_kind="cutout",
            real_output=False,
            scores=scores_of([subject]),
        )
        return [Sample(record, {"input_1.jpg": image.jpeg, "output.jpg": encode_jpeg(pixels)})]


def _other(image: SourceImage, pair: Pair) -> SourceImage:
    """The other photograph of a pair.

    Raises:
        ValueError: it did not come with the image, or one of the two entities does not exist.
    """
    uid, other = image.record.uid, image.others.get(pair.other)
    if other is None:
        raise ValueError(f"{uid} is paired with {pair.other}, which was not read with it")
    for record, number in ((image.record, pair.entity), (other.record, pair.other_entity)):
        if number >= len(record.entities):
            raise ValueError(f"a pair of {uid} names entity {number} of {record.uid}, which has {len(record.entities)}")
    return other


def _mentions(
    target: ImageRecord, shots: Sequence[_Shot], references: Sequence[Reference], rng: np.random.Generator
) -> list[Mention] | Rejected:
    """The subjects in the order in which they are named, which is not that of their references."""
    mentions = []
    for i in map(int, rng.permutation(len(shots))):
        shown, subject = references[i].shown, shots[i].target
        name = pointers(shown, references[i].size)
        if name is None:
            return about(Rejected("ambiguous_reference", len(shown)), subject, form=references[i].form)
        rivals = tuple(entity for entity in target.entities if entity != subject)
        mentions.append(Mention(name, i + 1, subject, rivals, alone=len(shown) == 1))
    return mentions


def _is_copy(image: SourceImage, entity: Entity, other: SourceImage, theirs: Entity) -> bool:
    """Whether both photographs, or both crops, have the same bytes or the same perceptual hash."""
    if image.record.uid == other.record.uid or phash(gray_thumbnail(image.pixels)) == phash(
        gray_thumbnail(other.pixels)
    ):
        return True
    crops = []
    for one, thing in ((image, entity), (other, theirs)):
        x0, y0, x1, y1 = whole_pixels(thing.box, (one.pixels.shape[0], one.pixels.shape[1]))
        crops.append(phash(gray_thumbnail(one.pixels[y0:y1, x0:x1])))
    return crops[0] == crops[1]


def _ops_of_others(image: SourceImage, shots: Sequence[_Shot]) -> list[Op]:
    ops = [op for shot in shots if shot.pair is not None for op in shot.image.record.ops]
    return [op for op in dict.fromkeys(ops) if op not in image.record.ops]
