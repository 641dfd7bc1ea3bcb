"""The scorers that a recipe can name."""

from __future__ import annotations

from filters.scorers.base import Scorer
from filters.scorers.caption import Caption
from filters.scorers.classifiers import Nsfw, Watermark
from filters.scorers.clip import Clip
from filters.scorers.conse import Conse
from filters.scorers.features import Features
from filters.scorers.phash import PHash
from filters.scorers.pixels import Pixels
from filters.scorers.text import Text

# Cheap ones first: this is the order in which they run.
SCORERS: dict[str, type[Scorer]] = {
    s.name: s for s in (Pixels, PHash, Caption, Text, Features, Conse, Nsfw, Watermark, Clip)
}
