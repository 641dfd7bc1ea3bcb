"""Edits that need a model: another thing in the place of one, another material, another place, another season or hour.

Local ones keep the photograph's own pixels around them, whatever the model did there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import cv2
import numpy as np

from builders.alignment import MAX_SHIFT, measure_pair
from builders.annotators.layouts import bare_name
from builders.base import Rejected
from builders.edit_pairs.edit import Edit, Presence, Wording, fade_in, grow, matte, paste
from builders.edit_pairs.looks import stands_out
from builders.edit_pairs.scene import Scene
from builders.edit_pairs.things import Thing, with_article
from builders.edit_pairs.wording import plain

MATERIALS = ("gold", "glass", "marble", "wood", "ice", "paper", "wool", "copper", "clay", "leather")
PLACES = (
    "on a sandy beach", "in a forest", "in a desert", "on a city street", "in a snowy landscape", "in a meadow",
    "in a library", "in a workshop", "on a mountain top", "under water",
)  # fmt: skip
LOOKS = (
    "at night", "at sunset", "at dawn", "in winter with snow on the ground", "in autumn", "in heavy rain",
    "in thick fog", "in bright midday sun", "in a thunderstorm", "under a starry sky",
)  # fmt: skip
_ROOM = 0.08  # by which the box of a thing grows on each side, so that another shape finds room in it
_FEATHER = 6  # pixels over which a changed thing blends into its surroundings

Groups = Mapping[str, Sequence[str]]


def replace_thing(scene: Scene, rng: np.random.Generator, groups: Groups) -> Edit | Rejected:
    """Another thing of the same group stands in the place of one. The inverse has the photograph as its target."""
    return scene.edit_thing(
        rng,
        lambda thing: _replace(scene, thing, rng, groups),
        lambda t: not (t.is_person or t.carries) and bool(_alternatives(scene, t, groups)),
        lambda t: t.sides <= 1 and not t.is_covered,
    )


def _replace(scene: Scene, thing: Thing, rng: np.random.Generator, groups: Groups) -> Edit | Rejected:
    new = str(rng.choice(_alternatives(scene, thing, groups)))
    hole = _roomy_box(thing.mask)
    pixels, mask = paste(
        scene.pixels, scene.inpainter.inpaint(scene.pixels, hole, with_article(new), rng), fade_in(hole)
    )
    return Edit(
        pixels,
        mask,
        Wording("replace", {"thing": f"the {thing.name}", "new": with_article(new)}),
        None if thing.placed else Wording("replace", {"thing": f"the {new}", "new": with_article(thing.name)}),
        claims=thing.placed,
        params={"thing": thing.name, "mask": thing.origin, "new": new},
        presences=(Presence(thing.kind, thing.mask, in_target=False), Presence(new, hole, in_target=True)),
        captions=(f"a photo of {with_article(thing.kind)}", f"a photo of {with_article(new)}"),
        model=scene.inpainting,
    )


def material(scene: Scene, rng: np.random.Generator) -> Edit | Rejected:
    """A thing is made of something else, in its old shape."""
    return scene.edit_thing(rng, lambda thing: _material(scene, thing, rng), lambda t: not t.is_living)


def _material(scene: Scene, thing: Thing, rng: np.random.Generator) -> Edit | Rejected:
    new = str(rng.choice([name for name in MATERIALS if name not in thing.name.split()]))
    wording = Wording("material", {"thing": f"the {thing.name}", "material": new})
    alpha = fade_in(grow(thing.mask, _FEATHER), _FEATHER)
    edited = _edited(scene, wording, alpha > 0, rng)
    if isinstance(edited, Rejected):
        return edited
    pixels, mask = paste(scene.pixels, edited, alpha)
    return Edit(
        pixels,
        mask,
        wording,
        claims=thing.placed,
        params={"thing": thing.name, "mask": thing.origin, "material": new},
        captions=(f"a photo of {with_article(thing.kind)}", f"a photo of {with_article(thing.kind)} made of {new}"),
        model=scene.editing,
    )


def surroundings(scene: Scene, rng: np.random.Generator) -> Edit | Rejected:
    """A thing stays as it is, and everything around it becomes another place."""
    return scene.edit_thing(
        rng, lambda thing: _surroundings(scene, thing, rng), fits=lambda thing: stands_out(scene, thing)
    )


def _surroundings(scene: Scene, thing: Thing, rng: np.random.Generator) -> Edit | Rejected:
    place = str(rng.choice(PLACES))
    wording = Wording("surroundings", {"thing": f"the {thing.name}", "place": place})
    alpha = 1 - matte(thing.mask, 1)
    edited = _edited(scene, wording, alpha > 0, rng)
    if isinstance(edited, Rejected):
        return edited
    pixels, mask = paste(scene.pixels, edited, alpha)
    return Edit(
        pixels,
        mask,
        wording,
        claims=thing.placed,
        params={"thing": thing.name, "mask": thing.origin, "place": place},
        captions=(f"a photo of {with_article(thing.kind)}", f"a photo of {with_article(thing.kind)} {place}"),
        model=scene.editing,
    )


def restyle_scene(scene: Scene, rng: np.random.Generator) -> Edit | Rejected:
    """The whole picture in another light, weather or season. Every pixel may change, so there is nothing to paste."""
    look = str(rng.choice(LOOKS))
    wording = Wording("restyle_scene", {"look": look})
    assert scene.editor is not None
    return Edit(
        scene.editor.edit(scene.pixels, plain([wording]), rng),
        np.ones(scene.pixels.shape[:2], bool),
        wording,
        params={"look": look},
        captions=("a photo", f"a photo {look}"),
        model=scene.editing,
    )


def _edited(scene: Scene, wording: Wording, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray | Rejected:
    """What the editor makes of the photograph, unless it moved what is outside of the mask: no paste hides that."""
    assert scene.editor is not None
    edited = scene.editor.edit(scene.pixels, plain([wording]), rng)
    shift = measure_pair(scene.pixels, edited, mask).align.shift_px
    return Rejected("misaligned", shift) if shift > MAX_SHIFT else edited


def _alternatives(scene: Scene, thing: Thing, groups: Groups) -> list[str]:
    """What could stand for a thing, of the groups that it is in, without what the picture shows already."""
    shown = [bare_name(name) for entity in scene.image.record.entities for name in (entity.label, entity.phrase)]
    found = (name for group in groups.values() if _is_one_of(thing.kind, group) for name in group)
    return [name for name in dict.fromkeys(found) if not any(_is_one_of(other, [name]) for other in shown)]


def _is_one_of(name: str, group: Iterable[str]) -> bool:
    """Whether a name ("red cup") means a member ("cup")."""
    return any(f" {name.lower()}".endswith(f" {member}") for member in group)


def _roomy_box(mask: np.ndarray) -> np.ndarray:
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    dx, dy = round(_ROOM * w), round(_ROOM * h)
    box = np.zeros_like(mask)
    box[max(0, y - dy) : y + h + dy, max(0, x - dx) : x + w + dx] = True
    return box
