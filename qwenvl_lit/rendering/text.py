"""Conversations, answers and boxes as text for people."""

from __future__ import annotations

from collections.abc import Iterable

from qwenvl_lit.types import Box, Conversation, GroundedObject, ImageSource, Part, Prediction


def readable(parts: Iterable[Part]) -> str:
    """Text with `<img>name</img>` for an image, and an object as its label and its boxes.

    >>> readable(["Where is ", GroundedObject(label="the dog", boxes=(Box(x0=1, y0=2, x1=3.5, y1=4),)), "?"])
    'Where is the dog (1, 2, 3.5, 4)?'
    """
    pieces = []
    for part in parts:
        if isinstance(part, ImageSource):
            pieces.append(f"<img>{part.name}</img>")
        elif isinstance(part, GroundedObject):
            boxes = [
                f"({', '.join(f'{value:g}' for value in numbers)})" for numbers in box_numbers(part)
            ]
            pieces.append(" ".join(([part.label] if part.label else []) + boxes))
        else:
            pieces.append(part)
    return "".join(pieces)


def box_numbers(obj: GroundedObject) -> list[list[float]]:
    """Each box as [x0, y0, x1, y1], each quad as its four x, y in turn, in their own frame, to a hundredth."""
    regions = [
        (b.x0, b.y0, b.x1, b.y1) if isinstance(b, Box) else [v for point in b.points for v in point]
        for b in obj.boxes
    ]
    return [[round(value, 2) for value in numbers] for numbers in regions]


def prompt_text(conversation: Conversation) -> str:
    """What the model was asked. A single turn stands alone, several follow each other on lines that begin with the role."""
    turns = conversation.prompt().turns
    if len(turns) == 1:
        return readable(turns[0].parts)
    return "\n".join(f"{turn.role}: {readable(turn.parts)}" for turn in turns)


def images_with_boxes(prediction: Prediction) -> list[int]:
    """Indices of the conversation's images that the answer or the expected answer has boxes in."""
    answer = prediction.conversation.answer
    parts = (*prediction.parts, *(answer.parts if answer else ()))
    boxed = {part.image for part in parts if isinstance(part, GroundedObject) and part.boxes}
    return [image for image in range(len(prediction.conversation.images)) if image in boxed]
