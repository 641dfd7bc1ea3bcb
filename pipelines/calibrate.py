"""`x2i calibrate`: plant faults into clean photographs, run scorers and rules on them, and count what is caught.

Photographs are divided by scene into two halves: thresholds are suggested by the one and results reported on the
other. Half a scene's pictures in each would make the result look better than it is.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from filters.blocklists import read_blocklist
from filters.calibration import faults, report
from filters.calibration.faults import Fault
from filters.calibration.measure import DEFAULTS, SCORER_OF, Check, Values, check_column, rules_for
from filters.dedup import PerceptualPairs, first_of_equal
from filters.models import ModelMissing
from filters.optout import robots_optout, tdm_optout
from filters.scorers.base import Scorer, ScorerInput
from filters.scorers.registry import SCORERS
from pipelines.images import BadInput, normalise
from pipelines.sources import SourceError, SourceRow, open_reader
from schemas.decide import CanaryList, Decide
from schemas.identity import generator, uid_of
from schemas.recipe import Ingest, Recipe
from schemas.records import Captions
from schemas.sources import FolderSource, ManifestSource

BUILT_IN = ("pixels", "phash", "text", "conse")  # scorers that need no download
DRAWS = 1  # of each fault per photograph
_COLLECT = Path(__file__).parents[1] / "recipes/demo/collect_photos.py"
_CANARY = "x2i-calibration-canary 5c6f0f2e-7c0b-4d9e-9f55-2f0a3f1f8f43"
_USER_AGENTS = FolderSource(name="x", path="x").user_agents
_DIRECTIVES = FolderSource(name="x", path="x").robots_directives

# What servers send. The first five of the refusals are allowed by img2dataset's parser, in one way or another.
REFUSALS: tuple[dict[str, Any], ...] = (
    {"x-robots-tag": "noai, unavailable_after: 25 Jun 2030 15:00:00 PST"},
    {"x-robots-tag": "*: noai"},
    {"x-robots-tag": "none"},
    {"x-robots-tag": "IMG2DATASET: noai"},
    {"x-robots-tag": "unavailable_after: 25 Jun 2030 15:00:00 PST, noai"},
    {"x-robots-tag": "noai"},
    {"x-robots-tag": "NoImageAI"},
    {"x-robots-tag": "index, follow, noimageindex"},
    {"x-robots-tag": "X-Robots-Tag: noindex"},
    {"x-robots-tag": ["all", "googlebot: nofollow", "noai"]},
    {"x-robots-tag": "googlebot: nofollow\nnoai"},
    {"tdm-reservation": "1"},
    {"tdm-reservation": 1},
    {"tdm-reservation": '[{"location": "/*", "tdm-reservation": 1}]'},
)
PERMISSIONS: tuple[dict[str, Any], ...] = (
    {},
    {"x-robots-tag": "all"},
    {"x-robots-tag": "nofollow, noarchive"},
    {"x-robots-tag": "otherbot: noai"},
    {"x-robots-tag": "max-image-preview: large"},
    {"x-robots-tag": "unavailable_after: 25 Jun 2030 15:00:00 PST"},
    {"tdm-reservation": "0"},
    {"tdm-reservation": '[{"location": "/private/*", "tdm-reservation": 1}]'},
)


class CalibrationError(ValueError):
    """Nothing can be measured; says why."""


@dataclass(frozen=True)
class Photo:
    """A clean photograph: source bytes, what ingest makes of it, and the half it is in."""

    source: bytes
    item: ScorerInput
    tunes: bool


_Scored = tuple[Sequence[Photo], Sequence[dict[str, Any]]]


def calibrate(images: Path | None, recipe: Recipe | None, seed: int = 0) -> list[Check]:
    """Measure every filter.

    Args:
        images: folder of clean photographs, with a `manifest.jsonl` or captions in sidecars if there are any; None
            takes those of the demo.
        recipe: its scorers, thresholds and ingest limits are used, else the built-in ones.
        seed: of the faults.

    Raises:
        CalibrationError: too few photographs, or none.
    """
    ingest, rules = (recipe.ingest, recipe.decide) if recipe else (Ingest(), Decide())
    photos = read_photos(images, ingest)
    scorers, missing = _scorers(recipe)
    return [
        *_quality(photos, scorers, missing, rules, seed),
        *_copies(photos, scorers, missing, rules, seed),
        _canary(photos),
        *_bit_rot(photos, ingest, seed),
        _opt_out(),
    ]


def write(checks: Sequence[Check], out: Path) -> list[Path]:
    """`calibration.json`, `calibration.md` and `calibration.png` in a folder."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"calibration.{extension}" for extension in ("json", "md", "png")]
    paths[0].write_text(json.dumps([check.to_json() for check in checks], indent=1, ensure_ascii=False) + "\n")
    paths[1].write_text(report.markdown(checks))
    report.plot(checks, paths[2])
    return [path for path in paths if path.exists()]


