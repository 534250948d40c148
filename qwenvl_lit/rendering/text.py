"""Formats conversations, answers and boxes as text for people."""

from __future__ import annotations

from collections.abc import Iterable

from qwenvl_lit.types import (
    Box,
    Conversation,
    GroundedObject,
    ImageSource,
    Part,
    Point,
    Prediction,
    Region,
)


def readable(parts: Iterable[Part]) -> str:
    """Returns the parts as text, with `<img>NAME</img>` for images and label and boxes for objects.

    >>> box = Box(x0=1, y0=2, x1=3.5, y1=4)
    >>> readable(["Where is ", GroundedObject(label="the dog", boxes=(box,)), "?"])
    'Where is the dog (1, 2, 3.5, 4)?'
    """
    pieces = []
    for part in parts:
        if isinstance(part, ImageSource):
            pieces.append(f"<img>{part.name}</img>")
        elif isinstance(part, GroundedObject):
            pieces.append(_readable_object(part))
        else:
            pieces.append(part)
    return "".join(pieces)


def box_numbers(obj: GroundedObject) -> list[list[float]]:
    """Returns each box as [x0, y0, x1, y1], a point as [x, y], a quad as x, y of its four corners.

    The values stay in the frame of the box and are rounded to two decimals.
    """
    return [_values(region) for region in obj.boxes]


def prompt_text(conversation: Conversation) -> str:
    """Returns the prompt of the conversation as text.

    A prompt of one turn is the text of the turn. A prompt of several turns has a paragraph for each
    turn, which begins with the role.
    """
    turns = conversation.prompt().turns
    if len(turns) == 1:
        return readable(turns[0].parts)
    return "\n".join(f"{turn.role}: {readable(turn.parts)}" for turn in turns)


def images_with_boxes(prediction: Prediction) -> list[int]:
    """Returns the indices of images in which the answer or the expected answer has boxes."""
    parts = list(prediction.parts)
    reference = prediction.conversation.answer
    if reference:
        parts += reference.parts
    boxed = {part.image for part in parts if isinstance(part, GroundedObject) and part.boxes}
    return [image for image in range(len(prediction.conversation.images)) if image in boxed]


def _readable_object(obj: GroundedObject) -> str:
    words = [obj.label] if obj.label else []
    for numbers in box_numbers(obj):
        words.append("(" + ", ".join(f"{value:g}" for value in numbers) + ")")
    return " ".join(words)


def _values(region: Region) -> list[float]:
    points: tuple[tuple[float, float], ...]
    match region:
        case Box():
            points = ((region.x0, region.y0), (region.x1, region.y1))
        case Point():
            points = ((region.x, region.y),)
        case _:
            points = region.points
    values = []
    for x, y in points:
        values += [round(x, 2), round(y, 2)]
    return values
