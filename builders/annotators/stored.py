"""Condition maps drawn from artefacts: what an annotator found, made visible and gated.

Like the maps of `builders.annotators.maps`, but the model ran earlier: here its raw values become a picture.
"""

from __future__ import annotations

import colorsys
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import cv2
import numpy as np

from builders.annotators.annotator import Artefact
from builders.annotators.hed import SoftEdge
from builders.annotators.layouts import MAX_NAMES, MIN_VISIBLE_PX, bare_name, enumerate_words
from builders.annotators.maps import (
    ConditionMap,
    Depth,
    Detector,
    Limits,
    Params,
    controlnet_aux,
    line_density,
    share,
)
from builders.annotators.normals import FIELD_OF_VIEW, encode_normals, normals_from_depth
from builders.base import SourceImage
from builders.colours import COLOURS, draw_colours
from schemas.codec import decode_raw
from schemas.records import Op

MIN_SCORE = 0.3  # of a keypoint that is drawn and counted: recipes (c), as in OpenPose's users


class FromArtefact(Detector):
    """A map from the artefact of the annotator of the same name."""

    def __init__(self, image: SourceImage) -> None:
        self.artefact = image.artefacts.get(self.name, Artefact())
        self.missing = "" if self.artefact.data or self.artefact.members else f"no_{self.name}"
        self.made_by = op_of(self.artefact)

    @property
    def version(self) -> str:
        return self.made_by.version if self.made_by else ""

    def draw(self, rng: np.random.Generator) -> Params:
        return {}


class StoredDrawing(FromArtefact):
    """A gray picture as it was stored, light on black."""

    limits: ClassVar[Limits] = {"density": (0.005, 0.45)}

    def render(self, pixels: np.ndarray, params: Params) -> ConditionMap:
        image = decode_raw(self.artefact.members[f"{self.name}.png"])
        return ConditionMap(image, params, {"density": share(image >= 128)})


class StoredSoftEdge(StoredDrawing):
    """The probability of a boundary by ControlNet's HED."""

    name = "softedge"


class StoredEdges(StoredDrawing):
    """Edges by PiDiNet or TEED, which the instruction names."""

    name = "edges"

    def render(self, pixels: np.ndarray, params: Params) -> ConditionMap:
        assert self.made_by is not None
        method = {"pidinet": "PiDiNet", "teed": "TEED"}[json.loads(self.made_by.params)["detector"]]
        return replace(super().render(pixels, params), words={"method": method})


class StoredLineartRealistic(StoredDrawing):
    """A line drawing of what is there."""

    name = "lineart_realistic"


class StoredLineartAnime(StoredDrawing):
    """A line drawing in the manner of animation."""

    name = "lineart_anime"


class Scribble(Detector):
    """Thick strokes as by a quick hand: ridges of soft edges, as ControlNet makes its scribbles.

    The strokes' strength and width are drawn (ControlNet: 127 and 3 pixels at 512, which loses much of softer photos).
    """

    name = "scribble"
    limits: ClassVar[Limits] = {"density": (0.02, 0.40)}

    def __init__(self, image: SourceImage) -> None:
        self.soft = soft_edges(image)
        self.missing, self.made_by = self.soft.missing, self.soft.made_by

    @property
    def version(self) -> str:
        return self.soft.version

    def draw(self, rng: np.random.Generator) -> Params:
        return {"threshold": int(rng.integers(80, 131)), "sigma": round(float(rng.uniform(1.5, 3)), 2)}

    def render(self, pixels: np.ndarray, params: Params) -> ConditionMap:
        sigma = params["sigma"] * max(0.5, min(pixels.shape[:2]) / 512)
        controlnet_aux()
        from controlnet_aux.util import nms

        ridges = nms(self.soft.render(pixels, {}).image, params["threshold"], sigma)
        image = np.where(cv2.GaussianBlur(ridges, (0, 0), sigma) > 4, 255, 0).astype(np.uint8)
        return ConditionMap(image, params, {"density": share(image > 0)})


class StoredLines(FromArtefact):
    """Straight segments by M-LSD, one pixel wide, white on black."""

    name = "mlsd"
    limits: ClassVar[Limits] = {"segments": (10, math.inf), "density_at_512": (0.005, math.inf)}

    def draw(self, rng: np.random.Generator) -> Params:
        return {"min_length": round(float(rng.uniform(0.03, 0.06)), 3)}  # of the shorter side

    def render(self, pixels: np.ndarray, params: Params) -> ConditionMap:
        ends = np.array(self.artefact.data["lines"], float).reshape(-1, 2, 2)
        lengths = np.linalg.norm(ends[:, 1] - ends[:, 0], axis=1)
        ends = ends[lengths >= params["min_length"] * min(pixels.shape[:2])]
        image = np.zeros(pixels.shape[:2], np.uint8)
        cv2.polylines(image, list(np.rint(ends).astype(np.int32)), False, 255)
        return ConditionMap(image, params, {"segments": float(len(ends)), **line_density(image)})


class Normals(Detector):
    """Surface normals: an annotator's, else computed from the depth of the source or of an annotator."""

    name = "normal"
    limits: ClassVar[Limits] = {"known": (0.7, 1.0)}

    def __init__(self, image: SourceImage) -> None:
        self.stored = image.artefacts.get(self.name, Artefact()).members.get("normal.png", b"")
        self.inverse_depth, made_depth = depth_of(image)
        self.made_by = op_of(image.artefacts[self.name]) if self.stored else made_depth
        self.missing = "" if self.stored or self.inverse_depth is not None else "no_depth"

    @property
    def version(self) -> str:
        return self.made_by.version if self.made_by else f"opencv {cv2.__version__}"

    def draw(self, rng: np.random.Generator) -> Params:
        if self.stored:
            return {}
        return {"field_of_view": FIELD_OF_VIEW, "sigma": 0.002}  # sigma: of the longer side

    def render(self, pixels: np.ndarray, params: Params) -> ConditionMap:
        if self.stored:
            image = decode_raw(self.stored)
        else:
            assert self.inverse_depth is not None
            sigma = max(0.8, params["sigma"] * max(self.inverse_depth.shape))
            image = encode_normals(normals_from_depth(self.inverse_depth, params["field_of_view"], sigma))
        return ConditionMap(image, params, {"known": share(image.max(axis=-1) > 0)})


