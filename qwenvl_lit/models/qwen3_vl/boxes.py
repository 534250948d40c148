"""Objects as text: the JSON lists with boxes that Qwen2.5-VL and Qwen3-VL were trained with.

Qwen2.5-VL writes boxes in pixels of the resized image, Qwen3-VL in thousandths of the image. A
point is an item with `point_2d`.
Neither has a form for quads: a quad is written as the smallest box around it.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from qwenvl_lit.grounding import box_around, object_in_frame
from qwenvl_lit.types import Box, Frame, GroundedObject, ImageSource, Part, Point

THOUSANDTHS = 1000
LARGEST = 1e9  # a number above this is no coordinate
BOX_KEYS = ("bbox_2d", "bbox", "box_2d", "box")
POINT_KEYS = ("point_2d",)
LABEL_KEYS = ("label", "text_content", "name")  # `text_content`: the published prompts for OCR
BETWEEN_OBJECTS = re.compile(r"[\s,;]*")  # text that separates the objects of one list

# An item of a list: braces around text without braces, except in strings. Its length is limited so
# that the time is linear in the length of the answer.
_STRING = r'"(?:[^"\\]|\\[\s\S]){0,2000}+"'
_ITEM = re.compile(rf"\{{(?:[^{{}}\"]{{1,500}}+|{_STRING}){{1,100}}+\}}")
_BARE_BOX = re.compile(r"\[\s*(?:-?\d{1,6}(?:\.\d{1,17})?\s*,\s*){3}-?\d{1,6}(?:\.\d{1,17})?\s*\]")
_NUMBER = re.compile(r"[-+]?\d{1,9}(?:\.\d{1,17})?")
_LIST_END = re.compile(r"\s*,?(?:\s*\])?(?:\s*```)?")
_COMMA = re.compile(r"\s*,?\s*")


class Scale(NamedTuple):
    """The size of an image, in the numbers that a model writes."""

    width: float
    height: float


def list_from_objects(objects: Sequence[GroundedObject], numbers: Sequence[list[list[int]]]) -> str:
    """Returns objects of an answer as text, one item for each box.

    Args:
        numbers: the boxes of each object as `box_numbers` returns them.
    """
    items = []
    for obj, boxes in zip(objects, numbers, strict=True):
        for box in boxes:
            item: dict[str, Any] = {"bbox_2d" if len(box) == 4 else "point_2d": box}
            if obj.label is not None:
                item["label"] = obj.label
            items.append("\t" + json.dumps(item, ensure_ascii=False))
    return "```json\n[\n" + ",\n".join(items) + "\n]\n```"


def text_from_object(obj: GroundedObject, boxes: Sequence[Sequence[int]]) -> str:
    """Returns an object of a question as text: its label, and its boxes as lists of numbers."""
    words = [] if obj.label is None else [obj.label]
    words += [json.dumps(box) for box in boxes]
    return " ".join(words)


def box_numbers(
    obj: GroundedObject, images: Sequence[ImageSource], scale: Scale
) -> list[list[int]]:
    """Returns the boxes of an object as four whole numbers each, and its points as two.

    The size of its image is read only if a box is in pixels.

    Args:
        scale: the size of its image as written.

    Raises:
        DataError: the image does not exist or cannot be read.
    """
    width, height = scale
    numbers = []
    for region in object_in_frame(obj, "unit", images).boxes:
        box = box_around(region)
        values = [box.x0 * width, box.y0 * height, box.x1 * width, box.y1 * height]
        numbers.append(list(map(round, values[:2] if isinstance(region, Point) else values)))
    return numbers


def objects_from_text(text: str, scale: Scale | None, *, image: int = 0) -> tuple[Part, ...]:
    """Splits the text of an answer into plain text and objects with boxes or points. Never raises.

    Items of a list are read one by one, so that those before the end of a truncated answer count.
    Code fences and brackets around them are left out. Everything else stays text: prose, and
    items without a box of four numbers or a point of two. An answer without any item may have bare
    boxes, such as `[12, 34, 56, 78]`. Inverted boxes stay inverted.

    Args:
        scale: the size of the image as written. Boxes are then in the frame "unit", and otherwise,
            without an image, as they are written.

    >>> [cat] = objects_from_text('[{"bbox_2d": [0, 9, 5, 10], "label": "cat"}]', Scale(10, 10))
    >>> cat.label, cat.boxes
    ('cat', (Box(x0=0.0, y0=0.9, x1=0.5, y1=1.0, frame='unit'),))
    """
    found = list(_items(text)) or list(_bare_boxes(text))
    if not found:
        return (text,) if text else ()
    parts: list[Part] = []
    end = 0
    for number, (start, stop, label, boxes) in enumerate(found):
        between = text[end:start]
        if number and _COMMA.fullmatch(between):
            between = ""
        else:
            between = _without_list_end(between) if number else between
            between = _without_list_start(between)
        if between:
            parts.append(between)
        end = stop
        regions = tuple(_region(values, scale) for values in boxes)
        parts.append(GroundedObject(label=label, boxes=regions, image=image))
    if rest := _without_list_end(text[end:]):
        parts.append(rest)
    return tuple(parts)


def _without_list_start(text: str) -> str:
    text = text.rstrip().removesuffix("[").rstrip()
    for fence in ("```json", "```"):
        if text.endswith(fence):
            return text.removesuffix(fence).rstrip()
    return text


def _without_list_end(text: str) -> str:
    match = _LIST_END.match(text)
    return text[match.end() :] if match else text


def _region(values: Sequence[float], scale: Scale | None) -> Box | Point:
    """Returns the box of four numbers, or the point of two."""
    width, height = scale or (1, 1)
    frame: Frame = "pixel" if scale is None else "unit"
    xs = [x / width for x in values[::2]]
    ys = [y / height for y in values[1::2]]
    if len(values) == 2:
        return Point(x=xs[0], y=ys[0], frame=frame)
    return Box(x0=xs[0], y0=ys[0], x1=xs[1], y1=ys[1], frame=frame)


Found = tuple[int, int, str | None, list[list[float]]]  # first and last character, label, boxes


def _items(text: str) -> Iterator[Found]:
    for match in _ITEM.finditer(text):
        item = _parsed(match[0])
        if not isinstance(item, dict):
            continue
        boxes = next((_boxes(item[key]) for key in BOX_KEYS if key in item), [])
        if not boxes:
            boxes = next((_boxes(item[key], 2) for key in POINT_KEYS if key in item), [])
        if not boxes:
            continue
        label = next((item[key] for key in LABEL_KEYS if isinstance(item.get(key), str)), None)
        yield match.start(), match.end(), label, boxes


def _bare_boxes(text: str) -> Iterator[Found]:
    for match in _BARE_BOX.finditer(text):
        yield match.start(), match.end(), None, _boxes(match[0])


def _parsed(item: str) -> Any:
    """Reads an item as JSON, or as Python, whose quotes may be single."""
    try:
        return json.loads(item, strict=False)
    except (ValueError, RecursionError):
        pass
    with warnings.catch_warnings(action="ignore"):  # of escapes in strings
        try:
            return ast.literal_eval(item)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None


def _boxes(value: Any, size: int = 4) -> list[list[float]]:
    """Returns the four numbers of a box, or of each box of a list; [] if there are others.

    Numbers may be text, and the corners of a box may be lists of their own.

    Args:
        size: the numbers of a box; 2 for those of a point.
    """
    numbers = list(_numbers(value))
    if isinstance(value, list) and len(numbers) == size * len(value) > size:
        grouped = [list(_numbers(box)) for box in value]
        if all(len(box) == size for box in grouped):
            return grouped
    return [numbers] if len(numbers) == size else []


def _numbers(value: Any, depth: int = 0) -> Iterator[float]:
    """Yields the finite numbers of a value."""
    if isinstance(value, str):
        yield from map(float, _NUMBER.findall(value))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) < LARGEST:
            yield float(value)
    elif isinstance(value, list | tuple) and depth < 3:
        for entry in value:
            yield from _numbers(entry, depth + 1)
