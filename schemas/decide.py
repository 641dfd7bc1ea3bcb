"""The `decide` section of a recipe: which images are used. A changed rule runs no model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

MAX_RADIUS = 10  # of 64 bits; two unrelated perceptual hashes differ in 32 on average


class Rules(BaseModel):
    """Base of the parts of this section: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Filter(Rules):
    """Keeps images by the value of one column; a value equal to the bound stays.

    Attributes:
        column: numeric: of a scorer, of the image (`width`, `height`), or `min_side` (pixels), `aspect` (longer side
            / shorter side), `pixels`.
        min, max: absolute bounds.
        min_quantile, max_quantile: bounds relative to all images that reach this filter: `min_quantile: 0.3` drops
            the lowest 30 %, `max_quantile: 0.9` the highest 10 %. Equal values are never torn apart.
        unknown: what becomes of an image without a value.
    """

    column: str = Field(min_length=1)
    min: float | None = Field(default=None, allow_inf_nan=False)
    max: float | None = Field(default=None, allow_inf_nan=False)
    min_quantile: float | None = Field(default=None, gt=0, lt=1)
    max_quantile: float | None = Field(default=None, gt=0, lt=1)
    unknown: Literal["keep", "drop"] = "drop"

    @model_validator(mode="after")
    def _has_one_bound(self) -> Filter:
        names = ("min", "max", "min_quantile", "max_quantile")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(
                f"a filter has exactly one of {', '.join(names)}, here: {found}; two bounds are two filters"
            )
        return self


class PerceptualDedup(Rules):
    """Images whose perceptual hashes (scorer `phash`) differ in at most `radius` bits: all such pairs, exactly."""

    radius: int = Field(
        default=6, ge=0, le=MAX_RADIUS, description="bits of 64; 6 finds copies, 10 also crops and edits"
    )


class SemanticDedup(Rules):
    """Images whose embeddings have at least this cosine: a higher threshold drops fewer.

    Attributes:
        column: of embeddings.
        threshold: cosine, at least. SemDeDup calls 1 - threshold epsilon: a larger epsilon drops more (its README
            says the reverse).
        cluster_images: images are compared within clusters of about this many. A corpus of at most as many is
            compared exactly; in a larger one, pairs that straddle two clusters are missed.
    """

    column: str = Field(min_length=1)
    threshold: float = Field(default=0.95, gt=0, le=1)
    cluster_images: int = Field(default=10_000, ge=1)


class Dedup(Rules):
    """Of images that are nearly the same, the best stays.

    Attributes:
        prefer: numeric columns; the image with the larger value stays, the first column that differs decides, an
            image without a value comes last, and of equal ones the smallest uid stays.
    """

    perceptual: PerceptualDedup | None = None
    semantic: SemanticDedup | None = None
    prefer: tuple[str, ...] = ("pixels",)

    @field_validator("perceptual", "semantic", mode="before")
    @classmethod
    def _empty_means_defaults(cls, value: Any) -> Any:
        return {} if value is None else value  # `perceptual:` with nothing behind it

    @model_serializer(mode="wrap")
    def _leave_out_what_is_off(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in fields(self).items() if value is not None}


class BlockList(Rules):
    """Images that must not be trained on: benchmarks, bans.

    Attributes:
        path: a local path or any fsspec URL; a relative one starts at the recipe's folder.
    """

    path: str = Field(min_length=1)


class Sha256List(BlockList):
    """One sha256 of source bytes per line, 64 hexadecimal digits (`sha256sum *` writes such a file)."""

    kind: Literal["sha256"] = "sha256"


class PHashList(BlockList):
    """One perceptual hash per line, 16 hexadecimal digits; bans images within `radius` bits of one."""

    kind: Literal["phash"] = "phash"
    radius: int = Field(default=6, ge=0, le=MAX_RADIUS)


class EmbeddingList(BlockList):
    """Vectors as `.npy` [n, d] or the first list column of a `.parquet`; bans images whose embedding has at least
    this cosine with one of them. They must come from the model that made `column`."""

    kind: Literal["embedding"] = "embedding"
    column: str = Field(min_length=1)
    threshold: float = Field(default=0.95, gt=0, le=1)


class NgramList(BlockList):
    """One prompt per line; bans images with a caption that shares `n` consecutive words with one.

    Case, punctuation and spacing do not count. A prompt of fewer words bans only captions that are exactly it.
    """

    kind: Literal["ngram"] = "ngram"
    n: int = Field(default=13, ge=1)


class CanaryList(BlockList):
    """One string per line; bans images with a caption or alt text that contains it, in any case."""

    kind: Literal["canary"] = "canary"


AnyBlockList = Annotated[Sha256List | PHashList | EmbeddingList | NgramList | CanaryList, Field(discriminator="kind")]


class Splits(Rules):
    """Shares of scenes held out. All samples of one scene are in one split."""

    val: float = Field(default=0.0, ge=0, lt=1)
    test: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _leaves_training_data(self) -> Splits:
        if self.val + self.test >= 1:
            raise ValueError("val + test must be below 1")
        return self


class Decide(Rules):
    """Which images are used: opt-outs and licences, then block lists, filters and duplicates, in this order.

    Attributes:
        licenses: allow-list; empty allows all.
        filters: tried in order. Naming any replaces the default ones.
        blocklists: decontamination and bans.
        dedup: near duplicates. Equal files are dropped in any case.
    """

    licenses: tuple[str, ...] = ()
    filters: tuple[Filter, ...] = (Filter(column="min_side", min=64), Filter(column="aspect", max=3))
    dedup: Dedup = Dedup()
    blocklists: tuple[AnyBlockList, ...] = ()
    splits: Splits = Splits()
