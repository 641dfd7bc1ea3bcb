"""Image normalisation: any photograph in, upright 8-bit sRGB RGB JPEG out, or the reason why not.

A JPEG that needs no change keeps its compressed pixels, after one full decode that proves it whole; its metadata is
removed. No call touches process-wide state (Pillow's settings, the warning filters), so any number of threads may be
here.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageCms,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from pipelines.metadata import strip_jpeg, strip_png
from schemas.codec import decode_raw, encode_jpeg, encode_png
from schemas.records import Entity

# Pillow warns about damaged metadata, which a crawl is full of. Catching that per call would not be thread safe.
warnings.filterwarnings("ignore", module=r"PIL\.")

MAX_SOURCE_PIXELS = 178_956_970  # beyond it, Pillow's plugins refuse by themselves
MAX_SIDE = 65_500  # libjpeg's JPEG_MAX_DIMENSION
_MAX_ASPECT_ERROR = 0.02
_PNG_BIT_DEPTH = 24  # offset of the IHDR field
_SRGB_TOLERANCE = 2  # 8-bit levels; published sRGB profiles differ by one from each other

# Called directly: `Image.open` has limits and format guesses of its own.
_PLUGINS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
_MAGIC = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF87a": "GIF", b"GIF89a": "GIF", b"BM": "BMP"} | {
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
# JPEG XL, JPEG 2000, Photoshop, BigTIFF; HEIC and AVIF announce themselves four bytes later.
_UNSUPPORTED = (b"\xff\x0a", b"\0\0\0\x0cJXL ", b"\0\0\0\x0cjP  ", b"8BPS", b"II+\0", b"MM\0+")
_EXTENSIONS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP"} | {
    "tif": "TIFF",
    "tiff": "TIFF",
}
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadInput(ValueError):
    """An input that goes to quarantine. `reason` is a stable slug, `detail` says what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class BadImage(BadInput):
    """Bytes that do not become an image: `empty_file`, `not_an_image`, `unsupported_format`, `too_many_pixels`,
    `animated`, `truncated` or `decode_error`."""


@dataclass(frozen=True)
class Normalised:
    """An upright 8-bit sRGB RGB image.

    Attributes:
        data: the source bytes without metadata if nothing had to change, else what `schemas.codec.encode_jpeg` makes
            (`encode_png` where `lossless` was asked for).
        width, height: of `data`, in pixels.
        source_width, source_height: of the source once upright; what boxes and masks refer to.
        source_format: by content, e.g. "PNG".
        changes: what was done, in order, e.g. `("orientation_6", "scaled")`, or `metadata_removed` alone.
            `mislabelled` (the extension names another format) is noted here although it changes nothing.
    """

    data: bytes
    width: int
    height: int
    source_width: int
    source_height: int
    source_format: str
    changes: tuple[str, ...] = ()


def normalise(
    data: bytes,
    max_pixels: int,
    *,
    declared: str = "",
    max_source_pixels: int = MAX_SOURCE_PIXELS,
    lossless: bool = False,
) -> Normalised:
    """Decode an image of any supported format and make it upright, 8-bit, sRGB, opaque and small enough.

    Args:
        data: JPEG, PNG, WebP, BMP, TIFF or GIF.
        max_pixels: larger images are scaled down (Lanczos) to at most this many pixels, keeping their aspect.
        declared: extension that the bytes go by, "" if none.
        max_source_pixels: refuse larger ones, by their header, before anything is allocated.
        lossless: make a PNG instead, for maps and masks.

    Raises:
        BadImage: with the reason.
    """
    kind = _sniff(data)
    image: Image.Image = _load(kind, data, max_source_pixels)
    changes = ["mislabelled"] if _EXTENSIONS.get(declared.lower(), kind) != kind else []
    notes = len(changes)
    if kind != ("PNG" if lossless else "JPEG"):
        changes.append(f"from_{kind.lower()}")
    if kind == "PNG" and data[_PNG_BIT_DEPTH] == 16:  # Pillow has reduced colour to 8 bits already
        changes.append("from_16bit")
    profile = image.info.get("icc_profile", b"")
    image = _eight_bit(_upright(image, kind, data, changes), changes)
    source = image.size
    target = _fit(*source, max_pixels)
    if target != source:  # before colours are converted, which costs more per pixel
        image = image.resize(target, Image.Resampling.LANCZOS)
        changes.append("scaled")
    image = _to_srgb(image, profile, changes)
    if len(changes) == notes:
        encoded = strip_png(data) if lossless else strip_jpeg(data)
        changes += ["metadata_removed"] if encoded != data else []
    else:
        encoded = encode_png(np.asarray(image)) if lossless else encode_jpeg(np.asarray(image))
    return Normalised(encoded, *target, *source, kind, tuple(changes))


