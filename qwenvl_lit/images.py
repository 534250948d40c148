"""Decodes untrusted image files: an explicit list of formats, limits, and one kind of error.

Pillow knows formats that run other programs (EPS runs Ghostscript) and raises errors of many kinds
for broken files. This module excludes both.
"""

from __future__ import annotations

import io
import stat
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, Protocol, TypeVar, get_args

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from qwenvl_lit.terminal import printable

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

# 300 MB as RGB. A file that claims to be larger is broken, or made to exhaust the memory.
MAX_IMAGE_PIXELS = 100_000_000
# Resizing scales the width first: the intermediate result has the height of the image.
MAX_IMAGE_SIDE = 100_000

DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's, of more than 8 bits
# PNG chunks that do not change the pixels. Pillow refuses those that decompress to over a megabyte.
PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")

CONVERT = "convert it to PNG or JPEG"
FETCH = "fetch it again"
_BEGINNING = 1024  # number of first bytes used to identify a file that is not an image
_SHOWN = 40  # bytes of it in a message
_FOREIGN = (  # formats that are not read, by what their files begin with
    (b"%!PS", "EPS"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"%PDF", "PDF"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"8BPS", "PSD"),
    (b"\x00\x00\x01\x00", "ICO"),
    (b"PK\x03\x04", "ZIP"),
    (b"\x1f\x8b", "GZIP"),
)
_BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC", b"avif": "AVIF"}


class RemoteImage(Protocol):
    """An image that has to be downloaded before it can be opened."""

    @property
    def name(self) -> str:
        """Its address, for messages and written predictions."""

    def path(self) -> Path:
        """Returns the file on disk, after downloading it if it is missing.

        Raises:
            DataError: the download fails.
        """


class StoredImage(ABC):
    """An image inside a file of rows, whose encoded bytes are read when they are needed."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Its place, which no other image has, for messages and written predictions."""

    @abstractmethod
    def content(self) -> bytes:
        """Returns the encoded bytes.

        Raises:
            DataError: the file cannot be read.
        """


class UnreadableImageError(ValueError):
    """An image that cannot be decoded; the message gives the reason and says what to do."""


def _check_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key} must be {' or '.join(choices)}, got {value!r}")


