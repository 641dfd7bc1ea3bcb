"""What every builder has in common."""

from __future__ import annotations

from typing import Any

from builders.base import joint_rights
from schemas.records import ImageRecord


def test_rights_of_several_parents_are_joined_once_each() -> None:
    def parent(**fields: Any) -> ImageRecord:
        return ImageRecord(uid="0" * 64, width=8, height=8, **fields)

    rights = joint_rights(
        [
            parent(license="CC0-1.0", author="A", source_url="https://a"),
            parent(license="CC-BY-4.0", author="B", optout=True),
            parent(license="CC0-1.0", author="A"),
            parent(),
        ]
    )
    assert rights == {
        "license": "CC-BY-4.0 AND CC0-1.0",
        "license_url": "",
        "author": "A; B",
        "source_url": "https://a",
        "optout": True,
    }
