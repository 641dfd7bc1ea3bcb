"""Readers of the formats that images come in. `open_reader` gives the reader of a recipe's source section."""

from pipelines.sources.base import BadRow, Item, Reader, ReadySample, Row, SourceRow, open_reader
from pipelines.sources.files import SourceError

__all__ = ["BadRow", "Item", "Reader", "ReadySample", "Row", "SourceError", "SourceRow", "open_reader"]
