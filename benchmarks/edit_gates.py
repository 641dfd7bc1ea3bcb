"""How well the gates of edit pairs find planted faults, and how fast pairs are made.

    python benchmarks/edit_gates.py --photos DIR [--operations remove recolor ...] [--repeats 2]

`DIR` holds photographs and `manifest.jsonl`, as recipes/demo/collect_photos.py writes them. Every operation is tried on
every photograph. Each pair that is accepted is judged again with a fault planted in it; a fault that the gates let
pass is a miss. The table gives the recall per fault, and the share of the right pairs, judged once more after a
re-encoding at the same settings, that are refused (false rejects). Then pairs per second and the funnel by operation.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from builders.base import Rejected, SourceImage
from builders.edit_pairs import EditPairs, EditPairsParams
from builders.edit_pairs.builder import COMPOSE, WEIGHTS, merge
from builders.edit_pairs.claims import Claim, Coloured, Moved, Placed, Shifted
from builders.edit_pairs.colour import PAINTS
from builders.edit_pairs.edit import Edit
from builders.edit_pairs.gates import EditGates, judge
from builders.edit_pairs.scene import Scene
from schemas.codec import decode_rgb, encode_jpeg
from schemas.identity import generator, uid_of
from schemas.records import Entity, ImageRecord

MAX_PIXELS = 512 * 512
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top", "upper": "lower", "lower": "upper"}


@dataclass(frozen=True)
class Pair:
    """A decoded pair with what it claims."""

    source: np.ndarray
    target: np.ndarray
    mask: np.ndarray
    claims: tuple[Claim, ...]
    in_place: bool

    def is_refused(self) -> bool:
        return (
            judge(self.source, self.target, self.mask, self.claims, EditGates(), in_place=self.in_place).rejected
            is not None
        )


def _half_done(pair: Pair) -> Pair | None:
    _, columns = np.nonzero(pair.mask)
    done = np.arange(pair.mask.shape[1]) < np.median(columns)
    return replace(pair, target=np.where(done[None, :, None], pair.target, pair.source)) if pair.in_place else None


def _drift(pair: Pair) -> Pair | None:
    moved = np.clip(pair.target.astype(int) + np.array([3, -2, 2]), 0, 255).astype(np.uint8)
    return replace(pair, target=np.where(pair.mask[..., None], pair.target, moved)) if pair.in_place else None


def _shift(pixels: int) -> Callable[[Pair], Pair | None]:
    def plant(pair: Pair) -> Pair | None:
        moved = cv2.copyMakeBorder(pair.target, 0, 0, pixels, 0, cv2.BORDER_REPLICATE)[:, : pair.target.shape[1]]
        return replace(pair, target=moved) if pair.in_place else None

    return plant


def _claims(pair: Pair, change: Callable[[Claim], Claim]) -> Pair | None:
    changed = tuple(change(claim) for claim in pair.claims)
    return replace(pair, claims=changed) if any(a is not b for a, b in zip(changed, pair.claims, strict=True)) else None


def _other_colour(claim: Claim) -> Claim:
    if not isinstance(claim, Coloured):
        return claim
    names = list(PAINTS)
    known = names.index(claim.colour) if claim.colour in names else 0
    return replace(claim, colour=names[(known + 4) % len(names)])


def _other_side(claim: Claim) -> Claim:
    if not isinstance(claim, Placed | Moved):
        return claim
    return replace(claim, word=" ".join(OPPOSITE.get(word, word) for word in claim.word.split()))


def _other_way(claim: Claim) -> Claim:
    return replace(claim, sign=-claim.sign) if isinstance(claim, Shifted) else claim


def _lossy_mask(pair: Pair) -> Pair | None:
    """The mask through JPEG and with its polarity the other way round."""
    inverted = np.where(pair.mask, 0, 255).astype(np.uint8)[..., None].repeat(3, axis=2)
    return replace(pair, mask=_recompressed(inverted)[..., 0] > 127) if pair.in_place else None


FAULTS: dict[str, Callable[[Pair], Pair | None]] = {
    "identity (target is the source)": lambda p: replace(p, target=p.source),
    "swapped pair": lambda p: replace(p, source=p.target, target=p.source) if p.claims and p.in_place else None,
    "shifted by 1 px": _shift(1),
    "shifted by 2 px": _shift(2),
    "shifted by 3 px": _shift(3),
    "colour drift outside (2-3 levels)": _drift,
    "whole target as JPEG q75": lambda p: replace(p, target=_recompressed(p.target)) if p.in_place else None,
    "half done": _half_done,
    "wrong colour noun": lambda p: _claims(p, _other_colour),
    "left/right, top/bottom error": lambda p: _claims(p, _other_side),
    "darker for brighter, muted for vivid": lambda p: _claims(p, _other_way),
    "mask inverted, as JPEG": _lossy_mask,
}


def _recompressed(image: np.ndarray) -> np.ndarray:
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 75])
    return decode_rgb(data.tobytes())[..., ::-1]  # both ends take BGR for RGB, so the channels come back as they were


def load_photos(folder: Path) -> Iterator[SourceImage]:
    for line in (folder / "manifest.jsonl").read_text().splitlines():
        row = json.loads(line)
        pixels = decode_rgb((folder / row["image"]).read_bytes())
        scale = min(1.0, (MAX_PIXELS / pixels[..., 0].size) ** 0.5)
        pixels = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        entities = [
            Entity.model_validate({**e, "box": [side * scale for side in e["box"]]})
            for e in row.get("entities", [])
            if not isinstance(e.get("mask"), list)
        ]
        jpeg = encode_jpeg(pixels)
        height, width = pixels.shape[:2]
        yield SourceImage(ImageRecord(uid=uid_of(jpeg), width=width, height=height, entities=tuple(entities)), jpeg)


def make_edits(builder: EditPairs, image: SourceImage, name: str, seed: int) -> list[Edit] | Rejected:
    params = builder.params
    scene = Scene(image, builder.inpainter, builder.masks, params.area, params.gates.surroundings)
    rng = generator(seed, f"{image.record.uid}/{name}", builder.name)
    return builder._compose(scene, rng) if name == COMPOSE else builder._edit(scene, name, rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--operations", nargs="+", default=list(WEIGHTS), choices=list(WEIGHTS))
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    builder = EditPairs(EditPairsParams(per_image=len(WEIGHTS)))
    found: dict[str, Counter[bool]] = defaultdict(Counter)
    funnel: dict[str, Counter[str]] = defaultdict(Counter)
    seconds: dict[str, float] = defaultdict(float)
    for image in load_photos(args.photos):
        possible = builder.attempts(image.record, np.random.default_rng(0))
        for name in (n for n in args.operations if n in possible):
            for seed in range(args.repeats):
                start = time.perf_counter()
                outcome = make_edits(builder, image, name, seed)
                pair = None if isinstance(outcome, Rejected) else _decoded(image, merge(outcome))
                verdict = (
                    outcome.reason
                    if isinstance(outcome, Rejected)
                    else "refused"
                    if pair and pair.is_refused()
                    else "kept"
                )
                seconds[name] += time.perf_counter() - start
                funnel[name][verdict] += 1
                if pair is None or verdict != "kept":
                    continue
                again = [decode_rgb(encode_jpeg(p)) for p in (pair.source, pair.target)]
                found["(right pair, re-encoded)"][replace(pair, source=again[0], target=again[1]).is_refused()] += 1
                for fault, plant in FAULTS.items():
                    planted = plant(pair)
                    if planted is not None:
                        found[fault][planted.is_refused()] += 1
    report(found, funnel, seconds)


def _decoded(image: SourceImage, edit: Edit) -> Pair:
    pair = [decode_rgb(encode_jpeg(p)) for p in (image.pixels if edit.source is None else edit.source, edit.pixels)]
    return Pair(pair[0], pair[1], edit.mask, edit.claims, edit.in_place)


def report(found: dict[str, Counter[bool]], funnel: dict[str, Counter[str]], seconds: dict[str, float]) -> None:
    print("| planted fault | pairs | refused |\n|---|---:|---:|")
    for fault, counts in found.items():
        print(f"| {fault} | {counts.total()} | {counts[True] / counts.total():.1%} |")
    print("\n| operation | tried | kept | s per try | kept pairs/s | refused because |\n|---|---:|---:|---:|---:|---|")
    for name, fates in funnel.items():
        kept, tried = fates["kept"], fates.total()
        reasons = ", ".join(f"{reason} {n}" for reason, n in fates.most_common() if reason != "kept")
        print(f"| {name} | {tried} | {kept} | {seconds[name] / tried:.2f} | {kept / seconds[name]:.2f} | {reasons} |")


if __name__ == "__main__":
    main()
