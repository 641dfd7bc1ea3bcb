"""The recipe reference, made from the models that check recipes, so that it cannot say something else than they do."""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from builders.annotators.registry import ANNOTATORS
from builders.registry import BUILDERS
from filters.scorers.registry import SCORERS
from pipelines.recipes import RECIPE
from schemas.models import ModelParams
from schemas.sources import SourceBase

_HEAD = """# Recipe reference

Every section and key that a recipe can have, made by `x2i schema --markdown` from the code that checks recipes.
`x2i schema` prints the same as JSON Schema, which editors use to complete and check YAML as it is typed. Keys without a
default must be given. A section written as `name:` with nothing behind it takes all of its defaults.
"""
_SHARED: dict[type[BaseModel], str] = {SourceBase: "Keys of every source", ModelParams: "Keys of every model"}
_LONGEST_DEFAULT = 400
_ATTRIBUTE = re.compile(r"^(\w+(?:, \w+)*): ")


def markdown() -> str:
    """The whole reference as Markdown."""
    parts = [_HEAD, *(_section(title, base) for base, title in _SHARED.items())]
    parts += [_section(title, model) for title, model in _sections(RECIPE, "")]
    return "\n".join(parts)


def _sections(model: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """A model and those inside it, each with where it stands in a recipe."""
    yield path, model
    for name, info in model.model_fields.items():
        inner = list(_models_in(info.annotation))
        for found in inner:
            kind = found.model_fields.get("type") if len(inner) > 1 else None
            suffix = f" (`type: {kind.default}`)" if kind and kind.default is not PydanticUndefined else ""
            suffix = suffix or (f" ({found.__name__})" if len(inner) > 1 else "")
            yield from _sections(found, f"{path}.{name}".strip(".") + suffix)


def _section(title: str, model: type[BaseModel]) -> str:
    prose, attributes = _read_docstring(model)
    fields, shared = _fields(model)
    path, _, kind = title.partition(" ")
    heading = title if model in _SHARED else f"`{path}` {kind}".strip() if title else "The recipe"
    lines = [f"{'#' * min(2 + path.count('.'), 5)} {heading}", ""]
    lines += [line for text in (*_component(path), prose) if text for line in (text, "")]
    if shared:
        anchor = shared.lower().replace(" ", "-")
        lines += [f"It has the [{shared[0].lower()}{shared[1:]}](#{anchor}){', and:' if fields else '.'}", ""]
    if fields:
        lines += ["| key | value | default | |", "|---|---|---|---|"]
    for name, info in fields.items():
        text = " ".join(filter(None, (info.description or "", attributes.get(name, ""))))
        cells = (f"`{name}`", _type_name(info.annotation), _default(info), text)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _component(path: str) -> list[str]:
    """What the scorer, annotator or builder at this place does."""
    registries: dict[str, Mapping[str, Any]] = {"score": SCORERS, "annotate": ANNOTATORS, "build": BUILDERS}
    section, _, name = path.partition(".")
    if name not in registries.get(section, {}):
        return []
    kind = registries[section][name]
    return [inspect.cleandoc(kind.__doc__ or "")]


def _fields(model: type[BaseModel]) -> tuple[dict[str, FieldInfo], str]:
    """The keys to list for a model, and where the others are listed."""
    base = next((b for b in _SHARED if issubclass(model, b) and model is not b), None)
    if base is None:
        return model.model_fields, ""
    own = {name: f for name, f in model.model_fields.items() if f is not base.model_fields.get(name)}
    changed = {name for name, info in own.items() if repr(info) != repr(base.model_fields.get(name))}
    return {name: info for name, info in own.items() if name in changed}, _SHARED[base]


def _read_docstring(model: type[BaseModel]) -> tuple[str, dict[str, str]]:
    """Prose, and the text of each attribute. Attributes that a base class describes count as well."""
    attributes: dict[str, str] = {}
    for base in reversed([c for c in model.__mro__ if issubclass(c, BaseModel) and c is not BaseModel]):
        attributes |= _split(base.__dict__.get("__doc__") or "")[1]
    own = "" if model is RECIPE else inspect.cleandoc(model.__dict__.get("__doc__") or "")
    says_nothing = own.startswith(("Base of a", "Parameters of ", "The `"))  # where the component says what it does
    prose = _split(own)[0]
    return prose.partition("\n\n")[2] if says_nothing else prose, attributes


def _split(docstring: str) -> tuple[str, dict[str, str]]:
    prose, _, listed = re.sub(r"\nArgs:\n", "\nAttributes:\n", inspect.cleandoc(docstring)).partition("\nAttributes:\n")
    found, names = dict[str, str](), list[str]()
    for line in listed.splitlines():
        text = line.strip()
        if match := _ATTRIBUTE.match(text) if line.startswith("    ") and line[4:5] != " " else None:
            names, text = match[1].split(", "), text[match.end() :]
        for name in names:
            found[name] = f"{found.get(name, '')} {text}".strip()
    return prose.strip(), found


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not Literal:
        for argument in get_args(annotation):
            yield from _models_in(argument)


def _type_name(annotation: Any) -> str:
    """A type as someone who writes YAML thinks of it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(f"`{value}`" for value in arguments)
    names = [_type_name(a) for a in arguments if a is not Ellipsis] if origin is not Annotated else []
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(names))
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"[{', '.join(names)}]"
    if origin in (tuple, list, frozenset, set):
        return f"list of {names[0]}"
    if origin is dict:
        return f"{names[0]}: {names[1]}"
    return _type_name(arguments[0]) if origin is Annotated else _plain_name(annotation)


def _plain_name(annotation: Any) -> str:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null", Any: "any"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)).lower())


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "**required**"
    value = TypeAdapter(Any).dump_python(info.get_default(call_default_factory=True), mode="json")  # type: ignore[call-arg]
    if isinstance(info.default, BaseModel) or value in (None, "", [], {}):
        return ""
    text = json.dumps(value, ensure_ascii=False)
    return f"`{text}`" if len(text) <= _LONGEST_DEFAULT else "*see the code*"
