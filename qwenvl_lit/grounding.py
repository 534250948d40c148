"""Boxes: their frames, their overlap, and the markup Qwen-VL writes them in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import Enum

from qwenvl_lit.types import Box, DataError, Frame, GroundedObject, ImageSource, Quad

GRID = 999  # coordinates in text run from 0 to this


def to_frame(box: Box | Quad, frame: Frame, *, size: tuple[int, int]) -> Box | Quad:
    """The same place in another frame, for an image of `size` (width, height) in pixels.

    Grid values become whole numbers by truncation, as ms-swift writes them; nothing is clipped or put in order. A box that is in `frame`
    already comes back as it is: through pixels, 12 % of grid values would lose a step.

    >>> to_frame(Box(x0=138, y0=136, x1=235, y1=359), "grid", size=(640, 427))
    Box(x0=215, y0=318, x1=366, y1=839, frame='grid')
    """
    if box.frame == frame:
        return box

    def convert(value: float, side: int) -> float:
        match box.frame, frame:
            case "pixel", "grid":
                return int(value / side * GRID)
            case "unit", "grid":
                return int(value * GRID)
            case "pixel", "unit":
                return value / side
            case "grid", "unit":
                return value / GRID
            case "grid", "pixel":
                return value / GRID * side
            case "unit", "pixel":
                return value * side
        raise ValueError(f"frames are pixel, grid and unit, got {box.frame!r} and {frame!r}")

    width, height = size
    if isinstance(box, Quad):
        return Quad(
            points=tuple((convert(x, width), convert(y, height)) for x, y in box.points),
            frame=frame,
        )
    return Box(
        x0=convert(box.x0, width),
        y0=convert(box.y0, height),
        x1=convert(box.x1, width),
        y1=convert(box.y1, height),
        frame=frame,
    )


def object_in_frame(
    thing: GroundedObject, frame: Frame, images: Sequence[ImageSource]
) -> GroundedObject:
    """`thing` with all its boxes in `frame`. The size of its image is read only if a box is in another frame.

    Raises:
        DataError: that image does not exist or cannot be read.
    """
    if all(box.frame == frame for box in thing.boxes):
        return thing
    if not 0 <= thing.image < len(images):
        raise DataError(
            f"object {thing.label!r} names image {thing.image}, counted from 0, of {len(images)}; check its `image`"
        )
    size = images[thing.image].size
    return replace(thing, boxes=tuple(to_frame(box, frame, size=size) for box in thing.boxes))


def iou(a: Box, b: Box) -> float:
    """Intersection over union, in [0, 1]; 0 for boxes that only touch or are inverted. Both in one frame.

    >>> iou(Box(x0=0, y0=0, x1=2, y1=2), Box(x0=1, y0=0, x1=3, y1=2))
    0.3333333333333333
    """
    if a.frame != b.frame:
        raise ValueError(f"boxes need one frame, got {a.frame} and {b.frame}; use to_frame first")
    shared = _side(max(a.x0, b.x0), min(a.x1, b.x1)) * _side(max(a.y0, b.y0), min(a.y1, b.y1))
    union = _side(a.x0, a.x1) * _side(a.y0, a.y1) + _side(b.x0, b.x1) * _side(b.y0, b.y1) - shared
    return shared / union if union else 0.0


def _side(low: float, high: float) -> float:
    return max(0.0, high - low)


class Tag(Enum):
    """A mark of the markup. Not a string, so that a label which spells one stays text."""

    REF = "<ref>"
    REF_END = "</ref>"
    BOX = "<box>"
    BOX_END = "</box>"
    QUAD = "<quad>"
    QUAD_END = "</quad>"


def tags_from_object(thing: GroundedObject, images: Sequence[ImageSource]) -> Iterator[Tag | str]:
    """`<ref>label</ref><box>(x0,y0),(x1,y1)</box>...` as tags and text. `images`: all of the conversation.

    Raises:
        DataError: a box in another frame names an image that does not exist.
    """
    if thing.label is not None:
        yield from (Tag.REF, thing.label, Tag.REF_END)
    for box in object_in_frame(thing, "grid", images).boxes:
        if isinstance(box, Quad):
            yield from (Tag.QUAD, ",".join(map(_point, box.points)), Tag.QUAD_END)
        else:
            yield from (
                Tag.BOX,
                f"{_point((box.x0, box.y0))},{_point((box.x1, box.y1))}",
                Tag.BOX_END,
            )


def _point(point: tuple[float, float]) -> str:
    x, y = (int(value) if value == int(value) else value for value in point)
    return f"({x},{y})"


_LABEL = r"<ref>((?:(?!</?ref>).)*)</ref>"


def _patterns(digits: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What finds objects, and what parts their boxes."""
    number = rf"[\s()]*-?{digits}[\s()]*"
    box = rf"<box>{number}(?:,{number}){{3}}</box>|<quad>{number}(?:,{number}){{7}}</quad>"
    return re.compile(rf"(?:{_LABEL})?((?:{box})+)|{_LABEL}", re.DOTALL), re.compile(box)


_WHOLE = _patterns(r"[0-9]{1,6}")
_FRACTIONS = _patterns(r"[0-9]{1,6}(?:\.[0-9]{1,17})?")


def objects_from_tags(
    text: str, *, image: int = 0, fractions: bool = False
) -> tuple[str | GroundedObject, ...]:
    """`text` parted at its objects, all of them in `image` and with boxes on the grid.

    A label right before boxes belongs to all of them. Markup that cannot be read stays text, as do boxes with fractions unless `fractions`
    are asked for; inverted boxes stay inverted. Never raises.

    >>> objects_from_tags("see <ref>a cat</ref><box>(1,2),(3,4)</box>")[1].label
    'a cat'
    """
    whole, one_box = _FRACTIONS if fractions else _WHOLE
    parts: list[str | GroundedObject] = []
    end = 0
    for match in whole.finditer(text):
        if before := text[end : match.start()]:
            parts.append(before)
        end = match.end()
        label, boxes, lone_label = match.groups()
        found = tuple(_box_from_tags(m.group()) for m in one_box.finditer(boxes or ""))
        parts.append(GroundedObject(label=label if boxes else lone_label, boxes=found, image=image))
    if rest := text[end:]:
        parts.append(rest)
    return tuple(parts)


def _box_from_tags(tags: str) -> Box | Quad:
    values = [
        float(value) if "." in value else int(value)
        for value in re.findall(r"-?[0-9]+(?:\.[0-9]+)?", tags)
    ]
    if len(values) == 8:
        return Quad(points=tuple(zip(values[::2], values[1::2], strict=True)), frame="grid")
    return Box(x0=values[0], y0=values[1], x1=values[2], y1=values[3], frame="grid")
