"""Inpainting without weights: the hole is filled with patches from its surroundings, from coarse to fine.

Space-time completion of Wexler, Shechtman and Irani (PAMI 2007, section 3) with the randomised correspondence search
of PatchMatch (Barnes et al., SIGGRAPH 2009, section 3). Unlike diffusion (OpenCV's Telea and Navier-Stokes inpainting)
it continues texture: sky, walls, wood, grass. Slow changes of light are continued smoothly, and only the detail on top
of them is copied. It knows no objects: what is behind one must be of the kind that is around it, which the caller has
to check.
"""

from __future__ import annotations

import math
from typing import ClassVar

import cv2
import numpy as np

_RADIUS = 3  # patches of 7 x 7
_SPAN = np.indices((2 * _RADIUS + 1,) * 2).reshape(2, -1).T - _RADIUS
_NEIGHBOURS = np.array([(-1, 0), (1, 0), (0, -1), (0, 1), (-4, 0), (4, 0), (0, -4), (0, 4)])
_COARSE_DEPTH = 3.0  # the coarsest level is the one whose hole is at most this deep, in pixels
_LEAST_SIDE = 32
_CONTEXT = 0.75  # surroundings to copy from, on each side, as a share of the hole's longer side
_LEAST_CONTEXT = 48
_LIGHT_SIGMA, _LEAST_LIGHT_SIGMA = 0.04, 6.0  # of what counts as light, as a share of the longer side; in pixels
_TRUST = 0.85  # of a hole pixel per pixel of depth: what lies deeper was guessed from what lies further out


class PatchInpainter:
    """`Inpainter` without a model. The prompt is ignored: it can only continue what is there."""

    name: ClassVar[str] = "patches"
    version: ClassVar[str] = "1"

    def inpaint(self, image: np.ndarray, mask: np.ndarray, prompt: str, rng: np.random.Generator) -> np.ndarray:
        """Fill `mask` (boolean [H, W]) of a uint8 RGB [H, W, 3] image; pixels outside of it are returned as they are.

        Raises:
            ValueError: nothing is left to copy from.
        """
        filled = image.copy()
        if mask.any():
            window = _surroundings(mask)
            light = _light(image[window], mask[window])
            detail = _complete(image[window] - light, mask[window], rng)
            pixels = np.clip(np.rint(light + detail), 0, 255).astype(np.uint8)
            filled[window][mask[window]] = pixels[mask[window]]
        return filled


def _surroundings(mask: np.ndarray) -> tuple[slice, slice]:
    spans = [np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0)]
    longer = max(span[-1] - span[0] + 1 for span in spans)
    margin = max(_LEAST_CONTEXT, math.ceil(_CONTEXT * longer))
    rows, columns = (
        slice(max(0, int(span[0]) - margin), min(size, int(span[-1]) + 1 + margin))
        for span, size in zip(spans, mask.shape, strict=True)
    )
    return rows, columns