def read_photos(images: Path | None, ingest: Ingest) -> list[Photo]:
    """Clean photographs, ingested, in the order of their source; equal files once.

    Raises:
        CalibrationError: fewer than four photographs.
    """
    with tempfile.TemporaryDirectory() as collected:
        folder = images or _collect(Path(collected))
        rows = {uid_of(row.image): row for row in _rows(folder)}
    photos = []
    for uid, row in rows.items():
        try:
            done = normalise(row.image, ingest.max_pixels, max_source_pixels=ingest.max_source_pixels)
        except BadInput:
            continue  # not a clean photograph
        tunes = hashlib.sha256((row.scene_id or uid).encode()).digest()[0] % 2 == 0
        photos.append(Photo(row.image, ScorerInput(uid, done.data, row.captions), tunes))
    if len({photo.tunes for photo in photos}) < 2 or len(photos) < 4:
        raise CalibrationError(f"{folder}: {len(photos)} photograph(s), too few to measure anything; give more")
    return photos


def _rows(folder: Path) -> Iterator[SourceRow]:
    manifest = folder / "manifest.jsonl"
    source = (
        ManifestSource(name="clean", path=str(manifest))
        if manifest.exists()
        else FolderSource(name="clean", path=str(folder))
    )
    reader = open_reader(source, "")
    try:
        for row in reader.read(list(reader.list())):
            if isinstance(row, SourceRow):
                yield row
    except SourceError as error:
        raise CalibrationError(str(error)) from error


