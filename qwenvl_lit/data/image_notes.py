"""Notes about images whose stored values or rotation the options leave as they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from qwenvl_lit.images import Header
from qwenvl_lit.types import BadImage, ImageSource

JPEG_SUFFIXES = (".jpg", ".jpeg")


def image_notes(image: ImageSource) -> Iterator[str]:
    """Yields what is unusual about an image that its options read as it is stored.

    Raises:
        BadImage: its header cannot be read.
    """
    header = image.header
    if header.is_deep and image.options.deep == "keep":
        yield deep_note(image, header)
    if header.orientation > 1 and image.options.exif == "ignore":
        yield f"image {image.name} {rotation_note(header)}"


def deep_note(image: ImageSource, header: Header) -> str:
    return (
        f"image {image.name} has values of more than 8 bits (mode {header.mode}); all above 255 "
        f"are white, as in the original; data.on_deep_image=scale maps its darkest value to black "
        f"and its brightest to white"
    )


def rotation_note(header: Header) -> str:
    """Returns the predicate of a sentence about a rotated image."""
    return (
        f"is shown rotated by viewers (EXIF orientation {header.orientation}), and is read as it "
        f"is stored, as in the original; boxes count in stored pixels. data.exif=apply rotates it"
    )


def measured_notes(image: ImageSource) -> tuple[str, ...]:
    """Returns `deep_note` of an image before training, from the header of its file.

    Images that have to be downloaded first are not looked at, nor those that cannot be read: that
    is an error when they are. A JPEG has 8 bits.
    """
    is_remote = not isinstance(image.source, Path | bytes | Image.Image)
    is_jpeg = isinstance(image.source, Path) and image.source.suffix.lower() in JPEG_SUFFIXES
    if is_remote or is_jpeg or image.options.deep != "keep":
        return ()
    try:
        header = image.header
    except BadImage:
        return ()
    return (deep_note(image, header),) if header.is_deep else ()
