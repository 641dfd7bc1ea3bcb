"""Line drawings and soft edges by the networks of controlnet_aux, with weights from a hub id or a directory.

The library scales every photo to multiples of 64 and returns maps of that size. Here a photo is scaled (both sides by
the same factor), padded to such multiples, and the map cut and scaled back, so that a line stays on its pixel. Its
`Processor`, which writes into parameters that all processors share and returns JPEG bytes, is not used; nor is a
network ever downloaded without its commit, which the library has no argument for.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
from pydantic import Field, model_validator

from builders.annotators.annotator import Artefact
from builders.annotators.maps import controlnet_aux
from builders.annotators.model import ModelAnnotator
from builders.base import SourceImage
from filters.models import Checkpoint, Choice, device_of, inference
from schemas.codec import encode_png
from schemas.models import ModelParams

MULTIPLE = 64  # what controlnet_aux rounds both sides to
MAX_ASPECT = 4  # the longer side is at most this many times `resolution`, so that a strip stays affordable


class SizedParams(ModelParams):
    """Parameters of a network that looks at a photo at a size of its own."""

    resolution: int = Field(512, ge=64, description="shorter side, in pixels, at which the network sees the photo")


class ControlnetParams(SizedParams):
    """Parameters of a network of controlnet_aux."""

    @model_validator(mode="after")
    def _has_full_precision(self) -> ControlnetParams:
        check_precision(self)
        return self


def check_precision(params: ModelParams) -> None:
    """Raise ValueError for half precision: controlnet_aux hands every result to NumPy, which has no bfloat16."""
    if params.dtype not in ("auto", "float32"):
        raise ValueError(f"dtype: controlnet_aux computes in float32, not {params.dtype}")


@dataclass(frozen=True)
class Detector:
    """A class of controlnet_aux and the files that its `from_pretrained` opens."""

    name: str
    weights: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()

    @property
    def files(self) -> tuple[Choice, ...]:
        return tuple((file,) for file in self.weights)

    def load(self, checkpoint: Checkpoint, params: ModelParams) -> Any:
        """A detector by its own `from_pretrained(directory)`, in evaluation mode, on its device.

        Raises:
            ModelMissing: no such model; weights of another network; or a pickle that holds more than tensors, which
                torch refuses to open.
        """
        import torch

        folder = checkpoint.fetch(self.weights)
        try:
            with quiet(), torch.random.fork_rng(devices=[]):  # networks are filled with random numbers first
                detector = getattr(controlnet_aux(), self.name).from_pretrained(str(folder), **dict(self.options))
        except (OSError, RuntimeError, KeyError, AttributeError, pickle.UnpicklingError) as error:
            reason = str(error).strip()[:300]  # torch lists every tensor that does not fit
            raise checkpoint.missing(f"{self.name} cannot load {' and '.join(self.weights)}: {reason}") from error
        for part in vars(detector).values():
            if isinstance(part, torch.nn.Module):
                part.eval()  # TEED comes in training mode
        return detector.to(device_of(params))


HED = Detector("HEDdetector", ("ControlNetHED.pth",))
PIDINET = Detector("PidiNetDetector", ("table5_pidinet.pth",))
TEED = Detector("TEEDdetector", ("5_model.pth",), (("filename", "5_model.pth"),))
LINEART = Detector("LineartDetector", ("sk_model.pth", "sk_model2.pth"))
LINEART_ANIME = Detector("LineartAnimeDetector", ("netG.pth",))
MLSD = Detector("MLSDdetector", ("mlsd_large_512_fp32.pth",))
OPENPOSE = Detector("OpenposeDetector", ("body_pose_model.pth", "hand_pose_model.pth", "facenet.pth"))
NORMALBAE = Detector("NormalBaeDetector", ("scannet.pt",))
MIDAS = Detector("MidasDetector", ("dpt_hybrid-midas-501f0c75.pt",))
ZOE = Detector("ZoeDetector", ("ZoeD_M12_N.pt",))
LERES = Detector("LeresDetector", ("res101.pth", "latest_net_G.pth"))


class Drawing(ModelAnnotator):
    """A gray picture, light on black, drawn by one network: member `<name>.png`, uint8 of exactly the photo's size.

    Attributes:
        multiple: sides that the network sees are multiples of this.
    """

    version = "1"
    Params: ClassVar[type[ModelParams]] = ControlnetParams
    params: ControlnetParams
    multiple: ClassVar[int] = MULTIPLE

    @property
    @abstractmethod
    def detector(self) -> Detector:
        """What draws."""

    @property
    def options(self) -> dict[str, Any]:
        """Further arguments of the drawing call."""
        return {}

    @property
    def files(self) -> tuple[Choice, ...]:
        return self.detector.files

    def annotate(self, images: Sequence[SourceImage]) -> list[Artefact]:
        return [self.found({f"{self.name}.png": encode_png(self._draw(image.pixels))}) for image in images]

    @cached_property
    def _network(self) -> Any:
        return self.detector.load(self.checkpoint, self.params)

    def _draw(self, pixels: np.ndarray) -> np.ndarray:
        seen, size = fit(pixels, self.params.resolution, self.multiple)
        drawn = call(self._network, seen, self.params, **self.options)[..., 0]
        return unfit(drawn, size, pixels.shape[:2])


class SoftEdges(Drawing):
    """Holistically-nested edges (Xie & Tu, ICCV 2015) with ControlNet's weights."""

    name = "softedge"
    detector = HED


