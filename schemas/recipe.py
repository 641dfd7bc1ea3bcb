"""The recipe: one YAML file that says what a corpus is made of. Every mistake is reported with its line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator, model_validator

from schemas.sources import Source

_MIB = 1 << 20


class RecipeError(ValueError):
    """The recipe is wrong; the message has one `file:line: key: problem` per mistake."""


class Section(BaseModel):
    """Base of all recipe sections: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Ingest(Section):
    """How sources become normalised images."""

    unit_rows: int = Field(default=1000, ge=1, description="rows per unit: what is lost at most when a worker dies")
    max_pixels: int = Field(default=1 << 20, ge=64, description="larger images are scaled down to this many pixels")
    max_source_pixels: int = Field(
        default=178_956_970, ge=64, description="images whose header says more are quarantined"
    )


class Splits(Section):
    """Shares of scenes held out. All samples of one scene are in one split."""

    val: float = Field(default=0.0, ge=0, lt=1)
    test: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _leaves_training_data(self) -> Splits:
        if self.val + self.test >= 1:
            raise ValueError("val + test must be below 1")
        return self


class Decide(Section):
    """Which images are used. Changing a rule runs no model and rebuilds only the units it changes."""

    min_side: int = Field(default=64, ge=1, description="shorter side in pixels, at least")
    max_aspect: float = Field(default=3.0, ge=1, description="longer side / shorter side, at most")
    licenses: tuple[str, ...] = Field(default=(), description="allow-list of licences; empty allows all")
    splits: Splits = Splits()


class Pack(Section):
    """How samples become shards."""

    shard_bytes: int = Field(
        default=512 * _MIB, ge=1 << 16, description="target size of a shard in bytes, or e.g. `512MiB`"
    )

    @field_validator("shard_bytes", mode="before")
    @classmethod
    def _parse_size(cls, value: Any) -> Any:
        match = re.fullmatch(r"(\d+)\s*([KMG])iB", value) if isinstance(value, str) else None
        return int(match[1]) << {"K": 10, "M": 20, "G": 30}[match[2]] if match else value


class Recipe(Section):
    """A corpus. `build` has one section per builder; `recipe_model` types it from the builders there are."""

    name: str = Field(pattern=r"[a-z0-9][a-z0-9_-]*")
    description: str = ""
    seed: int = Field(default=0, ge=0)
    sources: tuple[Source, ...] = Field(min_length=1)
    ingest: Ingest = Ingest()
    decide: Decide = Decide()
    build: Any
    pack: Pack = Pack()

    @model_validator(mode="after")
    def _names_are_unique(self) -> Recipe:
        names = [s.name for s in self.sources]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"two sources are named {', '.join(twice)}")
        return self

    def builders(self) -> dict[str, Any]:
        """Parameters of the builders that the recipe asks for, by name, in a fixed order."""
        given = {name: getattr(self.build, name) for name in type(self.build).model_fields}
        return {name: params for name, params in given.items() if params is not None}


def recipe_model(builder_params: Mapping[str, type[BaseModel]]) -> type[Recipe]:
    """`Recipe` with a typed `build` section for these builders."""
    optional: dict[str, Any] = {name: (params | None, None) for name, params in builder_params.items()}
    build = create_model("Build", __base__=Section, **optional)
    return create_model("Recipe", __base__=Recipe, build=(build, ...))


def parse_recipe(text: str, model: type[Recipe], file: str = "recipe") -> Recipe:
    """Read a recipe.

    Args:
        text: YAML.
        model: from `recipe_model`.
        file: named in messages.

    Raises:
        RecipeError: not YAML, a key given twice, an unknown key or a bad value.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: not YAML: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{file}:1: a recipe is a mapping of keys to values")
    lines: dict[tuple[Any, ...], int] = {}
    _collect_lines(node, (), lines, file)
    # `captions:` with nothing behind it asks for the builder with its defaults.
    data["build"] = {k: {} if v is None else v for k, v in (data.get("build") or {}).items()}
    try:
        return model.model_validate(data)
    except ValidationError as error:
        known = _property_names(model)
        raise RecipeError("\n".join(_describe(e, lines, known, file) for e in error.errors())) from error


def load_recipe(path: str | Path, model: type[Recipe]) -> Recipe:
    """`parse_recipe` of a file.

    Raises:
        RecipeError: the file cannot be read, or see `parse_recipe`.
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot read the recipe: {error}") from error
    return parse_recipe(text, model, str(path))


def _collect_lines(node: yaml.Node, path: tuple[Any, ...], lines: dict[tuple[Any, ...], int], file: str) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for i, child in enumerate(node.value):
            _collect_lines(child, (*path, i), lines, file)
    elif isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            here = (*path, key.value)
            if here in lines:
                raise RecipeError(f"{file}:{key.start_mark.line + 1}: key {key.value!r} is given twice")
            lines[here] = key.start_mark.line + 1
            _collect_lines(child, here, lines, file)


def _describe(error: Any, lines: dict[tuple[Any, ...], int], known: set[str], file: str) -> str:
    path: tuple[Any, ...] = ()
    for part in error["loc"]:  # pydantic adds union tags to the location; only what stands in the file counts
        if (*path, part) in lines:
            path = (*path, part)
    last = str(error["loc"][-1]) if error["loc"] else ""
    where = ".".join(map(str, path))
    match error["type"]:
        case "extra_forbidden":
            problem = "unknown key" + _suggest(last, known)
        case "literal_error" | "union_tag_invalid":
            expected = error["ctx"].get("expected") or error["ctx"]["expected_tags"]
            given = error["ctx"].get("tag", error["input"])
            problem = f"{given!r} is not one of {expected}" + _suggest(
                str(given), set(re.findall(r"'([^']+)'", expected))
            )
        case "missing":
            problem = f"key {last!r} is missing"
        case _:
            problem = f"{error['msg']} (got {error['input']!r:.80})"
    return f"{file}:{lines.get(path, 1)}: {where + ': ' if where else ''}{problem}"


def _suggest(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def _property_names(model: type[BaseModel]) -> set[str]:
    schema = model.model_json_schema()
    sections = [schema, *schema.get("$defs", {}).values()]
    return {name for section in sections for name in section.get("properties", {})}
