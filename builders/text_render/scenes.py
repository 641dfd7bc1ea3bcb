"""Where text is written: plain and graded backgrounds, book pages, lists, signs, posters and captioned photos.

A scene is a canvas and empty blocks of text. Each is a function of the photo, its caption and a generator; those in
`ON_PHOTO` show the photo, and need its caption so that the instruction can say what is to be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import cv2
import numpy as np

from builders.text_render.layout import Align, Block, Box, Colour
from builders.text_render.texts import compose, compose_several

COLOURS: dict[str, Colour] = {
    "white": (255, 255, 255),
    "cream": (255, 248, 225),
    "light gray": (224, 224, 224),
    "pale yellow": (255, 243, 176),
    "pale blue": (207, 226, 243),
    "pale pink": (250, 215, 220),
    "pale green": (212, 234, 208),
    "yellow": (255, 214, 10),
    "orange": (240, 140, 20),
    "red": (200, 26, 32),
    "blue": (24, 72, 190),
    "green": (20, 120, 60),
    "teal": (0, 92, 98),
    "purple": (84, 28, 124),
    "brown": (88, 52, 24),
    "dark red": (112, 14, 22),
    "dark green": (12, 66, 40),
    "navy": (14, 28, 80),
    "dark gray": (56, 56, 60),
    "black": (16, 16, 16),
}
PAPERS = ("white", "cream", "light gray", "pale yellow", "pale blue", "pale pink", "pale green")
CAPITALS = 0.35  # how often words, signs and titles are written in capital letters
STRIP = (0.18, 0.3)  # height of a caption strip, as a share


@dataclass(frozen=True)
class Scene:
    """A canvas to write on.

    Args:
        canvas: uint8 RGB [H, W, 3].
        blocks: what is written, in reading order.
        words: fields for the instruction beside those of the letters.
        params: what was drawn, as plain JSON values.
        scrim: a region that may be darkened or lightened where no ink is legible on it, or None.
    """

    canvas: np.ndarray
    blocks: tuple[Block, ...]
    words: dict[str, str]
    params: dict[str, str] = field(default_factory=dict)
    scrim: Box | None = None

    @property
    def text(self) -> str:
        """All that is written, one block per line."""
        return "\n".join(block.text for block in self.blocks)


SceneMaker = Callable[[np.ndarray, str, np.random.Generator], Scene]


def word(photo: np.ndarray, caption: str, rng: np.random.Generator) -> Scene:
    """One word, code or number, large."""
    return _plain(photo, _cased(compose("word", rng), rng), (0.14, 0.36), rng)


def sentence(photo: np.ndarray, caption: str, rng: np.random.Generator) -> Scene:
    """A sentence of our own or, as often, what the photo's caption says."""
    text = caption if caption and rng.random() < 0.5 else compose("sentence", rng)
    return _plain(photo, text, (0.06, 0.13), rng)


def page(photo: np.ndarray, caption: str, rng: np.random.Generator) -> Scene:
    """A book page: heading and one or two paragraphs."""
    sentences = compose_several("sentence", int(rng.integers(2, 7)), rng)
    split = int(rng.integers(2, len(sentences))) if len(sentences) > 3 and rng.random() < 0.5 else len(sentences)
    paragraphs = [" ".join(part) for part in (sentences[:split], sentences[split:]) if part]
    return _titled(photo, compose("heading", rng), "\n".join(paragraphs), (0.045, 0.085), rng)


def listing(photo: np.ndarray, caption: str, rng: np.random.Generator) -> Scene:
    """A heading and three to six lines."""
    items = compose_several("item", int(rng.integers(3, 7)), rng)
    return _titled(photo, compose("list_heading", rng), "\n".join(items), (0.05, 0.085), rng)


def sign(photo: np.ndarray, caption: str, rng: np.random.Generator) -> Scene:
    """A framed board in front of the photo."""
    height, width = photo.shape[:2]
    wide, tall = (round(side * rng.uniform(*share)) for side, share in ((width, (0.55, 0.85)), (height, (0.26, 0.42))))
    left, top = int(rng.integers(0, width - wide + 1)), int(rng.integers(0, height - tall + 1))
    panel = _one_of(tuple(COLOURS), rng)
    frame = _one_of(PAPERS if _is_dark(panel) else ("black", "navy", "dark green", "dark red"), rng)
    edge = max(2, round(0.012 * min(height, width)))
    canvas = photo.copy()
    board = canvas[top : top + tall, left : left + wide]
    board[:] = COLOURS[panel]
    board[edge : tall - edge, edge : wide - edge] = COLOURS[frame]
    board[2 * edge : tall - 2 * edge, 2 * edge : wide - 2 * edge] = COLOURS[panel]
    inner = (left + 4 * edge, top + 3 * edge, left + wide - 4 * edge, top + tall - 3 * edge)
    text = _cased(compose("phrase", rng), rng)
    block = Block(text, inner, rng.uniform(0.08, 0.16) * min(height, width))
    return Scene(
        canvas,
        (block,),
        {"text": text, "panel": panel, "a_panel": _with_article(panel), "caption": caption},
        {"panel": panel},
    )