def transform_geometry(
    entities: tuple[Entity, ...], depth_png: bytes, image: Normalised
) -> tuple[tuple[Entity, ...], bytes]:
    """Entities and depth of the upright source image, in pixels of the normalised one.

    Raises:
        BadInput: `bad_entities` or `bad_depth`.
    """
    source, target = (image.source_width, image.source_height), (image.width, image.height)
    moved = tuple(transform_entity(entity, source, target) for entity in entities)
    return moved, transform_depth(depth_png, target) if depth_png else b""


def transform_entity(entity: Entity, source: tuple[int, int], target: tuple[int, int]) -> Entity:
    """Scale an entity from one (width, height) to another. Its box is clipped to the image.

    Run lengths stay as they are, for they cover the whole image at any resolution.

    Raises:
        BadInput: `bad_entities`, the box lies outside the image or the mask has another aspect.
    """
    scale = (target[0] / source[0], target[1] / source[1]) * 2
    box = tuple(
        min(max(value * s, 0.0), float(limit)) for value, s, limit in zip(entity.box, scale, target * 2, strict=True)
    )
    if not (box[0] < box[2] and box[1] < box[3]):
        raise BadInput(
            "bad_entities", f"box {list(entity.box)} of {entity.phrase!r} is outside {source[0]}x{source[1]}"
        )
    mask = entity.mask
    if isinstance(mask, list):
        mask = [[value * scale[i % 2] for i, value in enumerate(polygon)] for polygon in mask]
    elif mask and not _same_aspect((mask["size"][1], mask["size"][0]), target):
        raise BadInput("bad_entities", f"mask of {entity.phrase!r}, {mask['size']}, has another aspect than the image")
    return entity.model_copy(update={"box": box, "mask": mask})


def transform_depth(depth_png: bytes, target: tuple[int, int]) -> bytes:
    """16-bit depth PNG rescaled (nearest) to a (width, height); the same bytes if it has that size already.

    Raises:
        BadInput: `bad_depth`, not a 16-bit gray PNG, or of another aspect than the image.
    """
    try:
        _load(_sniff(depth_png), depth_png, MAX_SOURCE_PIXELS)
        depth = decode_raw(depth_png)
    except ValueError as error:
        raise BadInput("bad_depth", str(error)) from error
    if depth.ndim != 2 or depth.dtype != np.uint16:
        raise BadInput("bad_depth", f"{depth.dtype} {depth.shape} instead of 16-bit gray")
    height, width = depth.shape
    if not _same_aspect((width, height), target):
        raise BadInput("bad_depth", f"{width}x{height} has another aspect than the image, {target[0]}x{target[1]}")
    if (width, height) == target:
        return depth_png
    return encode_png(cv2.resize(depth, target, interpolation=cv2.INTER_NEAREST_EXACT))


