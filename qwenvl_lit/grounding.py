"""Boxes: conversion between frames, overlap, and the markup in which Qwen-VL writes them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import Enum

from qwenvl_lit.types import (
    Box,
    DataError,
    Frame,
    GroundedObject,
    ImageSource,
    Point,
    Quad,
    Region,
)

GRID = 999  # coordinates in text run from 0 to this value


def to_frame(box: Region, frame: Frame, *, size: tuple[int, int]) -> Region:
    """Returns the same region in another frame, for an image of `size` (width, height) in pixels.

    Grid values become integers by truncation, as ms-swift writes them. Values are not clipped,
    and swapped corners stay swapped. A box that is already in `frame` is returned unchanged: a
    round trip through pixels would lower 12 % of the grid values by one.

    >>> to_frame(Box(x0=138, y0=136, x1=235, y1=359), "grid", size=(640, 427))
    Box(x0=215, y0=318, x1=366, y1=839, frame='grid')
    """
    if box.frame == frame:
        return box

    def convert(value: float, size_px: int) -> float:
        match box.frame, frame:
            case "pixel", "grid":
                return int(value / size_px * GRID)
            case "unit", "grid":
                return int(value * GRID)
            case "pixel", "unit":
                return value / size_px
            case "grid", "unit":
                return value / GRID
            case "grid", "pixel":
                return value / GRID * size_px
            case "unit", "pixel":
                return value * size_px
        raise ValueError(f"frames are pixel, grid and unit, got {box.frame!r} and {frame!r}")

    width, height = size
    if isinstance(box, Quad):
        points = tuple((convert(x, width), convert(y, height)) for x, y in box.points)
        return Quad(points=points, frame=frame)
    if isinstance(box, Point):
        return Point(x=convert(box.x, width), y=convert(box.y, height), frame=frame)
    return Box(
        x0=convert(box.x0, width),
        y0=convert(box.y0, height),
        x1=convert(box.x1, width),
        y1=convert(box.y1, height),
        frame=frame,
    )


def object_in_frame(
    obj: GroundedObject, frame: Frame, images: Sequence[ImageSource]
) -> GroundedObject:
    """Returns `obj` with all boxes in `frame`.

    The size of its image is read only if a box is in another frame.

    Raises:
        DataError: the image does not exist or cannot be read.
    """
    if all(box.frame == frame for box in obj.boxes):
        return obj
    if not 0 <= obj.image < len(images):
        raise DataError(
            f"object {obj.label!r} names image {obj.image}, counted from 0, of {len(images)}; "
            "check its `image`"
        )
    size = images[obj.image].size
    return replace(obj, boxes=tuple(to_frame(box, frame, size=size) for box in obj.boxes))


def box_around(region: Region) -> Box:
    """Returns the smallest box around a region: a box itself; of a point, a box without area.

    >>> box_around(Point(x=2, y=3))
    Box(x0=2, y0=3, x1=2, y1=3, frame='pixel')
    """
    match region:
        case Box():
            return region
        case Point(x=x, y=y):
            return Box(x0=x, y0=y, x1=x, y1=y, frame=region.frame)
    xs, ys = zip(*region.points, strict=True)
    return Box(x0=min(xs), y0=min(ys), x1=max(xs), y1=max(ys), frame=region.frame)


def center(region: Region) -> Point:
    """Returns the center of the smallest box around a region.

    >>> center(Box(x0=0, y0=0, x1=1, y1=4))
    Point(x=0.5, y=2.0, frame='pixel')
    """
    if isinstance(region, Point):
        return region
    box = box_around(region)
    return Point(x=(box.x0 + box.x1) / 2, y=(box.y0 + box.y1) / 2, frame=box.frame)


def iou(a: Box, b: Box) -> float:
    """Intersection over union, in [0, 1]; 0 for boxes that only touch or are inverted.

    >>> iou(Box(x0=0, y0=0, x1=2, y1=2), Box(x0=1, y0=0, x1=3, y1=2))
    0.3333333333333333

    Raises:
        ValueError: the boxes are in different frames.
    """
    if a.frame != b.frame:
        raise ValueError(f"boxes need one frame, got {a.frame} and {b.frame}; use to_frame first")
    width = _length(max(a.x0, b.x0), min(a.x1, b.x1))
    height = _length(max(a.y0, b.y0), min(a.y1, b.y1))
    shared = width * height
    union = _area(a) + _area(b) - shared
    if union == 0:
        return 0.0
    return shared / union


def _area(box: Box) -> float:
    return _length(box.x0, box.x1) * _length(box.y0, box.y1)


def _length(low: float, high: float) -> float:
    return max(0.0, high - low)


class Tag(Enum):
    """A tag of the markup; not a str, so that a label with the characters of a tag stays text."""

    REF = "<ref>"
    REF_END = "</ref>"
    BOX = "<box>"
    BOX_END = "</box>"
    QUAD = "<quad>"
    QUAD_END = "</quad>"


def tags_from_object(obj: GroundedObject, images: Sequence[ImageSource]) -> Iterator[Tag | str]:
    """Yields `<ref>label</ref><box>(x0,y0),(x1,y1)</box>...` as tags and text.

    Args:
        images: all images of the conversation.

    Raises:
        DataError: a box is not on the grid, and its image does not exist or cannot be read; or the
            object has a point.
    """
    if obj.label is not None:
        yield from (Tag.REF, obj.label, Tag.REF_END)
    for box in object_in_frame(obj, "grid", images).boxes:
        if isinstance(box, Point):
            raise DataError(
                f"object {obj.label!r} has a point, which the markup of Qwen-VL has no form for; "
                f"set data.boxes=unit_points, or give its box"
            )
        if isinstance(box, Quad):
            yield from (Tag.QUAD, ",".join(map(_point, box.points)), Tag.QUAD_END)
        else:
            corners = f"{_point((box.x0, box.y0))},{_point((box.x1, box.y1))}"
            yield from (Tag.BOX, corners, Tag.BOX_END)


def _point(point: tuple[float, float]) -> str:
    x, y = map(_number, point)
    return f"({x},{y})"


def _number(value: float) -> float:
    """Returns 3 for 3.0, so that whole numbers are written without a decimal point."""
    return int(value) if value == int(value) else value


class _Markup:
    """Patterns of objects in text.

    Args:
        number: pattern of a coordinate.
        not_in_label: pattern of what ends a label, or makes it unreadable.
    """

    def __init__(self, number: str, not_in_label: str):
        value = rf"[\s()]*{number}[\s()]*"
        box = rf"<box>{value}(?:,{value}){{3}}</box>|<quad>{value}(?:,{value}){{7}}</quad>"
        label = rf"<ref>((?:(?!{not_in_label}).)*)</ref>"
        self.box = re.compile(box)
        self.boxes = re.compile(f"(?:{box})+")
        self.labelled = re.compile(rf"{label}((?:{box})*)", re.DOTALL)


# Numbers of answers are read as Python's int() does in the original: 1, -1, +1, 1_0, in the digits
# of any script. A label ends at the first </ref>, so it may hold <ref>.
_ANSWER = _Markup(number=r"[+-]?\d(?:_?\d){0,5}", not_in_label="</ref>")
_ROW = _Markup(number=r"-?[0-9]{1,6}(?:\.[0-9]{1,17})?", not_in_label="</?ref>")


def objects_from_tags(
    text: str, *, image: int = 0, of_row: bool = False
) -> tuple[str | GroundedObject, ...]:
    """Splits `text` into plain text and objects, with boxes on the grid. Never raises.

    A label directly before boxes belongs to all of them. Markup that cannot be read stays text.
    Inverted boxes stay inverted. The time is linear in the length of the text.

    Args:
        image: index of the image that all objects are in.
        of_row: read the text of a row, not of an answer. Boxes may have decimal fractions, but
            `+1`, `1_0` and other digits than 0 to 9 stay text, and so does a `<ref>` in a label.

    >>> objects_from_tags("see <ref>a cat</ref><box>(1,2),(3,4)</box>")[1].label
    'a cat'
    """
    markup = _ROW if of_row else _ANSWER
    parts: list[str | GroundedObject] = []
    end = 0
    for match in _objects_in(text, markup):
        if before := text[end : match.start()]:
            parts.append(before)
        end = match.end()
        label, box_tags = match.groups() if match.re is markup.labelled else (None, match[0])
        boxes = tuple(_box_from_tags(box.group()) for box in markup.box.finditer(box_tags))
        parts.append(GroundedObject(label=label, boxes=boxes, image=image))
    if rest := text[end:]:
        parts.append(rest)
    return tuple(parts)


def _objects_in(text: str, markup: _Markup) -> Iterator[re.Match[str]]:
    """Yields matches of `labelled` and `boxes`, whichever comes first.

    Each pattern searches the text once: a match that is behind the next one is kept.
    """
    # Behind the last </ref> each <ref> would search the rest of the text.
    end_of_labels = text.rfind("</ref>") + 1
    labelled = markup.labelled.search(text) if "<ref>" in text[:end_of_labels] else None
    boxes = markup.boxes.search(text)
    while match := _first(labelled, boxes):
        yield match
        position = match.end()
        if labelled and labelled.start() < position:
            labelled = None
            if text.find("<ref>", position, end_of_labels) >= 0:
                labelled = markup.labelled.search(text, position)
        if boxes and boxes.start() < position:
            boxes = markup.boxes.search(text, position)


def _first(*matches: re.Match[str] | None) -> re.Match[str] | None:
    found = [match for match in matches if match is not None]
    return min(found, key=lambda match: match.start(), default=None)


def _box_from_tags(tags: str) -> Region:
    values: list[float] = []
    for number in re.findall(r"[+-]?[\d_]+(?:\.\d+)?", tags):
        values.append(float(number) if "." in number else int(number))
    if len(values) == 8:
        return Quad(points=tuple(zip(values[::2], values[1::2], strict=True)), frame="grid")
    return Box(x0=values[0], y0=values[1], x1=values[2], y1=values[3], frame="grid")
