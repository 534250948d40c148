"""Reads the values that rows of any layout have under their keys."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain
from typing import Any

from qwenvl_lit.data.readers.drafts import DraftTurn, ImageReference
from qwenvl_lit.data.readers.files import parse_json
from qwenvl_lit.images import StoredImage
from qwenvl_lit.types import DataError

Row = Mapping[str, Any]

# Keys that are structured or have a default: an empty text is no value.
_EMPTY_IS_NONE = ("images", "image", "history", "objects", "system", "answers", "choices", "id")
# Keys of known layouts for what is not read, by what they hold.
_WEIGHTS = ("loss", "loss_scale", "weight")
_UNREAD = {
    "weights of rows": _WEIGHTS,
    "videos": ("video", "videos"),
    "audio": ("audio", "audios"),
    "tools": ("tools", "functions", "history_roles"),
    "rejected answers": (
        "rejected",
        "chosen",
        "kto_tag",
        "rejected_response",
        "rejected_images",
        "rejected_messages",
    ),
}
UNREAD_KEYS = tuple(chain.from_iterable(_UNREAD.values()))
_UNREAD_IN_TURN = {
    "weights of turns": _WEIGHTS,
    "tool calls": ("tool_calls", "function_call"),
    "audio": ("audio",),
}
_UNREAD_TYPES = ("video", "video_url", "audio", "audio_url", "input_audio", "file")


def without_empty_texts(row: Row) -> dict[str, Any]:
    """Returns the row with None in place of empty texts that cannot be values of their keys.

    A csv file cannot tell an empty text from none. So that all formats agree, there is no
    difference for `images`, `history`, `objects`, `system` and the like.
    """
    values = dict(row)
    for key in _EMPTY_IS_NONE:
        if values.get(key) == "":
            values[key] = None
    return values


def check_all_is_read(row: Row) -> None:
    """Raises an error if the row has something that other stacks read and this package does not.

    Raises:
        DataError: names the key.
    """
    _check_keys(row, _UNREAD, "the row has")


def check_turn_is_read(number: int, entry: Row) -> None:
    """Like `check_all_is_read`, for an entry of a list of turns."""
    _check_keys(entry, _UNREAD_IN_TURN, f"turn {number} has")


def check_type_is_read(number: int, item: Row) -> None:
    """Like `check_all_is_read`, for an item of the content of a turn."""
    if item.get("type") in _UNREAD_TYPES:
        raise DataError(
            f"turn {number} has an item of the type {item['type']!r}; only text and images are "
            f"read. Remove the item"
        )


def _check_keys(values: Row, unread: Mapping[str, tuple[str, ...]], start: str) -> None:
    for content, keys in unread.items():
        for key in keys:
            value = values.get(key)
            # Tools that store rows as a table fill up missing keys. 1 and True are the defaults.
            if value is None or value in ("", "[]", [], {}, 1):
                continue
            if key in _WEIGHTS and str(value).lower() in ("1", "1.0", "true"):  # in a table
                continue
            is_named = key.rstrip("s") == content.rstrip("s")
            meaning = "" if is_named else f" ({content})"
            raise DataError(
                f"{start} `{key}`, {short(value)}, which is not read{meaning}. Only text and "
                f"images are read. Remove the key, or rename it if it is a column of your own"
            )


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
            reason = f"; it is not JSON: {error}" if value.lstrip().startswith("[") else ""
            raise DataError(
                f"`{key}` must be a list, or a list as JSON text, got {short(value)}{reason}"
            ) from None
    if value is not None and not isinstance(value, list):
        raise DataError(f"`{key}` must be a list, got {short(value)}")
    return value or []


def records_of(row: Row, key: str) -> list:
    """Returns a list of mappings, which may be written as a mapping of lists, or as JSON text.

    `datasets` writes `{"role": [...], "content": [...]}` for a list of structs that was declared as
    a `Sequence`.

    Raises:
        DataError: it is neither, or the lists differ in length.
    """
    value = row.get(key)
    if isinstance(value, str) and value.lstrip().startswith("{"):
        with suppress(ValueError):  # `list_of` raises it with the key
            value = parse_json(value)
    if not isinstance(value, dict):
        return list_of(row, key)
    lists = [each for each in value.values() if isinstance(each, list)]
    lengths = sorted(set(map(len, lists)))
    if len(lists) < len(value) or len(lengths) != 1:
        problem = f"has lists of {lengths} values"
        if len(lists) < len(value):
            problem = "has no lists"
        raise DataError(
            f"`{key}` must be a list of turns, or a mapping of lists of one length such as "
            f'{{"role": [...], "content": [...]}}; got {short(value)}, which {problem}. Write a '
            f"list with an entry for each turn"
        )
    records = []
    for entries in zip(*lists, strict=True):
        fields = zip(value, entries, strict=True)
        records.append({name: entry for name, entry in fields if entry is not None})
    return records


def system_turns(row: Row) -> list[DraftTurn]:
    if row.get("system") is None:
        return []
    return [("system", [text_of(row, "system")])]


def objects_of(row: Row) -> list:
    """Returns the entries of `objects`, a list or ms-swift 3's mapping of lists.

    Either may be written as JSON text.
    """
    value = row.get("objects")
    if isinstance(value, str) and value.lstrip().startswith("{"):
        with suppress(ValueError):  # `list_of` raises it with the key
            value = parse_json(value)
    if isinstance(value, dict):
        return _objects_of_lists(value)
    return list_of(row, "objects")


def _objects_of_lists(objects: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Converts `{"ref": [...], "bbox": [...], "bbox_type": ..., "image_id": [...]}`.

    The k-th placeholder of a kind stands for the k-th entry of its list. The lists may differ in
    length, so an object may lack a caption or a box.
    """
    labels, boxes = objects.get("ref") or [], objects.get("bbox") or []
    images, bbox_type = objects.get("image_id") or [], objects.get("bbox_type") or "real"
    unknown = sorted(objects.keys() - {"ref", "bbox", "bbox_type", "image_id"})
    are_lists = isinstance(labels, list) and isinstance(boxes, list) and isinstance(images, list)
    if unknown or not are_lists:
        raise DataError(
            f"`objects` must be a list of {{caption, bbox, bbox_type, image}}, or as in ms-swift 3 "
            f'{{"ref": [captions], "bbox": [boxes], "bbox_type": "real" or "norm_1", '
            f'"image_id": [numbers]}}, got {short(dict(objects))}'
        )
    entries = []
    for k in range(max(len(labels), len(boxes))):
        entries.append(
            {
                "caption": labels[k] if k < len(labels) else None,
                "bbox": boxes[k] if k < len(boxes) else [],
                "bbox_type": "norm_1" if bbox_type == "norm1" else bbox_type,  # ms-swift 3's name
                "image": images[k] if k < len(images) else 0,
            }
        )
    return entries


def images_of(row: Row) -> list[ImageReference]:
    """Returns the images in `image` or `images`: one, a list of them, or either as JSON text."""
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
    return list(map(image_of, images))


def image_of(image: Any) -> ImageReference:
    match image:
        case str(address):
            return ImageReference(address)
        case {"bytes": (bytes() | StoredImage()) as content}:
            return ImageReference(image.get("path") or "", content)
        case {"path": str(address)} | {"url": str(address)}:
            return ImageReference(address)
        case bytes() | StoredImage():
            return ImageReference("", image)
    raise DataError(f"an image must be a path, an address or base64 text, got {short(image)}")


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60
short = _REPR.repr  # shortens long values and stops at a depth