class EdgesParams(ControlnetParams):
    """PiDiNet (Su et al., ICCV 2021) or TEED (Soria et al., ICCVW 2023)."""

    detector: Literal["pidinet", "teed"] = "pidinet"


class Edges(Drawing):
    """Edges by a network smaller than HED."""

    name = "edges"
    Params: ClassVar[type[ModelParams]] = EdgesParams
    params: EdgesParams

    @property
    def detector(self) -> Detector:
        return {"pidinet": PIDINET, "teed": TEED}[self.params.detector]


class LineartRealisticParams(ControlnetParams):
    """`coarse` draws fewer, bolder lines, with the second network of the same model."""

    coarse: bool = False


class LineartRealistic(Drawing):
    """Informative drawings (Chan et al., CVPR 2022), white on black."""

    name = "lineart_realistic"
    Params: ClassVar[type[ModelParams]] = LineartRealisticParams
    params: LineartRealisticParams
    detector = LINEART

    @property
    def options(self) -> dict[str, Any]:
        return {"coarse": self.params.coarse}


class LineartAnime(Drawing):
    """Lines as an animator would draw them, white on black. The network wants multiples of 256."""

    name = "lineart_anime"
    detector = LINEART_ANIME
    multiple = 256


class MlsdParams(ControlnetParams):
    """Segments need `min_score` and, in pixels of half the resolution, `min_length`."""

    min_score: float = Field(0.1, gt=0, lt=1)
    min_length: float = Field(0.1, gt=0)


class Mlsd(ModelAnnotator):
    """Straight line segments (M-LSD: Gu et al., AAAI 2022): `data["lines"]`, each [x0, y0, x1, y1] in pixels."""

    name = "mlsd"
    version = "1"
    Params: ClassVar[type[ModelParams]] = MlsdParams
    params: MlsdParams

    @property
    def files(self) -> tuple[Choice, ...]:
        return MLSD.files

    def annotate(self, images: Sequence[SourceImage]) -> list[Artefact]:
        return [self.found({}, lines=self._lines(image.pixels)) for image in images]

    @cached_property
    def _network(self) -> Any:
        return MLSD.load(self.checkpoint, self.params).model

    def _lines(self, pixels: np.ndarray) -> list[list[float]]:
        seen, size = fit(pixels, self.params.resolution, MULTIPLE)
        height, width = pixels.shape[:2]
        # The library's own call takes every error of the network for a photo without lines.
        with inference(self.params):
            ends = _segments(seen, self._network, self.params.min_score, self.params.min_length).reshape(-1, 2, 2)
        inside = (ends.mean(1) < (size[1], size[0])).all(1)  # not in the padding
        on_photo = (ends[inside] + 0.5) * (width / size[1], height / size[0]) - 0.5
        return np.round(on_photo.clip(0, (width - 1, height - 1)), 2).reshape(-1, 4).tolist()


def _segments(pixels: np.ndarray, network: Any, min_score: float, min_length: float) -> np.ndarray:
    """float [n, 4] of (x0, y0, x1, y1); none where the library finds an empty list and indexes it."""
    from controlnet_aux.mlsd.utils import pred_lines

    try:
        return np.asarray(pred_lines(pixels, network, list(pixels.shape[:2]), min_score, min_length), float)
    except IndexError:
        return np.empty((0, 4))


def call(detector: Any, pixels: np.ndarray, params: ModelParams, **options: Any) -> np.ndarray:
    """The map uint8 [H, W, 3] of a photo whose sides are multiples of 64, which controlnet_aux leaves as they are."""
    sides = {"detect_resolution": min(pixels.shape[:2])}
    if type(detector).__name__ != "TEEDdetector":  # always returns the size that it was given
        sides["image_resolution"] = sides["detect_resolution"]
    with inference(params), quiet():
        return detector(pixels, output_type="np", **sides, **options)


def fit(pixels: np.ndarray, resolution: int, multiple: int) -> tuple[np.ndarray, tuple[int, int]]:
    """A photo as a network sees it: scaled to `resolution` and padded below and at the right by its last pixels.

    Returns:
        uint8 RGB [H', W', 3] whose sides are multiples of `multiple`; and the height and width without the padding.
    """
    height, width = pixels.shape[:2]
    scale = min(resolution / min(height, width), MAX_ASPECT * resolution / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    scaled = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    below, right = (-side % multiple for side in size)
    return cv2.copyMakeBorder(scaled, 0, below, 0, right, cv2.BORDER_REPLICATE), size


def unfit(array: np.ndarray, size: tuple[int, int], shape: Sequence[int]) -> np.ndarray:
    """What a network made of a photo that went through `fit`, at the photo's own (height, width)."""
    inner = np.ascontiguousarray(array[: size[0], : size[1]])
    shrinks = shape[0] < size[0]
    return cv2.resize(inner, (shape[1], shape[0]), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """controlnet_aux prints while it loads and runs; that would bury a job's own messages."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