def poster(photo: np.ndarray, caption: str, rng: np.random.Generator) -> Scene:
    """Title and subtitle across the photo."""
    height, width = photo.shape[:2]
    side, edge = min(height, width), 0.06 * min(height, width)
    at_top = bool(rng.random() < 0.5)
    top = edge if at_top else 0.64 * height
    title, subtitle = _cased(compose("title", rng), rng), compose("subtitle", rng)
    bottom = top + 0.3 * height
    middle = top + 0.2 * height
    align = _alignment(rng)
    blocks = (
        Block(title, (edge, top, width - edge, middle), rng.uniform(0.1, 0.16) * side, align),
        Block(subtitle, (edge, middle, width - edge, bottom), rng.uniform(0.05, 0.065) * side, align),
    )
    words = {"title": title, "text": subtitle, "place": "top" if at_top else "bottom", "caption": caption}
    scrim = (0, 0, width, bottom + edge) if at_top else (0, top - edge, width, height)
    return Scene(photo.copy(), blocks, words, {"align": align}, scrim)


def caption_strip(photo: np.ndarray, caption: str, rng: np.random.Generator) -> Scene:
    """The photo, cropped a little, above or below a strip of paper with a text."""
    height, width = photo.shape[:2]
    strip = round(height * rng.uniform(*STRIP))
    paper = _one_of(("white", "black", *PAPERS), rng)
    below = bool(rng.random() < 0.7)
    cut = (strip // 2, strip - strip // 2)
    band = np.full((strip, width, 3), COLOURS[paper], np.uint8)
    kept = photo[cut[0] : height - cut[1]]
    canvas = np.vstack([kept, band] if below else [band, kept])
    edge = 0.03 * min(height, width)
    top = height - strip if below else 0
    text = caption if len(caption) <= 90 and rng.random() < 0.5 else compose("sentence", rng)
    region = (edge, top + edge / 2, width - edge, top + strip - edge / 2)
    block = Block(text, region, rng.uniform(0.05, 0.08) * min(height, width), _alignment(rng))
    words = {"text": text, "paper": paper, "place": "below" if below else "above", "caption": caption}
    return Scene(canvas, (block,), words, {"paper": paper, "align": block.align})


PLAIN: dict[str, SceneMaker] = {"word": word, "sentence": sentence, "page": page, "list": listing}
ON_PHOTO: dict[str, SceneMaker] = {"sign": sign, "poster": poster, "caption_strip": caption_strip}
SCENES: dict[str, SceneMaker] = {**PLAIN, **ON_PHOTO}


def with_scrim(scene: Scene, opacity: float, white: bool) -> np.ndarray:
    """The canvas with its scrim region pulled towards black or white, fading out at the edge."""
    assert scene.scrim is not None
    x0, y0, x1, y1 = (round(side) for side in scene.scrim)
    height, width = scene.canvas.shape[:2]
    weight = np.zeros((height, width), np.float32)
    weight[y0:y1, x0:x1] = opacity
    soft = cv2.GaussianBlur(weight, (0, 0), 0.02 * min(height, width), borderType=cv2.BORDER_REPLICATE)[..., None]
    return np.rint(scene.canvas * (1 - soft) + 255.0 * white * soft).astype(np.uint8)


def _plain(photo: np.ndarray, text: str, sizes: tuple[float, float], rng: np.random.Generator) -> Scene:
    """Text in the middle of one colour, or of two that run into each other."""
    height, width = photo.shape[:2]
    canvas, background = _background(height, width, rng)
    edge = 0.07 * min(height, width)
    region = (edge, edge, width - edge, height - edge)
    block = Block(text, region, rng.uniform(*sizes) * min(height, width), _alignment(rng))
    params = {"background": background, "align": block.align}
    return Scene(canvas, (block,), {"text": text, "background": background}, params)


def _titled(photo: np.ndarray, title: str, text: str, sizes: tuple[float, float], rng: np.random.Generator) -> Scene:
    """A heading over text that is set from the top, on paper."""
    height, width = photo.shape[:2]
    paper = _one_of(PAPERS, rng)
    side, edge = min(height, width), 0.08 * min(height, width)
    align: Align = "center" if rng.random() < 0.3 else "left"
    size = rng.uniform(*sizes) * side
    blocks = (
        Block(title, (edge, edge, width - edge, edge + 0.14 * height), 1.5 * size, align),
        Block(text, (edge, edge + 0.16 * height, width - edge, height - edge / 2), size, align, top=True),
    )
    canvas = np.full((height, width, 3), COLOURS[paper], np.uint8)
    return Scene(canvas, blocks, {"title": title, "text": text, "paper": paper}, {"paper": paper, "align": align})


def _background(height: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    if rng.random() < 0.5:
        colour = _one_of(tuple(COLOURS), rng)
        return np.full((height, width, 3), COLOURS[colour], np.uint8), f"a plain {colour} background"
    dark = bool(rng.random() < 0.5)
    alike = [name for name in COLOURS if _is_dark(name) == dark]
    first, second = (str(name) for name in rng.choice(alike, 2, replace=False))
    vertical = bool(rng.random() < 0.5)
    ramp = np.linspace(0, 1, height if vertical else width)
    share = ramp[:, None, None] if vertical else ramp[None, :, None]
    canvas = (1 - share) * np.array(COLOURS[first]) + share * np.array(COLOURS[second])
    ends = "at the top to {} at the bottom" if vertical else "on the left to {} on the right"
    words = f"a gradient from {first} {ends.format(second)}"
    return np.rint(np.broadcast_to(canvas, (height, width, 3))).astype(np.uint8), words


def _is_dark(colour: str) -> bool:
    return sum(COLOURS[colour]) < 384


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _cased(text: str, rng: np.random.Generator) -> str:
    return text.upper() if rng.random() < CAPITALS else text


def _alignment(rng: np.random.Generator) -> Align:
    return "center" if rng.random() < 0.6 else "left" if rng.random() < 0.7 else "right"


def _one_of(names: tuple[str, ...], rng: np.random.Generator) -> str:
    return str(rng.choice(names))
