"""Objects as plain text: points `(0.17,0.06)` and boxes `(0.17,0.06,0.33,0.20)`.

Coordinates are fractions of the image's width and height, with two decimals. SeeClick was trained
from Qwen-VL-Chat with them (Cheng et al., ACL 2024).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qwenvl_lit.grounding import box_around, center, object_in_frame
from qwenvl_lit.settings import BoxForm
from qwenvl_lit.types import Box, GroundedObject, ImageSource, Part, Point, Region

UNIT_FORM = "SeeClick ((0.17,0.06))"  # the name in `data.other_markup`
# The question that SeeClick's evaluation asks, with what the answer is to have at its end
FIND_PROMPTS: dict[BoxForm, str] = {
    "unit_text": (
        "{image}In this UI screenshot, what is the position of the element corresponding to the "
        'command "{question}" (with bbox)?'
    ),
    "unit_points": (
        "{image}In this UI screenshot, what is the position of the element corresponding to the "
        'command "{question}" (with point)?'
    ),
}

# A fraction, or a whole 0 or 1: `(3, 4)` in an answer is no place in an image.
_NUMBER = r"\s*([+-]?(?:\d?\.\d{1,17}|[01]))\s*"
_PLACE = re.compile(rf"\({_NUMBER},{_NUMBER}(?:,{_NUMBER},{_NUMBER})?\)")


def text_from_object(obj: GroundedObject, images: Sequence[ImageSource], form: BoxForm) -> str:
    """Returns the label of an object and its boxes as text, with blanks between them.

    Args:
        images: all images of the conversation.
        form: "unit_text" writes a box by its corners, "unit_points" by its center. Points are
            written alike.

    Raises:
        DataError: a box is in pixels, and its image does not exist or cannot be read.
    """
    words = [] if obj.label is None else [obj.label]
    for region in object_in_frame(obj, "unit", images).boxes:
        values = ",".join(f"{value:.2f}" for value in _values(region, form))
        words.append(f"({values})")
    return " ".join(words)


def _values(region: Region, form: BoxForm) -> tuple[float, ...]:
    if form == "unit_points" or isinstance(region, Point):
        point = center(region)
        return point.x, point.y
    box = box_around(region)
    return box.x0, box.y0, box.x1, box.y1


def objects_from_text(text: str, *, image: int = 0) -> tuple[Part, ...]:
    """Splits the text of an answer into plain text and objects, which have no label. Never raises.

    Points and boxes are both read, in the frame "unit". They may lie outside the image, and
    inverted boxes stay inverted.

    >>> objects_from_text("at (0.17,0.06)")[1].boxes
    (Point(x=0.17, y=0.06, frame='unit'),)
    """
    parts: list[Part] = []
    end = 0
    for match in _PLACE.finditer(text):
        if before := text[end : match.start()]:
            parts.append(before)
        end = match.end()
        values = [float(value) for value in match.groups() if value is not None]
        parts.append(GroundedObject(boxes=(_region(values),), image=image))
    if rest := text[end:]:
        parts.append(rest)
    return tuple(parts)


def _region(values: Sequence[float]) -> Region:
    if len(values) == 2:
        return Point(x=values[0], y=values[1], frame="unit")
    return Box(x0=values[0], y0=values[1], x1=values[2], y1=values[3], frame="unit")
