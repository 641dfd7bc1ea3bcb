"""The annotators that a recipe can name."""

from __future__ import annotations

from builders.annotators.annotator import Annotator
from builders.annotators.caption import Caption
from builders.annotators.controlnet import Edges, LineartAnime, LineartRealistic, Mlsd, SoftEdges
from builders.annotators.crop_features import CropFeatures
from builders.annotators.depth import DepthEstimator
from builders.annotators.entities import Entities
from builders.annotators.garments import Garments
from builders.annotators.normals import NormalEstimator
from builders.annotators.ocr import Ocr
from builders.annotators.pose import PoseEstimator
from builders.annotators.semantic import SemanticSegmenter

# Those that others need come first.
ANNOTATORS: dict[str, type[Annotator]] = {
    annotator.name: annotator
    for annotator in (
        Caption,
        Entities,
        Garments,
        CropFeatures,
        Ocr,
        SoftEdges,
        Edges,
        LineartRealistic,
        LineartAnime,
        Mlsd,
        DepthEstimator,
        NormalEstimator,
        SemanticSegmenter,
        PoseEstimator,
    )
}
