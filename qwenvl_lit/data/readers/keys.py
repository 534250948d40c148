"""Reads the values that rows of any layout have under their keys."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from qwenvl_lit.data.readers.drafts import DraftTurn, ImageReference
from qwenvl_lit.data.readers.files import parse_json
from qwenvl_lit.types import DataError

Row = Mapping[str, Any]


def text_of(row: Row, key: str) -> str:
    if not isinstance(row[key], str):
        raise DataError(f"`{key}` must be text, got {short(row[key])}")
    return row[key]


def list_of(row: Row, key: str) -> list:
    """Returns a list, which may be written as JSON text, as in a cell of a csv file."""
    value = row.get(key)
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise DataError(
                f"`{key}` must be a list, or a list as JSON text; it is not JSON: {error}"
            ) from None
    if value is not None and not isinstance(value, list):
        raise DataError(f"`{key}` must be a list, got {short(value)}")
    return value or []


def system_turns(row: Row) -> list[DraftTurn]:
    if row.get("system") is None:
        return []
    return [("system", [text_of(row, "system")])]


def objects_of(row: Row) -> list:
    return list_of(row, "objects")


def images_of(row: Row) -> list[str]:
    """Returns the addresses in `image` or `images`: one, a list of them, or either as JSON text."""
    image, images = row.get("image"), row.get("images")
    if image is not None and images is not None:
        raise DataError("give either `image` or `images`, not both")
    if image is not None:
        images = image
    elif images is None:
        images = []
    if isinstance(images, str) and images.lstrip().startswith(("[", "{")):
        with suppress(ValueError):  # it may also be a path that begins with a bracket
            images = parse_json(images)
    if not isinstance(images, list):
        images = [images]
    return [image_of(image).address for image in images]


def image_of(image: Any) -> ImageReference:
    match image:
        case str(address) | {"path": str(address)} | {"url": str(address)}:
            return ImageReference(address)
    raise DataError(f"an image must be a path, an address or base64 text, got {short(image)}")


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60
short = _REPR.repr  # shortens long values and stops at a depth
