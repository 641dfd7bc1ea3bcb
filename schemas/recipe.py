"""The recipe: one YAML file that says what a corpus is made of. Every mistake is reported with its line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from schemas.decide import Decide
from schemas.groups import Grouping
from schemas.latents import Latents
from schemas.pairs import Pairing
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


class Pack(Section):
    """How samples become shards."""

    shard_bytes: int = Field(
        default=512 * _MIB, ge=1 << 16, description="target size of a shard in bytes, or e.g. `512MiB`"
    )

    @field_validator("shard_bytes", mode="before", json_schema_input_type=int | str)
    @classmethod
    def _parse_size(cls, value: Any) -> Any:
        match = re.fullmatch(r"(\d+)\s*([KMG])iB", value) if isinstance(value, str) else None
        return int(match[1]) << {"K": 10, "M": 20, "G": 30}[match[2]] if match else value


class Recipe(Section):
    """A corpus. `score`, `annotate` and `build` have one section per scorer, annotator and builder.

    `recipe_model` types them.
    """

    name: str = Field(pattern=r"[a-z0-9][a-z0-9_-]*", description="of the corpus: small letters, digits, - and _")
    description: str = Field(default="", description="what it is, for people")
    seed: int = Field(default=0, ge=0, description="of every random choice, with the image's key and the builder")
    sources: tuple[Source, ...] = Field(min_length=1, description="where images come from, by `type`")
    ingest: Ingest = Field(default=Ingest(), description="how sources become normalised images")
    score: Any = Field(default=None, description="a section per scorer: columns that are measured once per image")
    decide: Decide = Field(default=Decide(), description="which images stay: queries over columns")
    annotate: Any = Field(default=None, description="a section per annotator: what models find in images, once")
    pair: Pairing | None = Field(
        default=None, exclude_if=lambda section: section is None, description="which photographs show the same subject"
    )
    build: Any = Field(description="a section per builder: the samples that are made")
    group: Grouping | None = Field(
        default=None, exclude_if=lambda section: section is None, description="samples as examples for one another"
    )
    pack: Pack = Field(default=Pack(), description="how samples become shards")
    latents: Latents | None = Field(
        default=None, exclude_if=lambda section: section is None, description="images encoded for training beforehand"
    )
    _file: str = PrivateAttr("recipe")
    _lines: dict[tuple[Any, ...], int] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _names_are_unique(self) -> Recipe:
        names = [s.name for s in self.sources]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"two sources are named {', '.join(twice)}")
        return self

    def builders(self) -> dict[str, Any]:
        """Parameters of the builders that the recipe asks for, by name, in a fixed order."""
        return _given(self.build)

    def scorers(self) -> dict[str, Any]:
        """Parameters of the scorers that the recipe asks for, by name, in a fixed order."""
        return _given(self.score)

    def annotators(self) -> dict[str, Any]:
        """Parameters of the annotators that the recipe asks for, by name, in a fixed order."""
        return _given(self.annotate)

    def error(self, path: Sequence[Any], problem: str) -> RecipeError:
        """A mistake in the value at `path` (`("score", "clip", "model")`), with the line where it stands."""
        return RecipeError(_locate(path, problem, self._lines, self._file))


def _given(section: BaseModel) -> dict[str, Any]:
    values = {name: getattr(section, name) for name in type(section).model_fields}
    return {name: params for name, params in values.items() if params is not None}


def recipe_model(
    builder_params: Mapping[str, type[BaseModel]],
    scorer_params: Mapping[str, type[BaseModel]],
    annotator_params: Mapping[str, type[BaseModel]] = MappingProxyType({}),
) -> type[Recipe]:
    """`Recipe` with typed `build`, `score` and `annotate` sections for these builders, scorers and annotators."""
    typed = {"build": builder_params, "score": scorer_params, "annotate": annotator_params}
    fields: dict[str, Any] = {}
    for name, params in typed.items():
        section, generic = _sections(name.capitalize(), params), Recipe.model_fields[name]
        default: Any = {} if generic.is_required() else {"default": section()}
        fields[name] = (section, Field(description=generic.description, **default))
    return create_model("Recipe", __base__=Recipe, **fields)


def _sections(name: str, params: Mapping[str, type[BaseModel]]) -> type[Section]:
    optional: dict[str, Any] = {key: (section | None, None) for key, section in params.items()}
    return create_model(name, __base__=Section, **optional)


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
    for section in ("pair", "group", "latents"):
        if section in data and data[section] is None:
            data[section] = {}
    for section in (
        "score",
        "annotate",
        "build",
    ):  # `captions:` with nothing behind it asks for the builder with its defaults
        given = data.get(section) or {}
        data[section] = {k: {} if v is None else v for k, v in given.items()} if isinstance(given, dict) else given
    try:
        recipe = model.model_validate(data)
        recipe._file, recipe._lines = file, lines
        return recipe
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
    last = str(error["loc"][-1]) if error["loc"] else ""
    match error["type"]:
        case "extra_forbidden":
            problem = "unknown key" + did_you_mean(last, known)
        case "literal_error" | "union_tag_invalid":
            expected = error["ctx"].get("expected") or error["ctx"]["expected_tags"]
            given = error["ctx"].get("tag", error["input"])
            problem = f"{given!r} is not one of {expected}" + did_you_mean(
                str(given), set(re.findall(r"'([^']+)'", expected))
            )
        case "missing":
            problem = f"key {last!r} is missing"
        case _:
            problem = f"{error['msg']} (got {error['input']!r:.80})"
    return _locate(error["loc"], problem, lines, file)


def _locate(path: Sequence[Any], problem: str, lines: Mapping[tuple[Any, ...], int], file: str) -> str:
    """`file:line: key: problem`, at the innermost key on the path that stands in the file."""
    if not lines:  # made from values
        return f"{file}: {'.'.join(map(str, path))}: {problem}"
    here: tuple[Any, ...] = ()
    for part in path:  # pydantic adds union tags to the location; only what stands in the file counts
        if (*here, part) in lines:
            here = (*here, part)
    where = ".".join(map(str, here))
    return f"{file}:{lines.get(here, 1)}: {where + ': ' if where else ''}{problem}"


def did_you_mean(name: str, known: Collection[str]) -> str:
    """`; did you mean 'x'?`, or nothing."""
    near = difflib.get_close_matches(name, sorted(known), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def _property_names(model: type[BaseModel]) -> set[str]:
    schema = model.model_json_schema()
    sections = [schema, *schema.get("$defs", {}).values()]
    return {name for section in sections for name in section.get("properties", {})}
