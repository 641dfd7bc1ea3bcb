"""Images of every awkward and every bad kind, made from real photographs, with the outcome that each must have."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import skimage
import sklearn
from PIL import Image, ImageCms

PHOTOS = {
    "cat": Path(skimage.__file__).parent / "data/chelsea.png",
    "coffee": Path(skimage.__file__).parent / "data/coffee.png",
    "rocket": Path(skimage.__file__).parent / "data/rocket.jpg",
    "china": Path(sklearn.__file__).parent / "datasets/images/china.jpg",
    "flower": Path(sklearn.__file__).parent / "datasets/images/flower.jpg",
}
BACK = {  # what a camera held in EXIF orientation k stores: the inverse of what a reader must do
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True)
class Case:
    """A file. `reason` is that of its quarantine; if it is "", `changes` are those of its normalisation."""

    name: str
    data: bytes
    reason: str = ""
    changes: tuple[str, ...] = ()

    @property
    def extension(self) -> str:
        return self.name.rpartition(".")[2]


def photo(name: str = "cat", width: int = 160, height: int = 112) -> Image.Image:
    """A real photograph as RGB, scaled, without metadata; the size is one of whole 16x16 blocks."""
    return Image.fromarray(_pixels(name, width, height))  # a new one: Pillow leaves encoder settings on what it saves


@cache
def _pixels(name: str, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.open(PHOTOS[name]).convert("RGB").resize((width, height), Image.Resampling.LANCZOS))


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(name: str = "cat", width: int = 160, height: int = 112) -> bytes:
    """A photograph that passes through normalisation unchanged."""
    return encode(photo(name, width, height), "JPEG", quality=92)


def rotated(orientation: int, kind: str = "JPEG") -> bytes:
    """The cat as a camera stores it in an EXIF orientation; upright, it equals `photo()`."""
    stored = photo().transpose(BACK[orientation]) if orientation in BACK else photo()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, object] = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    options |= {"lossless": True} if kind == "WEBP" else {}
    return encode(stored, kind, exif=exif, **options)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    chunks = (
        (b"IHDR", struct.pack(">2L5B", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(1000))),
        (b"IEND", b""),
    )
    body = (struct.pack(">L", len(d)) + t + d + struct.pack(">L", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def jpeg_header(width: int, height: int) -> bytes:
    """A JPEG whose frame header claims another size than its data has."""
    data = bytearray(jpeg())
    struct.pack_into(">2H", data, data.index(b"\xff\xc0") + 5, height, width)
    return bytes(data)


def icc_profile(gamma: float, primaries: np.ndarray) -> bytes:
    """A minimal ICC v2 matrix profile: columns of `primaries` are the D50 XYZ of red, green and blue."""

    def fixed(values: np.ndarray) -> bytes:
        return b"".join(struct.pack(">l", round(v * 65536)) for v in values)

    white = np.array([0.9642, 1.0, 0.8249])
    curve = b"curv" + struct.pack(">2LH", 0, 1, round(gamma * 256)) + b"\0\0"
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(white)}
    tags |= {f"{c}XYZ".encode(): b"XYZ \0\0\0\0" + fixed(primaries[:, i]) for i, c in enumerate("rgb")}
    tags |= {f"{c}TRC".encode(): curve for c in "rgb"}
    offset, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">2L", offset + len(body), len(data))
        body += data
    head = struct.pack(">L4sL4s4s4s", offset + len(body), b"lcms", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + fixed(white)
    return head.ljust(128, b"\0") + struct.pack(">L", len(tags)) + table + body


def _gray16() -> bytes:
    gray = np.asarray(photo().convert("L")).astype(np.uint16) * 257
    return cv2.imencode(".png", gray)[1].tobytes()


def _rgb16() -> bytes:
    rgb = np.asarray(photo()).astype(np.uint16) * 257
    return cv2.imencode(".png", rgb[..., ::-1])[1].tobytes()


def _with_alpha() -> Image.Image:
    """The cat, fully transparent on its left half."""
    alpha = np.full((112, 160), 255, np.uint8)
    alpha[:, :80] = 0
    image = photo().convert("RGBA")
    image.putalpha(Image.fromarray(alpha))
    return image


def _lab() -> Image.Image:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    image = ImageCms.applyTransform(photo(), to_lab)
    assert image is not None
    image.info.clear()
    return image


def _animated(kind: str) -> bytes:
    return encode(photo("cat"), kind, save_all=True, append_images=[photo("coffee")], duration=100)


@cache
def cases() -> dict[str, Case]:
    """Every kind, by file name."""
    whole = jpeg()
    noisy_alpha = _with_alpha()
    return {
        case.name: case
        for case in (
            Case("plain.jpg", whole),
            Case("progressive.jpg", encode(photo(), "JPEG", progressive=True)),
            Case("truncated.jpg", whole[: len(whole) // 2], "truncated"),
            Case("header_only.jpg", whole[:40], "truncated"),
            Case("truncated_progressive.jpg", encode(photo(), "JPEG", progressive=True)[:3000], "truncated"),
            Case("truncated.png", encode(photo(), "PNG")[:9000], "truncated"),
            Case("truncated.webp", encode(photo(), "WEBP")[:2000], "truncated"),
            Case("truncated.bmp", encode(photo(), "BMP")[:9000], "truncated"),
            Case("empty.jpg", b"", "empty_file"),
            Case("page.jpg", b"<!DOCTYPE html><title>404 Not Found</title>", "not_an_image"),
            Case("zeros.jpg", bytes(4096), "not_an_image"),
            Case("phone.heic.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unsupported_format"),
            Case("scrambled.png", _scrambled(), "decode_error"),
            Case("really_png.jpg", encode(photo(), "PNG"), changes=("mislabelled", "from_png")),
            Case("really_jpeg.png", whole, changes=("mislabelled",)),
            Case("cmyk.jpg", encode(photo().convert("CMYK"), "JPEG", quality=95), changes=("from_cmyk",)),
            Case("gray.jpg", encode(photo().convert("L"), "JPEG", quality=95), changes=("from_gray",)),
            Case("gray16.png", _gray16(), changes=("from_png", "from_16bit", "from_gray")),
            Case("rgb16.png", _rgb16(), changes=("from_png", "from_16bit")),
            Case("bilevel.png", encode(photo().convert("1"), "PNG"), changes=("from_png", "from_gray")),
            Case("palette.png", encode(photo().quantize(64), "PNG"), changes=("from_png", "from_palette")),
            Case(
                "palette_alpha.png",
                encode(photo().quantize(64), "PNG", transparency=bytes(range(64))),
                changes=("from_png", "from_palette", "alpha_on_white"),
            ),
            Case("alpha.png", encode(noisy_alpha, "PNG"), changes=("from_png", "alpha_on_white")),
            Case("alpha.webp", encode(noisy_alpha, "WEBP", lossless=True), changes=("from_webp", "alpha_on_white")),
            Case("gray_alpha.png", encode(noisy_alpha.convert("LA"), "PNG"), changes=("from_png", "alpha_on_white")),
            Case("plain.bmp", encode(photo(), "BMP"), changes=("from_bmp",)),
            Case("plain.tif", encode(photo(), "TIFF", compression="tiff_lzw"), changes=("from_tiff",)),
            Case("plain.gif", encode(photo(), "GIF"), changes=("from_gif", "from_palette")),
            Case("lab.tif", encode(_lab(), "TIFF"), changes=("from_tiff", "from_lab")),
            Case("float.tif", encode(photo().convert("F"), "TIFF"), "unsupported_format"),
            Case("animated.gif", _animated("GIF"), "animated"),
            Case("animated.webp", _animated("WEBP"), "animated"),
            Case("animated.png", _animated("PNG"), "animated"),
            Case("pages.tif", encode(photo(), "TIFF", save_all=True, append_images=[photo("coffee")]), "animated"),
            *(Case(f"orientation_{k}.jpg", rotated(k), changes=(f"orientation_{k}",)) for k in BACK),
            Case("bomb.png", png_header(60_000, 60_000), "too_many_pixels"),
            Case("bomb.jpg", jpeg_header(60_000, 60_000), "too_many_pixels"),
            Case("one_pixel.png", encode(Image.new("RGB", (1, 1), "red"), "PNG"), changes=("from_png",)),
            Case("one_pixel.jpg", encode(Image.new("RGB", (1, 1), "red"), "JPEG")),
            Case("thread.png", encode(photo().resize((3000, 1)), "PNG"), changes=("from_png",)),
        )
    }


def _scrambled() -> bytes:
    """A whole PNG with one byte of its pixels flipped: the checksum does not match."""
    data = bytearray(encode(photo(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)