T = TypeVar("T")
Exif = Literal["ignore", "apply"]
DeepImage = Literal["keep", "scale"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageOptions:
    """How the stored values of an image become its pixels. The defaults are the original model's.

    Args:
        exif: "apply" rotates an image as its EXIF orientation says. "ignore" takes the pixels as
            they are stored.
        deep: "scale" maps an image of `DEEP_MODES` to 8 bits, from its darkest value, 0, to its
            brightest, 255. With "keep", all values above 255 are white.
    """

    exif: Exif = "ignore"
    deep: DeepImage = "keep"

    def __post_init__(self):
        _check_choice("data.exif", self.exif, get_args(Exif))
        _check_choice("data.on_deep_image", self.deep, get_args(DeepImage))


AS_STORED = ImageOptions()


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What is known about an image before it is decoded."""

    size: tuple[int, int]  # width and height in pixels, as stored
    mode: str  # Pillow's
    orientation: int  # EXIF: from 1, upright, to 8

    @property
    def is_deep(self) -> bool:
        return self.mode in DEEP_MODES


def read_image(
    source: Path | bytes | Image.Image, options: ImageOptions = AS_STORED
) -> Image.Image:
    """Returns the decoded image in its own mode, or as `options` say.

    Raises:
        UnreadableImageError: the file is broken, no image, of another format than `FORMATS`, or too
            large.
        OSError: the file cannot be opened.
    """
    return _read(source, lambda image: _converted(_load(image), options))


def read_size(
    source: Path | bytes | Image.Image, options: ImageOptions = AS_STORED
) -> tuple[int, int]:
    """Returns the width and height in pixels that `read_image` gives, from the header alone.

    Raises:
        UnreadableImageError, OSError: as `read_image`.
    """
    if options.exif == "ignore":
        return _read(source, _size)
    header = read_header(source)
    width, height = header.size
    return (height, width) if header.orientation >= 5 else (width, height)


def read_header(source: Path | bytes | Image.Image) -> Header:
    """Returns what the header of an image says.

    Raises:
        UnreadableImageError, OSError: as `read_image`.
    """
    return _read(source, _header)


def read_file(path: Path) -> bytes:
    """Returns the content of an image file.

    Raises:
        UnreadableImageError: `path` is no regular file.
        OSError: the file cannot be read.
    """
    _check_kind(path)
    return path.read_bytes()


@cache
def readable_formats() -> tuple[str, ...]:
    """Returns the `FORMATS` that the installed Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _read(source: Path | bytes | Image.Image, use: Callable[[Image.Image], T]) -> T:
    with _pillow_errors():
        if isinstance(source, Image.Image):
            return use(source)
        try:
            with _opened(source) as image:
                return use(image)
        except ValueError as error:
            if not _is_about_text(error):
                raise
        with _opened(_without_text(source)) as image:
            return use(image)


@contextmanager
def _opened(source: Path | bytes) -> Iterator[Image.Image]:
    if isinstance(source, Path):
        _check_kind(source)
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        image = Image.open(file, formats=readable_formats())
    except UnidentifiedImageError:
        beginning = _beginning_of(source)
        raise UnreadableImageError(_why_unidentified(beginning)) from None
    with image:
        yield image


def _load(image: Image.Image) -> Image.Image:
    _check_size(image)
    image.load()
    return image


def _size(image: Image.Image) -> tuple[int, int]:
    _check_size(image)
    return image.size


def _header(image: Image.Image) -> Header:
    return Header(size=_size(image), mode=image.mode, orientation=_orientation(image))


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow rotates it itself
        return 1
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block says nothing; Pillow raises errors of many kinds
        return 1
    return orientation if orientation in range(1, 9) else 1


def _converted(image: Image.Image, options: ImageOptions) -> Image.Image:
    if options.exif == "apply" and _orientation(image) > 1:
        image = ImageOps.exif_transpose(image)
    if options.deep == "scale" and image.mode in DEEP_MODES:
        image = _scaled(image)
    return image


def _scaled(image: Image.Image) -> Image.Image:
    """Returns an image in 8 bits, from its darkest value, 0, to its brightest, 255."""
    import numpy as np

    values = np.asarray(image).astype(np.float32)
    known = values[np.isfinite(values)]
    darkest, brightest = (known.min(), known.max()) if known.size else (0.0, 0.0)
    values = np.nan_to_num(values, nan=darkest, posinf=brightest, neginf=darkest)
    scaled = (values - darkest) / ((brightest - darkest) or 1) * 255
    return Image.fromarray(scaled.round().astype(np.uint8))


def _is_about_text(error: ValueError) -> bool:
    return "MAX_TEXT" in str(error)


def _without_text(source: Path | bytes) -> bytes:
    """Returns a PNG file without the chunks `PNG_TEXT`."""
    content = source if isinstance(source, bytes) else source.read_bytes()
    kept, position = [content[:8]], 8
    while position < len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        end = position + 12 + length
        if kind not in PNG_TEXT:
            kept.append(content[position:end])
        position = end
    return b"".join(kept)


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise UnreadableImageError(
            f"{width} x {height} pixels, more than {MAX_IMAGE_PIXELS}; scale it down"
        )
    if max(width, height) > MAX_IMAGE_SIDE:
        raise UnreadableImageError(
            f"{width} x {height} pixels, a side is longer than {MAX_IMAGE_SIDE}; "
            f"cut it into parts, or scale it down"
        )


def _check_kind(path: Path) -> None:
    if not stat.S_ISREG(path.stat().st_mode):  # reading a named pipe might never end
        kind = "a folder" if path.is_dir() else "a device or a pipe"
        raise UnreadableImageError(f"it is {kind}, not a file; correct the path")


def _beginning_of(source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:_BEGINNING]
    with source.open("rb") as file:
        return file.read(_BEGINNING)


@contextmanager
def _pillow_errors() -> Iterator[None]:
    try:
        yield
    except UnreadableImageError:
        raise
    except Exception as error:  # Pillow documents none of the kinds that its readers raise
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = printable(str(error)) or type(error).__name__
        raise UnreadableImageError(f"{reason}; {_advice(error)}") from error


def _advice(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it needs more memory than is left: scale it down"
    if isinstance(error, Image.DecompressionBombError):
        return "scale it down"
    return FETCH


def _why_unidentified(beginning: bytes) -> str:
    """Returns why a file with this beginning is none of `FORMATS`, and what to do."""
    text = beginning.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not beginning:
        return f"the file is empty; {FETCH}"
    if not beginning.strip(b"\0"):
        return f"the file begins with {len(beginning)} zero bytes; {FETCH}"
    if beginning.startswith(b"version https://git-lfs.github.com/spec"):
        return "it is a pointer of git-lfs, not the image; run `git lfs pull` in its repository"
    if b"<svg" in text and text.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype svg")):
        return f"format SVG is not read; {CONVERT}"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<script")):
        return f"it is a web page (HTML), not an image; correct its address, or {FETCH}"
    name = _format_of(beginning)
    if name in readable_formats():
        return f"its {name} header is broken; {FETCH}"
    if name:
        return f"format {name} is not read; {CONVERT}"
    return f"its format is unknown; it begins with {beginning[:_SHOWN]!r}; {FETCH}, or {CONVERT}"


def _format_of(beginning: bytes) -> str | None:
    for start, name in _FOREIGN:
        if beginning.startswith(start):
            return name
    if beginning[4:8] == b"ftyp":
        return _BRANDS.get(beginning[8:12])
    return None
