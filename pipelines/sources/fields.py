"""The fields of a row (of a manifest, a sidecar, a table, a tar's JSON), read under the names a recipe gives them."""

from __future__ import annotations

import difflib
import json
import math
import unicodedata
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

from filters.optout import robots_optout, tdm_optout
from pipelines.images import MAX_SOURCE_PIXELS, BadInput, decode_mask_image
from pipelines.sources.files import SourceError
from schemas.masks import encode_rle
from schemas.records import Captions, Entity
from schemas.sources import FieldName, SourceBase

FIELD_NAMES: tuple[FieldName, ...] = get_args(FieldName)
_PROVENANCE = ("scene_id", "source_url", "license", "license_url", "author")
_TYPO_CUTOFF = 0.8

Load = Callable[[str], bytes]
"""Bytes of the file that a row names; raises BadInput where it may not or cannot be read."""


@dataclass(frozen=True)
class RowParser:
    """Reads rows of one source."""

    config: SourceBase

    @cached_property
    def names(self) -> dict[str, FieldName]:
        """Name in the source -> field. A name that the recipe gives to one field serves no other."""
        given: dict[str, FieldName] = {name: field for field, name in self.config.fields.items()}
        return {name: name for name in FIELD_NAMES if name not in self.config.fields} | given

    def rename(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Values by field; what has no meaning here is left out."""
        return {field: row[name] for name, field in self.names.items() if name in row}

    def fields(self, values: Mapping[str, Any], load: Load, folder: str = "") -> dict[str, Any]:
        """Everything of a `SourceRow` but the image.

        Args:
            values: by field, as `rename` gives them.
            load: reads masks and depth maps that are given as paths.
            folder: of the image; its scene where the recipe says `scene_from: folder`.

        Raises:
            BadInput: `bad_field`, `bad_entities`, `caption_encoding`, `caption_too_long`, or what `load` raises.
        """
        depth = values.get("depth") or b""
        if not isinstance(depth, (str, bytes)):
            raise BadInput("bad_field", f"depth is a {type(depth).__name__}, neither a path nor bytes")
        return {
            **self.provenance(values, folder),
            "captions": self._captions(values),
            "entities": _entities(values.get("entities"), load),
            "depth_png": load(depth) if isinstance(depth, str) else depth,
        }

    def provenance(self, values: Mapping[str, Any], folder: str = "") -> dict[str, Any]:
        """Scene, licence, author, source and opt-out; the recipe's defaults where the row is silent."""
        text = {name: self._text(values.get(name), name) for name in _PROVENANCE}
        scenes = {"field": text["scene_id"], "folder": folder and f"{self.config.name}/{folder}", "uid": ""}
        return {
            "scene_id": scenes[self.config.scene_from],
            "license": text["license"] or self.config.license,
            "license_url": text["license_url"] or self.config.license_url,
            "author": text["author"] or self.config.author,
            "source_url": text["source_url"],
            "optout_reason": self._optout_reason(values, text["source_url"]),
        }

    def _optout_reason(self, values: Mapping[str, Any], url: str) -> str:
        if self.config.optout:
            return "source"
        if _flag(values.get("optout")):
            return "row"
        headers, config = values.get("x_robots_tag"), self.config
        robots = robots_optout(headers, config.user_agents, config.robots_directives)
        return robots or tdm_optout(values.get("tdm_reservation"), url)

    def _captions(self, values: Mapping[str, Any]) -> Captions:
        texts = sorted(filter(None, map(self._caption, _listed(values.get("caption")))), key=len)
        short = self._caption(values.get("caption_short"))
        return Captions(
            long=texts[-1] if texts else "",
            short=short or (texts[0] if len(texts) > 1 else ""),
            alt=self._caption(values.get("alt")),
            tags=", ".join(filter(None, map(self._caption, _listed(values.get("tags"))))),
        )

    def _caption(self, value: Any) -> str:
        return clean_caption(_plain(value, "caption"), self.config.max_caption_chars)

    def _text(self, value: Any, field: str) -> str:
        return clean_caption(_plain(value, field), self.config.max_caption_chars, what="field")


def clean_caption(text: str | bytes, max_chars: int = 8000, what: str = "caption") -> str:
    """NFC text without control characters (line breaks and tabs stay) and without surrounding white space.

    Args:
        text: UTF-8 bytes, or text in which undecodable bytes stand as lone surrogates.
        max_chars: limit after cleaning.
        what: first half of the reason slugs.

    Raises:
        BadInput: `<what>_encoding` or `<what>_too_long`.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        text.encode()  # lone surrogates
    except UnicodeError as error:
        raise BadInput(f"{what}_encoding", str(error)) from error
    kept = "".join(map(_without_control, text.replace("\r\n", "\n")))
    cleaned = unicodedata.normalize("NFC", kept).strip("\ufeff \n\t").strip()
    if len(cleaned) > max_chars:
        raise BadInput(f"{what}_too_long", f"{len(cleaned)} characters, more than {max_chars}")
    return cleaned


def _without_control(char: str) -> str:
    if char in "\n\t" or unicodedata.category(char) != "Cc":
        return char
    return " " if char.isspace() else ""


def check_columns(found: Collection[str], parser: RowParser, ignore: Collection[str] = ()) -> list[str]:
    """Warnings about columns that mean nothing here.

    Raises:
        SourceError: a column that the recipe names is missing, or a name looks like a misspelt field.
    """
    require_columns(found, parser.config.fields)
    unknown = [column for column in found if column not in parser.names and column not in ignore]
    for column in unknown:
        near = difflib.get_close_matches(column.lower(), set(parser.names) - set(found), n=1, cutoff=_TYPO_CUTOFF)
        if near:
            raise SourceError(
                f"unknown column {column!r}, did you mean {near[0]!r}? Rename it, map it with "
                f"`fields: {{{parser.names[near[0]]}: {column}}}`, or list it under `ignore`"
            )
    return [f"columns without meaning here are left out: {', '.join(unknown)}"] if unknown else []


def require_columns(found: Collection[str], wanted: Mapping[FieldName, str]) -> None:
    """Raise SourceError if the source lacks a column that a field is read from."""
    for field, column in wanted.items():
        if column not in found:
            near = difflib.get_close_matches(column, found, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f" among {', '.join(found)};"
            raise SourceError(f"no column {column!r}{hint} Name the right one with `fields: {{{field}: ...}}`")


def named_files(values: Mapping[str, Any]) -> list[str]:
    """Paths of the files that a row names: its image, depth map and masks."""
    try:
        masks = [entity.get("mask") for entity in _entity_rows(values.get("entities"))]
    except (ValueError, TypeError, AttributeError, RecursionError):  # `RowParser.fields` will say so
        masks = []
    return [name for name in (values.get("image"), values.get("depth"), *masks) if isinstance(name, str)]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _plain(value: Any, field: str) -> str | bytes:
    if value is None or (isinstance(value, float) and math.isnan(value)):  # NaN: a missing text, says pandas
        return ""
    if isinstance(value, (str, bytes)):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise BadInput("bad_field", f"{field} is a {type(value).__name__}, not text")


def _flag(value: Any) -> bool:
    text = str(value).strip().lower()
    if text in ("true", "1", "1.0", "yes"):
        return True
    if text in ("false", "0", "0.0", "no", "", "none", "nan"):
        return False
    raise BadInput("bad_field", f"optout {value!r} is neither true nor false")


def _entity_rows(value: Any) -> list[Any]:
    return list(json.loads(value) if isinstance(value, str) and value else value or ())


def _entities(value: Any, load: Load) -> tuple[Entity, ...]:
    try:
        return tuple(_entity(row, load) for row in _entity_rows(value))
    except BadInput:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadInput("bad_entities", " ".join(f"{error}".split())) from error


def _entity(row: Mapping[str, Any], load: Load) -> Entity:
    given = {key: value for key, value in row.items() if value is not None}
    mask = given.pop("mask", None) or {}
    if isinstance(mask, str):
        mask = encode_rle(decode_mask_image(load(mask)))
    elif isinstance(mask, dict) and mask:
        _check_rle(mask)
    elif mask:
        _check_polygons(mask)
    for name in ("phrase", "label"):
        given[name] = clean_caption(_plain(given.get(name), name))
    if not given["phrase"]:
        raise ValueError("an entity has no phrase")
    if not all(map(math.isfinite, given["box"])):
        raise ValueError(f"box {given['box']} is not finite")
    return Entity(**given, mask=mask)


def _check_rle(mask: Mapping[str, Any]) -> None:
    counts = mask["counts"]
    if not isinstance(counts, list):
        raise ValueError("compressed run lengths are not supported, give `counts` as a list")
    height, width = mask["size"]
    if not 0 < height * width <= MAX_SOURCE_PIXELS or min(counts) < 0 or sum(counts) != height * width:
        raise ValueError(f"mask run lengths do not add up to {height}x{width}")


def _check_polygons(polygons: list[list[float]]) -> None:
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2 or not all(map(math.isfinite, polygon)):
            raise ValueError(f"a polygon needs at least three finite x, y pairs, not {polygon}")
