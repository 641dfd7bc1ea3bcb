"""Pictures that hold a given text."""

from builders.text_render.builder import TextRender, TextRenderParams

__all__ = ["TextRender", "TextRenderParams"]
