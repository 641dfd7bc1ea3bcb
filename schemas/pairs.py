"""The `pair` section of a recipe: which photographs show one and the same subject."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from schemas.models import VisionLanguageParams

PROMPT = (
    "The picture shows two photos side by side. Is the {noun} on the left the very same {noun} as the one on the "
    "right: the same individual or item, and not just a similar one? Answer yes or no."
)


class Judge(VisionLanguageParams):
    """A vision-language model looks at every pair that is about to be used.

    Photographs of one `subject_id` are cross-verified as OmniGen did its web images: each is asked against some
    others, and one that is recognised in too few of them leaves the subject. Other pairs need a yes of their own.
    """

    others: int = Field(default=4, ge=1, description="photographs of its subject that one is asked against")
    min_yes: float = Field(default=0.5, ge=0, le=1, description="least share of them in which it is recognised")
    prompt: str = Field(default=PROMPT, pattern=r"(?s)^[^{}]*(\{noun\}[^{}]*)*$", description="`{noun}`: what it is")
    max_tokens: int = Field(default=8, ge=1)


class Pairing(BaseModel):
    """Which entities of different photographs are taken for the same subject: those with one `subject_id`, and those
    with one noun that look alike.

    A similarity is the cosine of the embeddings that `crop_features` found. Nearly equal crops are copies, from which
    a model learns to paste, so the band has an upper end for every pair.

    Attributes:
        band: cosine of crops with one noun: below they are strangers, above copies. Without a value it is that of
            the model: 0.60 to 0.95 for DINOv2 and its like, 0.70 to 0.90 for `efficientnet-lite0`.
        min_similarity: least cosine of crops with one `subject_id`, whom the source vouches for. Raise it where
            strangers are mixed in.
        radius: photographs, or crops, whose perceptual hashes differ in at most so many bits are one picture, mirrored
            or not.
        max_per_image: pairs in which one photograph is the target.
        max_reuse: pairs in which one photograph is the reference.
        candidates: how many of the most similar crops are considered for each.
        cluster_crops: crops of one noun are compared within clusters of about this many. A noun with at most as many
            is compared exactly; of others, pairs that straddle two clusters are missed.
        judge: asks a vision-language model about each pair.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    band: tuple[float, float] | None = None
    min_similarity: float = Field(default=0.0, ge=-1, le=1)
    radius: int = Field(default=8, ge=0, le=32)
    max_per_image: int = Field(default=4, ge=1)
    max_reuse: int = Field(default=4, ge=1)
    candidates: int = Field(default=8, ge=1)
    cluster_crops: int = Field(default=10_000, ge=2)
    judge: Judge | None = None

    @model_validator(mode="after")
    def _band_is_ordered(self) -> Pairing:
        if self.band and not -1 <= self.band[0] < self.band[1] <= 1:
            raise ValueError(f"band: {list(self.band)} is not [low, high] with -1 <= low < high <= 1")
        return self