class Semantic(FromArtefact):
    """The largest segments, each in a colour that the instruction names, on black."""

    name = "semantic"
    limits: ClassVar[Limits] = {"names": (3, math.inf)}  # fewer say too little of a scene

    def draw(self, rng: np.random.Generator) -> Params:
        """A colour for each of the largest segments that have a name; its size decides, then its number."""
        segments = self.artefact.data["segments"]
        sizes = np.bincount(self._ids().ravel(), minlength=1 + max((s["id"] for s in segments), default=0))
        named = [s for s in segments if bare_name(s["label"]) and sizes[s["id"]] >= MIN_VISIBLE_PX]
        largest = sorted(named, key=lambda s: (-sizes[s["id"]], s["id"]))[:MAX_NAMES]
        colours = draw_colours(rng, len(largest))
        return {"legend": [[s["id"], bare_name(s["label"]), c] for s, c in zip(largest, colours, strict=True)]}

    def render(self, pixels: np.ndarray, params: Params) -> ConditionMap:
        ids = self._ids()
        table = np.zeros((int(ids.max()) + 1, 3), np.uint8)
        for number, _, colour in params["legend"]:
            table[number] = COLOURS[colour]
        names = enumerate_words([f"{colour} for {name}" for _, name, colour in params["legend"]])
        return ConditionMap(table[ids], params, {"names": float(len(params["legend"]))}, {"legend": names})

    def _ids(self) -> np.ndarray:
        return decode_raw(self.artefact.members["semantic.png"])


class Pose(FromArtefact):
    """Skeletons of all people on black, in OpenPose's colours: eighteen hues for keypoints, limbs darker."""

    name = "pose"
    limits: ClassVar[Limits] = {"keypoints": (8, math.inf)}  # of the person with the most
    # Keypoints (see `pose.KEYPOINTS`) that a limb joins, in the order of their hues.
    limbs: ClassVar[tuple[tuple[int, int], ...]] = (
        *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10)),
        *((1, 11), (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),
    )
    hues: ClassVar[tuple[tuple[int, ...], ...]] = tuple(
        tuple(round(255 * part) for part in colorsys.hsv_to_rgb(i / 18, 1, 1)) for i in range(18)
    )

    def __init__(self, image: SourceImage) -> None:
        super().__init__(image)
        people = self.artefact.data.get("people", [])
        self.people = [np.array(person["keypoints"], float) for person in people]
        self.missing = self.missing or ("" if self.people else "no_people")

    def render(self, pixels: np.ndarray, params: Params) -> ConditionMap:
        image = np.zeros_like(pixels)
        radius = max(2, round(min(pixels.shape[:2]) / 128))  # 4 at 512, as OpenPose's users draw it
        for person in self.people:
            _draw_person(image, person, radius, self.limbs, self.hues)
        seen = max((int((person[:, 2] >= MIN_SCORE).sum()) for person in self.people), default=0)
        return ConditionMap(image, params, {"keypoints": float(seen), "people": float(len(self.people))})


def _draw_person(
    image: np.ndarray,
    person: np.ndarray,
    radius: int,
    limbs: Sequence[tuple[int, int]],
    hues: Sequence[Sequence[int]],
) -> None:
    there = person[:, 2] >= MIN_SCORE
    for (start, end), hue in zip(limbs, hues, strict=False):
        if there[start] and there[end]:
            (x0, y0), (x1, y1) = person[start, :2], person[end, :2]
            half, angle = math.hypot(x1 - x0, y1 - y0) / 2, math.degrees(math.atan2(y0 - y1, x0 - x1))
            centre = (int((x0 + x1) / 2), int((y0 + y1) / 2))
            outline = cv2.ellipse2Poly(centre, (int(half), radius), int(angle), 0, 360, 1)
            cv2.fillConvexPoly(image, np.array(outline), [int(0.6 * part) for part in hue])
    for (x, y, _), hue, drawn in zip(person, hues, there, strict=True):
        if drawn:
            cv2.circle(image, (int(x), int(y)), radius, list(hue), thickness=-1)


def soft_edges(image: SourceImage) -> Detector:
    """Soft edges: of the annotator, if the recipe has it, else of the packaged HED."""
    return StoredSoftEdge(image) if StoredSoftEdge.name in image.artefacts else SoftEdge()


def depth_map(image: SourceImage) -> Depth:
    """Depth as gray values: the source's own, else an annotator's."""
    inverse_depth, made_by = depth_of(image)
    return Depth(inverse_depth, made_by)


def depth_of(image: SourceImage) -> tuple[np.ndarray | None, Op | None]:
    """uint16 [H, W] inverse depth (None: there is none), and the annotator that made it (None: the source's own)."""
    if image.depth is not None:
        return image.depth, None
    artefact = image.artefacts.get("depth", Artefact())
    png = artefact.members.get("depth.png", b"")
    return (decode_raw(png), op_of(artefact)) if png else (None, None)


def op_of(artefact: Artefact) -> Op | None:
    """What made an artefact, as it says itself."""
    return Op(**artefact.data["op"]) if "op" in artefact.data else None
