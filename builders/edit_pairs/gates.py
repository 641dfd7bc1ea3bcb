"""Judges an edit on its decoded pair, region by region: nothing changed outside, something did inside, as was said.

Every measurement is kept, of rejected pairs too: they are the material for thresholds and for preference pairs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from pydantic import Field

from builders.alignment import MAX_SHIFT, PairMeasure, measure_pair
from builders.base import BuilderParams, Rejected
from builders.edit_pairs.claims import Claim, Finding
from builders.edit_pairs.model_gates import DirectionParams, JudgeParams, RecheckParams

BLOCK = 8  # JPEG's
_CHANGED = 8  # of 255: what is visible side by side


class EditGates(BuilderParams):
    """Thresholds of the `edit_pairs` section.

    Args:
        change: least mean absolute difference inside the mask, of 255.
        changed_share: least share of the mask's pixels that change visibly (by 8 of 255).
        leak: largest share of the 8x8 blocks without any pixel of the mask that decode differently.
        surroundings: how far the colours around a hole may be from a smooth gradient (CIE76), for it to be filled
            without a model.
        recheck: a detector that looks for what was removed or put in.
        clip: a CLIP model that compares the change of the picture with the change of its caption.
        judge: a vision-language model that rates every pair.
    """

    change: float = Field(default=6.0, ge=0)
    changed_share: float = Field(default=0.35, ge=0, le=1)
    leak: float = Field(default=0.0, ge=0, le=1)
    surroundings: float = Field(default=6.5, gt=0)
    recheck: RecheckParams | None = None
    clip: DirectionParams | None = None
    judge: JudgeParams | None = None


@dataclass(frozen=True)
class Verdict:
    """What was measured on a pair, and why it is refused, if it is. `said` is what a judge wrote about it."""

    measure: PairMeasure | None
    scores: dict[str, float]
    rejected: Rejected | None
    said: str = ""

    def with_finding(self, finding: Finding) -> Verdict:
        """The verdict after one more finding."""
        rejected = Rejected(finding.fault, finding.value) if finding.fault else self.rejected
        return Verdict(self.measure, self.scores | finding.scores, rejected, finding.said or self.said)


def judge(
    source: np.ndarray,
    target: np.ndarray,
    mask: np.ndarray,
    claims: Sequence[Claim] = (),
    gates: EditGates | None = None,
    *,
    in_place: bool = True,
) -> Verdict:
    """Judge a decoded pair.

    Args:
        source, target: uint8 RGB [H, W, 3].
        mask: boolean [H, W], True where they may differ.
        claims: what the instruction says.
        gates: thresholds.
        in_place: false for an edit that moves the whole picture: only change and claims are judged then.
    """
    gates = gates or EditGates()
    if not source.shape == target.shape == (*mask.shape, 3):
        sizes = {"source_height": source.shape[0], "target_height": target.shape[0], "mask_height": mask.shape[0]}
        return Verdict(None, sizes, _refuse("size_change", target.shape[0] / source.shape[0], sizes))
    measure = measure_pair(source, target, mask)
    scores = {**measure.align.model_dump(), **measure.change.model_dump(), "leak": leak(source, target, mask)}
    scores |= {"area": float(mask.mean()), "changed_share": _changed_share(source, target, mask)}
    findings = [claim.check(source, target) for claim in claims]
    for finding in findings:
        scores |= finding.scores
    scores = {name: round(float(value), 4) for name, value in scores.items()}
    faults = [
        ("no_op", scores["l1_inside"], scores["l1_inside"] < gates.change),
        ("no_op", scores["changed_share"], scores["changed_share"] < gates.changed_share),
        ("misaligned", scores["shift_px"], in_place and scores["shift_px"] > MAX_SHIFT),
        ("leak", scores["leak"], scores["leak"] > gates.leak),
        ("misaligned", scores["psnr_outside"], in_place and not measure.aligned and not mask.all()),
        *((finding.fault, finding.value, bool(finding.fault)) for finding in findings),
    ]
    for reason, value, is_fault in faults:
        if is_fault:
            return Verdict(measure, scores, _refuse(reason, value, scores))
    return Verdict(measure, scores, None)


def leak(source: np.ndarray, target: np.ndarray, mask: np.ndarray) -> float:
    """Share of the 8x8 blocks free of the mask in which any pixel differs; 0 if there is no such block."""
    differs = cv2.absdiff(source, target).max(axis=2) > 0
    free = ~blocks(mask)
    return float(blocks(differs)[free].mean()) if free.any() else 0.0


def blocks(mask: np.ndarray) -> np.ndarray:
    """Boolean [ceil(H / 8), ceil(W / 8)]: which blocks of JPEG have a pixel of the boolean mask."""
    height, width = (-(-side // BLOCK) * BLOCK for side in mask.shape)
    padded = np.zeros((height, width), bool)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    return np.logical_or.reduce(padded.reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK), axis=(1, 3))


def _changed_share(source: np.ndarray, target: np.ndarray, mask: np.ndarray) -> float:
    changed = cv2.absdiff(source, target).max(axis=2)[mask] >= _CHANGED
    return float(changed.mean()) if changed.size else 0.0


def _refuse(reason: str, value: float, scores: dict[str, float]) -> Rejected:
    return Rejected(reason, float(value), json.dumps(scores, sort_keys=True))