def _collect(folder: Path) -> Path:
    """The demo's photographs, from installed packages."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("collect_photos", _COLLECT)
    if not _COLLECT.exists() or spec is None or spec.loader is None:
        raise CalibrationError(f"{_COLLECT} is not there; name a folder of photographs with --images")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.collect(module.read_photos(), folder)
    return folder


def _scorers(recipe: Recipe | None) -> tuple[dict[str, Scorer], dict[str, str]]:
    """The scorers that can run, and for each other one what it lacks."""
    wanted = recipe.scorers() if recipe else {name: SCORERS[name].Params() for name in BUILT_IN}
    ready: dict[str, Scorer] = {}
    missing = {name: f"needs `score: {{{name}: …}}` in a recipe" for name in SCORERS if name not in wanted}
    for name, params in wanted.items():
        scorer = SCORERS[name](params)
        try:
            scorer.preflight()
            ready[name] = scorer
        except ModelMissing as error:
            missing[name] = f"needs a model: {error}"
    return ready, missing


def _quality(
    photos: Sequence[Photo], scorers: dict[str, Scorer], missing: dict[str, str], rules: Decide, seed: int
) -> Iterator[Check]:
    """Faults that a column shows."""
    columns = {column: name for name, scorer in scorers.items() for column in scorer.columns}
    clean: dict[str, list[dict[str, Any]]] = {}
    plans = [(fault.name, fault.severity, partial(_planted, photos, fault, DRAWS, seed)) for fault in faults.QUALITY]
    plans.append(("caption_swap", "the caption of another photograph", partial(_swapped, photos)))
    for name, severity, plan in plans:
        planted = list(plan())
        scored: dict[str, list[dict[str, Any]]] = {}
        for rule in rules_for(name, rules.filters):
            scorer = columns.get(rule.column)
            if scorer is None:
                yield Check(name, severity, rule.column, not_measured=missing[SCORER_OF[rule.column]])
                continue
            if scorer not in clean:
                clean[scorer] = _score(scorers[scorer], [photo.item for photo in photos])
            if scorer not in scored:
                scored[scorer] = _score(scorers[scorer], [photo.item for photo in planted])
            sides: list[_Scored] = [(photos, clean[scorer]), (planted, scored[scorer])]
            if name == "caption_swap":
                sides = [_captioned(side) for side in sides]
            scores = [_column(rows, rule.column) for _, rows in sides]
            tunes = [np.array([photo.tunes for photo in side], bool) for side, _ in sides]
            if all(not half.all() and half.any() for half in tunes):
                yield check_column(name, severity, rule, Values(*scores, *tunes))
            else:
                yield Check(name, severity, rule.column, not_measured="needs photographs with captions")
    for rule in DEFAULTS["nsfw"]:
        yield Check("nsfw", "", rule.column, not_measured="needs unsafe photographs, which nobody ships")


def _planted(photos: Sequence[Photo], fault: Fault, draws: int, seed: int) -> Iterator[Photo]:
    """Each photograph with the fault, re-saved, `draws` times; what is added comes from the same half."""
    for i, photo in enumerate(photos):
        others = [p for j, p in enumerate(photos) if j != i and p.tunes == photo.tunes] or [photo]
        for draw in range(draws):
            rng = generator(seed, photo.item.uid, f"{fault.name}-{draw}")
            chosen = [others[int(k)].item.pixels for k in rng.permutation(len(others))[:3]]
            data = faults.saved(fault.plant(photo.item.pixels, rng, chosen), rng)
            yield replace(photo, item=ScorerInput(uid_of(data), data, photo.item.captions))


def _swapped(photos: Sequence[Photo]) -> Iterator[Photo]:
    """Each captioned photograph with the caption of the next one of its half."""
    for half in (True, False):
        captioned = [p for p in photos if p.tunes == half and p.item.captions.best()]
        for photo, other in zip(captioned, captioned[1:] + captioned[:1], strict=True):
            yield replace(photo, item=ScorerInput(photo.item.uid, photo.item.data, other.item.captions))


def _captioned(scored: _Scored) -> _Scored:
    """Those with a caption: only they can have a wrong one."""
    photos, rows = scored
    chosen = [i for i, photo in enumerate(photos) if photo.item.captions.best()]
    return [photos[i] for i in chosen], [rows[i] for i in chosen]


def _score(scorer: Scorer, items: Sequence[ScorerInput]) -> list[dict[str, Any]]:
    size = scorer.batch_size
    return [row for i in range(0, len(items), size) for row in scorer.score(items[i : i + size])]


def _column(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([np.nan if row[name] is None else row[name] for row in rows], np.float64)


def _copies(
    photos: Sequence[Photo], scorers: dict[str, Scorer], missing: dict[str, str], rules: Decide, seed: int
) -> Iterator[Check]:
    """Exact duplicates by their uid, near ones by perceptual hash."""
    uids = [photo.item.uid for photo in photos]
    first = first_of_equal(pa.chunked_array([uids + uids]))
    copied = first != np.arange(2 * len(uids))
    yield Check("duplicate", "the same bytes", "sha256", copied[: len(uids)], copied[len(uids) :])
    radius = rules.dedup.perceptual.radius if rules.dedup.perceptual else 6
    if "phash" not in scorers:
        for fault in faults.COPIES:
            yield Check(f"copy: {fault.name}", fault.severity, "phash", not_measured=missing["phash"])
        return
    hashes = _score(scorers["phash"], [photo.item for photo in photos])
    among = _near(uids, [row["phash"] for row in hashes], radius)
    clean = np.array([any(uid in pair for pair in among) for uid in uids])
    for fault in faults.COPIES:
        planted = [photo.item for photo in _planted(photos, fault, 1, seed)]
        copies = _score(scorers["phash"], planted)
        for column in ("phash", "phash_mirror") if fault.name == "flip" else ("phash",):
            caught = [
                (row["phash"] ^ copy[column]).bit_count() <= radius for row, copy in zip(hashes, copies, strict=True)
            ]
            note = "plain hashes cannot see it" if (fault.name, column) == ("flip", "phash") else ""
            rule = f"{column} differs in > {radius} bits"
            yield Check(f"copy: {fault.name}", fault.severity, rule, clean, np.array(caught), note)


def _near(uids: Sequence[str], hashes: Sequence[int], radius: int) -> set[frozenset[str]]:
    pairs = PerceptualPairs(pa.array(uids), pa.array(hashes, pa.uint64()), radius)
    return {frozenset((r["uid_a"], r["uid_b"])) for part in pairs.part(0, 1) for r in part.to_pylist()}


def _canary(photos: Sequence[Photo]) -> Check:
    rule = CanaryList(path="canaries.txt")
    matcher = read_blocklist(rule, _CANARY.encode())
    captions = [photo.item.captions for photo in photos]
    planted = [Captions(alt=f"{own.best()} {_CANARY.upper()} {own.tags}") for own in captions]
    clean, faulty = (_matches(matcher, side) for side in (captions, planted))
    return Check("canary", "in the alt text, in capitals", "canary list", clean, faulty)


def _matches(matcher: Any, captions: Sequence[Captions]) -> np.ndarray:
    columns = {"captions": pa.array([c.model_dump() for c in captions]), "ready": pa.array([""] * len(captions))}
    lines, _ = matcher.match(pa.table(columns))
    return lines > 0


def _bit_rot(photos: Sequence[Photo], ingest: Ingest, seed: int) -> Iterator[Check]:
    """Damaged source files must not pass ingest. Overwritten JPEG data often decodes without an error."""
    clean = np.array([_is_refused(photo.source, ingest) for photo in photos])
    damages: tuple[tuple[str, str, Callable[[bytes, np.random.Generator], bytes], str], ...] = (
        ("bit rot: cut", "at 5–95 % of the file", faults.cut, ""),
        ("bit rot: overwritten", "64 bytes of image data", faults.overwritten, "JPEG has no checksum"),
    )
    for name, severity, damage, note in damages:
        found = [_is_refused(damage(p.source, generator(seed, p.item.uid, name)), ingest) for p in photos]
        yield Check(name, severity, "ingest decodes it", clean, np.array(found), note)


def _is_refused(data: bytes, ingest: Ingest) -> bool:
    try:
        normalise(data, ingest.max_pixels, max_source_pixels=ingest.max_source_pixels)
    except BadInput:
        return True
    return False


def _opt_out() -> Check:
    clean, faulty = (np.array([_opts_out(h) for h in side]) for side in (PERMISSIONS, REFUSALS))
    return Check("opt-out header", "14 forms; 8 harmless ones", "no x-robots-tag, tdm-reservation", clean, faulty)


def _opts_out(headers: dict[str, Any]) -> bool:
    robots = robots_optout(headers.get("x-robots-tag"), _USER_AGENTS, _DIRECTIVES)
    return bool(robots or tdm_optout(headers.get("tdm-reservation"), "https://example.org/a.jpg"))
