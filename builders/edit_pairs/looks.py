"""Edits that leave everything in its place: the colour, light and saturation of a thing, and what is behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from builders.annotators.inpaint import continue_smoothly
from builders.base import Rejected
from builders.edit_pairs.claims import Claim, Coloured, Shifted, outline_contrast
from builders.edit_pairs.colour import (
    PAINTS,
    colour_shares,
    dominant_colour,
    nameable_colour,
    paint,
    possible_paints,
    to_lab,
    to_rgb,
)
from builders.edit_pairs.edit import Edit, Wording, matte, paste
from builders.edit_pairs.scene import Scene
from builders.edit_pairs.things import Thing, with_article

_ONE_COLOUR = 0.6  # share of a thing's pixels of one colour name, for it to be of that colour
_LEAST_SHIFT = 8.0  # CIE units
ATTRIBUTES = {"darker": "brighter", "brighter": "darker", "vivid": "muted", "muted": "vivid", "grayscale": ""}
BACKDROPS = {"white": (96, 0, 0), "black": (8, 0, 0), "grey": (62, 0, 0)} | {
    name: (float(np.mean(p.lightness)), p.chroma * 0.75, p.hue) for name, p in PAINTS.items()
}
_LEAST_SUBJECT = 0.05  # of the picture, for everything else to be its background
_CLEAN_OUTLINE = 10.0  # CIE76, median across the outline: a mask that follows no edge makes no cut-out


def recolor(scene: Scene, rng: np.random.Generator) -> Edit | Rejected:
    """A thing of one colour gets another; shading and texture stay. Its inverse names the colour that was measured."""
    return scene.edit_thing(
        rng,
        lambda thing: _recolor(scene, thing, rng),
        lambda t: not t.is_living,
        lambda t: dominant_colour(scene.pixels[t.mask])[1] >= _ONE_COLOUR,
    )


def _recolor(scene: Scene, thing: Thing, rng: np.random.Generator) -> Edit | Rejected:
    old = scene.pixels[thing.mask]
    shares, before = colour_shares(old), nameable_colour(old, thing.name)
    choices = [name for name in possible_paints(old) if shares[name] < 0.15]
    if not choices:
        return Rejected("no_suitable_colour", float(np.median(to_lab(old)[:, 0])), thing.name)
    colour = str(rng.choice(choices))
    alpha = matte(thing.mask)
    pixels, mask = paste(scene.pixels, _inside(scene.pixels, alpha > 0, lambda rgb: paint(rgb, colour)), alpha)
    return Edit(
        pixels,
        mask,
        Wording("recolor", {"thing": f"the {thing.name}", "colour": colour}),
        Wording("recolor", {"thing": f"the {thing.plain}", "colour": before}) if thing.plain and before else None,
        claims=(Coloured(thing.mask, colour), *thing.placed),
        params={"thing": thing.name, "mask": thing.origin, "colour": colour, "before": before},
        captions=(f"a photo of {with_article(thing.plain)}", f"a photo of a {colour} {thing.plain}")
        if thing.plain
        else None,
    )


def attribute(scene: Scene, rng: np.random.Generator) -> Edit | Rejected:
    """A thing becomes darker, brighter, more or less colourful, or loses its colour."""
    return scene.edit_thing(rng, lambda thing: _attribute(scene, thing, rng), lambda t: not t.is_person)


def _attribute(scene: Scene, thing: Thing, rng: np.random.Generator) -> Edit | Rejected:
    lab = to_lab(scene.pixels[thing.mask])
    light, chroma = float(np.median(lab[:, 0])), float(np.median(np.hypot(lab[:, 1], lab[:, 2])))
    possible = {
        "darker": light > 45,
        "brighter": 18 < light < 62,
        "vivid": 14 < chroma < 40,
        "muted": chroma > 24,
        "grayscale": chroma > 18,
    }
    kinds = [name for name, is_possible in possible.items() if is_possible]
    if not kinds:
        return Rejected("no_suitable_attribute", light, thing.name)
    kind = str(rng.choice(kinds))
    strength = round(float(rng.uniform(0.7, 1.0)), 3)
    alpha = matte(thing.mask)
    edited = _inside(scene.pixels, alpha > 0, lambda rgb: _adjusted(rgb, kind, strength))
    pixels, mask = paste(scene.pixels, edited, alpha)
    quantity = "lightness" if kind in ("darker", "brighter") else "chroma"
    sign = 1 if kind in ("brighter", "vivid") else -1
    fields = {"thing": f"the {thing.name}"}
    undo = ATTRIBUTES[kind]
    return Edit(
        pixels,
        mask,
        Wording(f"attribute_{kind}", fields),
        Wording(f"attribute_{undo}", fields) if undo else None,
        claims=(Shifted(thing.mask, quantity, sign, _LEAST_SHIFT), *thing.placed),
        params={"thing": thing.name, "mask": thing.origin, "kind": kind, "strength": strength},
    )


def background(scene: Scene, rng: np.random.Generator) -> Edit | Rejected:
    """Everything but one thing is blurred, loses its colour, or becomes a plain backdrop."""
    return scene.edit_thing(
        rng,
        lambda thing: _background(scene, thing, rng),
        fits=lambda t: stands_out(scene, t),
    )


def stands_out(scene: Scene, thing: Thing) -> bool:
    """Whether a thing is large, and its outline clear enough, for everything around it to become something else."""
    if thing.area < _LEAST_SUBJECT:
        return False
    return float(np.median(outline_contrast(scene.pixels, thing.mask))) >= _CLEAN_OUTLINE


def _background(scene: Scene, thing: Thing, rng: np.random.Generator) -> Edit | Rejected:
    kind = str(rng.choice(["blur", "grayscale", *([] if thing.is_covered else ["plain"])]))
    alpha = 1 - matte(thing.mask, 1)
    fields = {"thing": f"the {thing.name}"}
    inverse: Wording | None = None
    claims: tuple[Claim, ...] = thing.placed
    params: dict[str, Any] = {"thing": thing.name, "mask": thing.origin, "kind": kind}
    behind = alpha > 0.5
    if kind == "plain":
        shares = colour_shares(scene.pixels[behind])
        colour = str(rng.choice([name for name in BACKDROPS if shares[name] < 0.2]))
        fields["colour"] = params["colour"] = colour
        new = backdrop(scene.pixels.shape[:2], colour, rng)
        claims = (Coloured(behind, colour), *claims)
    elif kind == "grayscale":
        new = _inside(scene.pixels, alpha > 0, lambda rgb: _adjusted(rgb, "grayscale", 1.0))
        claims = (Shifted(behind, "chroma", -1, 5.0), *claims)
        inverse = Wording("background_colourful", fields)
    else:
        sigma = round(float(rng.uniform(0.02, 0.04)) * scene.side, 2)
        params["sigma"] = sigma
        new = _blurred_behind(scene.pixels, thing.mask, sigma)
        inverse = Wording("background_sharp", fields)
    # What is under the soft edge is the thing's own colour, not a mixture with its old surroundings.
    own = continue_smoothly(scene.pixels.astype(np.float32), alpha < 0.02)
    edge = (alpha > 0) & (alpha < 1)
    front = np.where(edge[..., None], np.clip(own, 0, 255), scene.pixels)
    pixels, mask = paste(front.astype(np.uint8), new, alpha)
    pixels[~mask] = scene.pixels[~mask]
    return Edit(pixels, mask, Wording(f"background_{kind}", fields), inverse, claims=claims, params=params)


def _inside(pixels: np.ndarray, region: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    edited = pixels.copy()
    edited[region] = change(pixels[region])
    return edited


def _adjusted(rgb: np.ndarray, kind: str, strength: float) -> np.ndarray:
    lab = to_lab(rgb)
    if kind in ("darker", "brighter"):
        gamma = 1 + 1.1 * strength if kind == "darker" else 1 / (1 + 1.1 * strength)
        light = 100 * np.clip(lab[:, :1] / 100, 0, 1) ** gamma
        return to_rgb(np.concatenate([light, lab[:, 1:]], axis=1))
    factor = {"vivid": 1 + strength, "muted": 1 - 0.75 * strength, "grayscale": 0.0}[kind]
    return to_rgb(lab * np.array([1, factor, factor], np.float32))


def backdrop(size: tuple[int, int], colour: str, rng: np.random.Generator) -> np.ndarray:
    """A studio backdrop: one colour, a little brighter around a point than towards the corners."""
    light, chroma, hue = BACKDROPS[colour]
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32) / max(size)
    cx, cy = rng.uniform(0.3, 0.7, 2)
    fall = np.hypot(x - cx * size[1] / max(size), y - cy * size[0] / max(size))
    lab = np.empty((*size, 3), np.float32)
    lab[..., 0] = np.clip(light + 4 - 14 * fall, 2, 98)
    lab[..., 1:] = chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))
    return to_rgb(lab)


def _blurred_behind(pixels: np.ndarray, mask: np.ndarray, sigma: float) -> np.ndarray:
    """The picture out of focus, as if the thing were not there: its colours do not bleed into the blur."""
    weight = (~cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)).astype(np.float32)
    total = cv2.GaussianBlur(weight, (0, 0), sigma)
    blurred = cv2.GaussianBlur(pixels * weight[..., None], (0, 0), sigma) / np.maximum(total, 1e-4)[..., None]
    return np.rint(np.clip(continue_smoothly(blurred, total > 1e-3), 0, 255)).astype(np.uint8)