def _light(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """What varies slowly, float32 [h, w, 3], continued into the hole. Copied as it is, it would leave a silhouette."""
    sigma = max(_LEAST_LIGHT_SIGMA, _LIGHT_SIGMA * max(hole.shape))
    return cv2.GaussianBlur(continue_smoothly(image.astype(np.float32), ~hole), (0, 0), sigma)


def continue_smoothly(image: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Unknown pixels take the mean of the known ones around, from as far away as they have to (pull-push).

    Args:
        image: float32 [H, W, 3].
        known: boolean [H, W].
    """
    return _pull_push(image, known.astype(np.float32))


def _pull_push(image: np.ndarray, known: np.ndarray) -> np.ndarray:
    if known.all() or min(known.shape) == 1:
        return image
    size = (-(-known.shape[1] // 2), -(-known.shape[0] // 2))
    share = cv2.resize(known, size, interpolation=cv2.INTER_AREA)
    mean = cv2.resize(image * known[..., None], size, interpolation=cv2.INTER_AREA)
    mean /= np.maximum(share, 1e-6)[..., None]
    coarse = _pull_push(mean, (share > 0).astype(np.float32))
    smooth = cv2.resize(coarse, known.shape[::-1], interpolation=cv2.INTER_LINEAR)
    return np.where(known[..., None] > 0, image, smooth)


def _complete(image: np.ndarray, hole: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Coarse to fine: every level starts from the correspondences of the one before."""
    levels = _pyramid(image, hole)
    field: _Field | None = None
    for depth, (pixels, mask) in reversed(list(enumerate(levels))):
        field = _Field(pixels, mask, rng, field)
        for _ in range(1 if depth == 0 and len(levels) > 1 else 4):
            field.search(rng)
            field.vote()
    assert field is not None
    return field.image


def _pyramid(image: np.ndarray, hole: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Levels from fine to coarse: float32 [h, w, 3] with a first guess in the hole, and the boolean hole."""
    levels = [(continue_smoothly(image, ~hole), hole)]
    while _depth(levels[-1][1]).max() > _COARSE_DEPTH and min(levels[-1][1].shape) >= 2 * _LEAST_SIDE:
        pixels, mask = levels[-1]
        size = (mask.shape[1] // 2, mask.shape[0] // 2)
        smaller = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0
        levels.append((cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), smaller))
    return levels


def _depth(hole: np.ndarray) -> np.ndarray:
    padded = np.pad(hole.astype(np.uint8), 1, constant_values=1)  # outside of the picture nothing is known either
    return cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1]


class _Field:
    """For every patch that reaches into the hole, the most similar patch that does not."""

    def __init__(
        self, image: np.ndarray, hole: np.ndarray, rng: np.random.Generator, coarser: _Field | None = None
    ) -> None:
        self.hole = hole
        self.image = image
        self.height, self.width = hole.shape
        reach = cv2.dilate(hole.astype(np.uint8), np.ones((2 * _RADIUS + 1,) * 2, np.uint8)).astype(bool)
        inside = np.zeros_like(hole)
        inside[_RADIUS:-_RADIUS, _RADIUS:-_RADIUS] = True
        self.targets = np.argwhere(reach & inside)
        self.is_source = inside & ~reach
        self.sources = np.argwhere(self.is_source)
        if not len(self.sources) or not len(self.targets):
            raise ValueError(f"a hole of {hole.mean():.0%} leaves nothing to fill it from")
        self.number = np.full(hole.shape, -1)
        self.number[tuple(self.targets.T)] = np.arange(len(self.targets))
        trust = np.where(hole, np.maximum(_TRUST ** _depth(hole), 0.05), 1.0).astype(np.float32)
        self.trust = trust[tuple(self.targets.T)]
        self.weights = self._gather(trust[..., None], self.targets)
        self.weights /= self.weights.sum(axis=1, keepdims=True)
        self.match = rng.choice(self.sources, len(self.targets))
        if coarser is not None:
            self._inherit(coarser)
        self.cost = np.full(len(self.targets), np.inf, np.float32)

    def _inherit(self, coarser: _Field) -> None:
        places = np.minimum(self.targets // 2, np.array(coarser.hole.shape) - 1 - _RADIUS)
        numbers = coarser.number[tuple(np.maximum(places, _RADIUS).T)]
        inherited = self.targets + 2 * (coarser.match[numbers] - coarser.targets[numbers])
        self._take(inherited, (numbers >= 0) & self._usable(inherited))
        # The coarse solution is a better guess of the colours than diffusion is.
        enlarged = cv2.resize(coarser.image, (self.width, self.height), interpolation=cv2.INTER_LINEAR)
        self.image = np.where(self.hole[..., None], enlarged, self.image)

    def _usable(self, places: np.ndarray) -> np.ndarray:
        y, x = places.T
        within = (y >= 0) & (y < self.height) & (x >= 0) & (x < self.width)
        return within & self.is_source[np.where(within, y, 0), np.where(within, x, 0)]

    def _take(self, places: np.ndarray, where: np.ndarray) -> None:
        self.match[where] = places[where]

    def _gather(self, image: np.ndarray, centres: np.ndarray) -> np.ndarray:
        """Patches around `centres`, [n, 49, channels]."""
        offsets = _SPAN[:, 0] * self.width + _SPAN[:, 1]
        flat = (centres[:, 0] * self.width + centres[:, 1])[:, None] + offsets
        return image.reshape(-1, image.shape[-1])[flat]

    def search(self, rng: np.random.Generator) -> None:
        """One round of PatchMatch: what the neighbours found, moved along, and random places ever closer."""
        self._wanted = self._gather(self.image, self.targets)
        self.cost = self._costs(self.match, np.arange(len(self.targets)))
        for step in _NEIGHBOURS:
            self._try_neighbour(step)
        radius = max(self.height, self.width)
        while radius >= 1:
            self._try(self.match + rng.integers(-radius, radius + 1, self.match.shape))
            radius //= 2
        for step in _NEIGHBOURS[:4]:
            self._try_neighbour(step)

    def _try_neighbour(self, step: np.ndarray) -> None:
        y, x = (self.targets + step).T
        within = (y >= 0) & (y < self.height) & (x >= 0) & (x < self.width)
        numbers = np.where(within, self.number[np.where(within, y, 0), np.where(within, x, 0)], -1)
        self._try(np.where((numbers >= 0)[:, None], self.match[numbers] - step, -1))

    def _try(self, places: np.ndarray) -> None:
        asked = np.flatnonzero(self._usable(places) & (places != self.match).any(axis=1))
        costs = self._costs(places[asked], asked)
        better = costs < self.cost[asked]
        self.match[asked[better]] = places[asked[better]]
        self.cost[asked[better]] = costs[better]

    def _costs(self, places: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Squared difference to the patches of `numbers`, weighted by how far their pixels are known."""
        difference = self._gather(self.image, places) - self._wanted[numbers]
        return np.einsum("npc,npc,np->n", difference, difference, self.weights[numbers, :, 0])

    def vote(self) -> None:
        """Every pixel of the hole becomes the mean of what the patches over it say, the best matches loudest."""
        scale = 2 * max(float(np.quantile(self.cost, 0.25)), 1.0)
        weight = (self.trust * np.exp(-self.cost / scale) + 1e-12).astype(np.float64)
        total = np.zeros((self.height * self.width, 4))
        source = self.image.reshape(-1, 3)
        for dy, dx in _SPAN:
            place = (self.targets[:, 0] + dy) * self.width + self.targets[:, 1] + dx
            colour = source[(self.match[:, 0] + dy) * self.width + self.match[:, 1] + dx]
            for channel, values in enumerate((*colour.T, np.ones(len(colour)))):
                total[:, channel] += np.bincount(place, weight * values, len(total))
        mean = total[:, :3] / np.maximum(total[:, 3:], 1e-12)
        voted = (total[:, 3] > 0).reshape(self.hole.shape) & self.hole
        self.image = np.where(voted[..., None], mean.reshape(self.image.shape), self.image).astype(np.float32)
