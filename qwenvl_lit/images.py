"""Decodes untrusted image files: an explicit list of formats, limits, and one kind of error.

Pillow knows formats that run other programs (EPS runs Ghostscript) and raises errors of many kinds
for broken files. This module excludes both.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from qwenvl_lit.terminal import printable

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

# 300 MB as RGB. A file that claims to be larger is broken, or made to exhaust the memory.
MAX_IMAGE_PIXELS = 100_000_000
# Resizing scales the width first: the intermediate result has the height of the image.
MAX_IMAGE_SIDE = 100_000

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


class UnreadableImageError(ValueError):
    """An image that cannot be decoded; the message gives the reason and says what to do."""


def read_image(source: Path | bytes | Image.Image) -> Image.Image:
    """Returns the decoded image in its own mode.

    Raises:
        UnreadableImageError: the file is broken, no image, of another format than `FORMATS`, or too
            large.
        OSError: the file cannot be opened.
    """
    if isinstance(source, Image.Image):
        with _pillow_errors():
            return _load(source)
    with _pillow_errors(), _opened(source) as image:
        return _load(image)


def read_size(source: Path | bytes) -> tuple[int, int]:
    """Returns width and height in pixels, read from the header alone.

    Raises:
        UnreadableImageError, OSError: as `read_image`.
    """
    with _pillow_errors(), _opened(source) as image:
        _check_size(image)
        return image.size


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
    reason = str(error)
    if isinstance(error, MemoryError):
        return "it needs more memory than is left: scale it down"
    if isinstance(error, Image.DecompressionBombError):
        return "scale it down"
    if "MAX_TEXT_CHUNK" in reason or "text chunk" in reason:
        return "the pixels may be intact: save it again without its text chunks"
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
