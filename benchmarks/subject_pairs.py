"""How well embeddings of crops tell one subject from another, and what a global pass over them costs.

    python benchmarks/subject_pairs.py build/demo/photos --out build/pairs

uses the demo photographs, in which eight things are seen in several photographs each, and writes `subject_pairs.json`
and `subject_pairs.png`: cosines of crops of one subject, of strangers with one noun and with another, and of altered
copies of one crop. The scale of the pass is measured on random unit vectors.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from builders.annotators.crop_features import CropFeatures, CropFeaturesParams, read_features, square_crop
from builders.base import SourceImage
from filters.pairs import BANDS, CROPS, choose, match
from filters.scorers.base import ScorerInput
from filters.scorers.features import Features, FeaturesParams
from filters.scorers.phash import gray_thumbnail, phash
from pipelines.images import normalise, transform_geometry
from schemas.codec import decode_rgb, encode_png
from schemas.pairs import Pairing
from schemas.records import Captions, Entity, ImageRecord

MAX_PIXELS = 1 << 20
COPIES = ("jpeg 40", "half size", "mirrored", "brighter", "without a tenth", "turned by 5 degrees")


def photographs(folder: Path) -> Iterator[SourceImage]:
    for line in (folder / "manifest.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        image = normalise((folder / row["image"]).read_bytes(), MAX_PIXELS)
        entities, _ = transform_geometry(tuple(Entity(**e) for e in row.get("entities", ())), b"", image)
        scene = row.get("scene_id") or row["image"]
        record = ImageRecord(
            uid=row["image"], width=image.width, height=image.height, entities=entities, scene_id=scene
        )
        yield SourceImage(record, image.data)


def separation(images: list[SourceImage], crop: Literal["box", "mask"]) -> dict[str, np.ndarray]:
    """Cosines by kind of pair; pairs of one photograph, and of one scene unless it is one subject, are left out."""
    found = CropFeatures(CropFeaturesParams(crop=crop)).annotate(images)
    entities = [
        (image.record, about) for image, one in zip(images, found, strict=True) for about in one.data["entities"]
    ]
    vectors = np.concatenate([read_features(one) for one in found if one.members]).astype(np.float32)
    kinds: dict[str, list[float]] = {"same subject": [], "strangers, same noun": [], "strangers": []}
    for i, (record, about) in enumerate(entities):
        for j, (other, about_other) in enumerate(entities[:i]):
            vouched = about["subject_id"] != "" and about["subject_id"] == about_other["subject_id"]
            if record.uid == other.uid or (record.scene_id == other.scene_id and not vouched):
                continue
            same_noun = about["noun"] == about_other["noun"]
            kind = "same subject" if vouched else "strangers, same noun" if same_noun else "strangers"
            kinds[kind].append(float(vectors[i] @ vectors[j]))
    return {kind: np.array(values) for kind, values in kinds.items()}


def copies(images: list[SourceImage]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of a crop and an altered copy of it, by alteration: the cosine, and the bits in which their hashes differ."""
    crops = [square_crop(image.pixels, entity, False) for image in images for entity in image.record.entities]
    scorer = Features(FeaturesParams())

    def embed(pictures: list[np.ndarray]) -> np.ndarray:
        rows = scorer.score([ScorerInput("", encode_png(picture), Captions()) for picture in pictures])
        return np.stack([row["features_embedding"] for row in rows]).astype(np.float32)

    before, found = embed(crops), {}
    for name in COPIES:
        altered = [alter(crop, name) for crop in crops]
        bits = [hash_distance(crop, copy) for crop, copy in zip(crops, altered, strict=True)]
        found[name] = np.einsum("nd,nd->n", before, embed(altered)), np.array(bits)
    return found


def hash_distance(crop: np.ndarray, copy: np.ndarray) -> int:
    """The smaller number of bits, mirrored or not, as `filters.pairs` has it."""
    one, two = gray_thumbnail(crop), gray_thumbnail(copy)
    return min((phash(one) ^ phash(other)).bit_count() for other in (two, two[:, ::-1]))


