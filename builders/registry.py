"""The builders that a recipe can name."""

from __future__ import annotations

from builders.base import Builder
from builders.captions import Captions
from builders.condition_maps import ConditionMaps
from builders.edit_pairs import EditPairs
from builders.restoration import Restoration
from builders.style import Style
from builders.subject_crops import SubjectCrops
from builders.text_render import TextRender
from builders.try_on import TryOn

BUILDERS: dict[str, type[Builder]] = {
    b.name: b for b in (Captions, ConditionMaps, EditPairs, Restoration, Style, SubjectCrops, TextRender, TryOn)
}
