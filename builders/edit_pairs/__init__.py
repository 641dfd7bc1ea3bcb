"""Edit pairs from photographs."""

from builders.edit_pairs.builder import EditPairs, EditPairsParams

__all__ = ["EditPairs", "EditPairsParams"]