def alter(crop: np.ndarray, how: str) -> np.ndarray:
    side = len(crop)
    alterations = {
        "jpeg 40": lambda: decode_rgb(
            cv2.imencode(".jpg", crop[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 40])[1].tobytes()
        ),
        "half size": lambda: cv2.resize(crop, (side // 2, side // 2), interpolation=cv2.INTER_AREA),
        "mirrored": lambda: np.ascontiguousarray(crop[:, ::-1]),
        "brighter": lambda: cv2.convertScaleAbs(crop, alpha=1.15, beta=10),
        "without a tenth": lambda: np.ascontiguousarray(crop[: side - side // 10, : side - side // 10]),
        "turned by 5 degrees": lambda: cv2.warpAffine(
            crop, cv2.getRotationMatrix2D((side / 2, side / 2), 5, 1), (side, side), borderMode=cv2.BORDER_REPLICATE
        ),
    }
    return alterations[how]()


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Chance that a pair of one subject is more alike than a pair of strangers."""
    return float((positive[:, None] > negative).mean() + (positive[:, None] == negative).mean() / 2)


def scale(crops: int, nouns: int, width: int) -> dict[str, Any]:
    """Seconds and memory of `match` and `choose` over random crops, a fifth of them with a near twin."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((crops, width)).astype(np.float32)
    twins = crops // 5
    vectors[:twins] = 0.8 * vectors[-twins:] + 0.6 * vectors[:twins]
    noun = rng.integers(0, nouns, crops)
    noun[:twins] = noun[-twins:]
    ids = [f"{i:012x}" for i in range(crops)]
    hashes = rng.integers(0, 2**64, (4, crops), dtype=np.uint64)
    columns = {
        **{"unit": ["u"] * crops, "row": np.arange(crops), "uid": ids, "entity": np.zeros(crops, np.int32)},
        **{
            "noun": [f"noun {n}" for n in noun],
            "subject_id": [""] * crops,
            "scene_id": ids,
            "split": ["train"] * crops,
        },
        **dict(zip(("phash", "phash_mirror", "crop_phash", "crop_phash_mirror"), hashes, strict=True)),
    }
    table, rules = pa.table(columns, schema=CROPS), Pairing()
    start = time.perf_counter()
    candidates = match(table, vectors.astype(np.float16), rules, BANDS["efficientnet-lite0"])
    matched = time.perf_counter()
    chosen = choose(candidates, rules)
    chose = time.perf_counter()
    pairs = chosen["reason"].to_pylist().count("")
    return {
        "crops": crops,
        "nouns": nouns,
        "candidates": len(candidates),
        "pairs": pairs,
        "match_s": round(matched - start, 1),
        "choose_s": round(chose - matched, 1),
        "crops_per_s": round(crops / (chose - start)),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def draw(kinds: dict[str, np.ndarray], altered: dict[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    figure = Figure(figsize=(8, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    bins = np.linspace(0, 1, 51).tolist()
    for name, values in {
        **kinds,
        "copies of one crop": np.concatenate([cosine for cosine, _ in altered.values()]),
    }.items():
        weights = np.full(len(values), 1 / len(values))
        axes.hist(values, bins, weights=weights, alpha=0.5, label=f"{name} ({len(values):,})")
    for edge in BANDS["efficientnet-lite0"]:
        axes.axvline(edge, color="black", linewidth=1)
    axes.set_xlabel("cosine of two crops (EfficientNet-Lite0); lines: the band")
    axes.set_ylabel("share of the pairs")
    axes.legend()
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="from recipes/demo/collect_photos.py")
    parser.add_argument("--out", type=Path, default=Path("build/pairs"))
    parser.add_argument("--crops", type=int, nargs="*", default=[10_000, 100_000])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    images = list(photographs(arguments.photos))
    start = time.perf_counter()
    by_crop = {"box": separation(images, "box"), "mask": separation(images, "mask")}
    seconds = (time.perf_counter() - start) / 2
    altered = copies(images)
    low, high = BANDS["efficientnet-lite0"]
    report: dict[str, Any] = {"entities": sum(len(i.record.entities) for i in images), "embed_s": round(seconds, 1)}
    for crop, kinds in by_crop.items():
        same, noun, others = kinds.values()
        report[crop] = {
            "same": [len(same), *np.round(np.quantile(same, (0.05, 0.5, 0.95)), 3).tolist()],
            "same_noun": [len(noun), *np.round(np.quantile(noun, (0.5, 0.95, 1)), 3).tolist()],
            "auc": round(auc(same, np.concatenate([noun, others])), 4),
            "auc_same_noun": round(auc(same, noun), 4),
            "recall": round(float(((same >= low) & (same <= high)).mean()), 3),
            "strangers_in_band": int(((noun >= low) & (noun <= high)).sum()),
        }
    report["copies"] = {
        name: {
            "cosine": np.round(np.quantile(cosine, (0.05, 0.5)), 3).tolist(),
            "refused_by_hash": round(float((bits <= Pairing().radius).mean()), 3),
            "refused": round(float(((bits <= Pairing().radius) | (cosine > high)).mean()), 3),
        }
        for name, (cosine, bits) in altered.items()
    }
    draw(by_crop["box"], altered, arguments.out / "subject_pairs.png")
    report["scale"] = [scale(count, 200, 1280) for count in arguments.crops]
    (arguments.out / "subject_pairs.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
