"""The builders that a recipe can name."""

from __future__ import annotations

from builders.base import Builder
from builders.captions import Captions
from builders.condition_maps import ConditionMaps
from builders.edit_pairs import EditPairs
from builders.restoration import Restoration
from builders.style import Style
from builders.text_render import TextRender

BUILDERS: dict[str, type[Builder]] = {
    b.name: b for b in (Captions, ConditionMaps, EditPairs, Restoration, Style, TextRender)
}
