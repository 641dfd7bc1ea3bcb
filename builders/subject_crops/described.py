"""What a sample record says of its references and their subjects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from builders.base import Rejected
from builders.subject_crops.acceptance import Box, Subject
from schemas.records import UNKNOWN, Entity, ImageRecord, Pair


def describe(
    record: ImageRecord, entity: Entity, box: Box, form: str, changes: dict[str, Any], *, pair: Pair | None = None
) -> dict[str, Any]:
    """An entry of `SampleRecord.references`, one per input; `record` is of the photograph that the reference shows."""
    x0, y0, x1, y1 = box
    return {
        "phrase": entity.phrase,
        "label": entity.label,
        "form": form,
        "box": [x0, y0, x1, y1],
        "area": round((x1 - x0) * (y1 - y0) / (record.height * record.width), 4),
        "scene_id": record.scene_id,
        "uid": record.uid,
        "pair": "in" if pair is None else "cross",
        "similarity": UNKNOWN if pair is None else pair.similarity,
        "evidence": "" if pair is None else pair.evidence,
        "augmentations": changes,
    }


def scores_of(subjects: Sequence[Subject]) -> str:
    """`SampleRecord.scores`: what was measured on each subject, numbered where there are several."""
    scores = {
        f"{name}_{i}" if len(subjects) > 1 else name: round(value, 4)
        for i, subject in enumerate(subjects, start=1)
        for name, value in subject.scores.items()
    }
    return json.dumps(scores, sort_keys=True)


def about(rejected: Rejected, entity: Entity, **more: Any) -> Rejected:
    """The refusal with the name of the thing that it is about."""
    because = {"because": rejected.detail} if rejected.detail else {}
    return replace(rejected, detail=json.dumps({"thing": entity.phrase, **because, **more}, sort_keys=True))