def _same_aspect(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two (width, height) agree but for rounding to whole pixels; turned by 90 degrees they do not."""
    return abs(math.log(a[0] / a[1] * b[1] / b[0])) <= _MAX_ASPECT_ERROR + 1 / min(*a, *b)


def decode_mask_image(data: bytes) -> np.ndarray:
    """Boolean [H, W] of a mask image: True where it is brighter than half.

    Raises:
        BadImage: with the reason.
    """
    return np.asarray(_load(_sniff(data), data, MAX_SOURCE_PIXELS).convert("L")) > 127


def _sniff(data: bytes) -> str:
    """The format that the first bytes announce."""
    if not data:
        raise BadImage("empty_file")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    for magic, kind in _MAGIC.items():
        if data.startswith(magic):
            return kind
    known = data[4:8] == b"ftyp" or data.startswith(_UNSUPPORTED)
    raise BadImage("unsupported_format" if known else "not_an_image", f"starts with {data[:16]!r}")


def _load(kind: str, data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """Decode completely, after the header has been checked."""
    try:
        image = _PLUGINS[kind](io.BytesIO(data))
        if image.width * image.height > max_pixels:
            raise BadImage("too_many_pixels", f"{image.width}x{image.height}, more than {max_pixels} pixels")
        if getattr(image, "is_animated", False):
            raise BadImage("animated", f"{kind} of several frames")
        image.load()
    except (BadImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadImage("too_many_pixels", str(error)) from error
    except Exception as error:  # on hostile bytes, decoders raise whatever comes
        cut = "truncated" in str(error).lower() or _is_cut(kind, data)
        raise BadImage("truncated" if cut else "decode_error", f"{type(error).__name__}: {error}") from error
    return image


def _is_cut(kind: str, data: bytes) -> bool:
    """Whether the end that the format prescribes is missing."""
    match kind:
        case "JPEG":
            return b"\xff\xd9" not in data[-16:]
        case "PNG":
            return b"IEND" not in data[-16:]
        case "GIF":
            return not data.endswith(b";")
        case "WEBP":
            return len(data) < 12 or struct.unpack_from("<L", data, 4)[0] + 8 > len(data)
        case "BMP":
            return len(data) < 6 or struct.unpack_from("<L", data, 2)[0] > len(data)
    return False


def _upright(image: Image.Image, kind: str, data: bytes, changes: list[str]) -> Image.Image:
    orientation = exif_orientation(data if kind == "TIFF" else image.info.get("exif", b""))
    if orientation == 1:
        return image
    changes.append(f"orientation_{orientation}")
    return image if kind == "TIFF" else image.transpose(_TRANSPOSE[orientation])  # Pillow has turned a TIFF already


def exif_orientation(exif: bytes) -> int:
    """Orientation 1..8 (tag 0x0112 of the first directory; CIPA DC-008 §4.6.4), 1 if absent or damaged.

    Pillow's parser fails on damaged directories in a dozen ways, and follows XMP, which browsers do not.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2], "")
    try:
        (start,) = struct.unpack_from(f"{order}L", tiff, 4) if order else (len(tiff),)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(f"{order}HHLH", tiff, entry)
            if tag == 0x0112 and value in _TRANSPOSE:
                return int(value)
    except struct.error:
        pass
    return 1


def _eight_bit(image: Image.Image, changes: list[str]) -> Image.Image:
    """Gray, colour or CMYK with 8 bits per channel, or RGBA if anything may be transparent."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
        changes += [] if "from_16bit" in changes else ["from_16bit"]
    elif image.mode in ("I", "F"):
        raise BadImage("unsupported_format", f"32-bit pixels (mode {image.mode}) have no defined white")
    if image.mode in ("P", "PA"):
        changes.append("from_palette")
    if image.has_transparency_data:
        return _convert(image, "RGBA")
    return _convert(image, {"1": "L", "P": "RGB"}.get(image.mode, image.mode))


def _to_srgb(image: Image.Image, profile: bytes, changes: list[str]) -> Image.Image:
    """sRGB RGB; transparent pixels show white."""
    alpha = None
    if image.mode == "RGBA":
        alpha = image.getchannel("A")
        image = _convert(image, "RGB")
        changes.append("alpha_on_white")
    if image.mode != "RGB":
        changes.append("from_gray" if image.mode == "L" else f"from_{image.mode.lower()}")
    if profile:
        image = _apply_profile(image, profile, changes)
    image = _convert(image, "RGB")
    if alpha:
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=alpha)
        image = white
    return image


def _convert(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # Pillow would copy it


def _apply_profile(image: Image.Image, profile: bytes, changes: list[str]) -> Image.Image:
    """Convert to sRGB; a profile that is damaged or made for other channels is ignored, as browsers do."""
    try:
        if image.mode == "RGB" and _is_srgb(profile):
            return image
        converted = _convert_profile(image, profile)
    except (ImageCms.PyCMSError, OSError, ValueError):
        changes.append("icc_ignored")
        return image
    changes.append("icc_to_srgb")
    return converted


def _convert_profile(image: Image.Image, profile: bytes) -> Image.Image:
    converted = ImageCms.profileToProfile(
        image,
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    assert converted is not None  # only in-place conversion returns nothing
    return converted


@lru_cache(maxsize=64)
def _is_srgb(profile: bytes) -> bool:
    """Whether a profile leaves a grid of colours where it is. Names do not tell: there are dozens for sRGB."""
    levels = np.linspace(0, 255, 9, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
    converted = np.asarray(_convert_profile(Image.fromarray(grid), profile))
    return int(np.abs(converted.astype(int) - grid).max()) <= _SRGB_TOLERANCE


def _fit(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """The largest size of the same aspect with at most `max_pixels` pixels and no side that JPEG cannot hold."""
    scale = min(1.0, math.sqrt(max_pixels / (width * height)), MAX_SIDE / max(width, height))
    if scale == 1.0:
        return width, height
    short = max(1, math.floor(min(width, height) * scale))
    long = min(max(1, math.floor(max(width, height) * scale)), max(1, max_pixels // short))
    return (short, long) if width < height else (long, short)
