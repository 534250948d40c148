"""Draws boxes, points and labels on images, readable on any background and at any size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw

from qwenvl_lit.grounding import to_frame
from qwenvl_lit.rendering.fonts import font_for, missing_characters, shortened
from qwenvl_lit.types import GroundedObject, Part, Point, Prediction, Quad, Region

Corner = tuple[float, float]
Rectangle = tuple[float, float, float, float]

# These two colors are distinguishable with every kind of color blindness.
PREDICTED = "#d81b60"
EXPECTED = "#00695c"
RADIUS = 4  # of the circle of a point, in widths of a line
MIN_LONGER_SIDE_PX = 320  # labels would cover most of a smaller image
MIN_SHORTER_SIDE_PX = 64  # boxes and labels would not fit into a thinner image


@dataclass(frozen=True, slots=True)
class _Outline:
    """The outline of a box, a quad or the circle of a point, in pixels of the canvas."""

    label: str | None
    corners: list[Corner]
    is_point: bool
    color: str
    dashed: bool


def draw_prediction(
    prediction: Prediction, image: int = 0, *, largest_side_px: int | None = None
) -> Image.Image:
    """Draws the objects of the answer and of the expected answer on an image of the conversation.

    See `draw_objects` for the arguments and the result.

    Args:
        image: the index of the image in the conversation.
    """
    source, reference = prediction.conversation.images[image], prediction.conversation.answer
    opened = source.open()
    predicted = objects_of_image(prediction.parts, image, opened.size)
    expected = objects_of_image(reference.parts if reference else (), image, opened.size)
    return draw_objects(opened, predicted, expected, largest_side_px=largest_side_px)


def objects_of_image(
    parts: Iterable[Part], image: int, size: tuple[int, int]
) -> list[GroundedObject]:
    """Returns the objects among `parts` that have boxes in an image, with boxes in pixels.

    Args:
        image: the index of the image in the conversation.
        size: the width and height of the image.
    """
    objects = []
    for part in objects_in(parts, image):
        boxes = tuple(to_frame(box, "pixel", size=size) for box in part.boxes)
        objects.append(replace(part, boxes=boxes))
    return objects


def objects_in(parts: Iterable[Part], image: int) -> Iterator[GroundedObject]:
    """Yields the objects among `parts` that have boxes in an image, given by its index."""
    for part in parts:
        if isinstance(part, GroundedObject) and part.image == image and part.boxes:
            yield part


def draw_objects(
    image: Image.Image,
    predicted: Sequence[GroundedObject],
    expected: Sequence[GroundedObject] = (),
    *,
    largest_side_px: int | None = None,
) -> Image.Image:
    """Returns an RGB copy of the image with boxes, points and labels. Expected boxes are dashed.

    Boxes are in pixels of `image`. Expected boxes are drawn last: where two boxes are equal, both
    colors are seen. A label that no font can write is its number, see `label_list`.
    Inverted boxes are drawn too, and corners outside the image are
    moved to its edge. An image whose longer side is below 320 px is enlarged by an integer factor
    without smoothing, so that the labels are readable. A side that is still below 64 px is
    stretched to it.

    Args:
        largest_side_px: the longer side of the result, at most. Larger images are scaled down
            before drawing.
    """
    scale = _scale(image.size, largest_side_px)
    smoothing = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    canvas = image.convert("RGB").resize(_drawn_size(image.size, scale), smoothing)
    scales = canvas.width / image.width, canvas.height / image.height
    outlines = [
        *_outlines(predicted, scales, canvas.size, PREDICTED, dashed=False),
        *_outlines(expected, scales, canvas.size, EXPECTED, dashed=True),
    ]
    draw = ImageDraw.Draw(canvas)
    longer, shorter = max(canvas.size), min(canvas.size)
    width = max(3, round(min(longer / 250, shorter / 30)))
    for outline in outlines:  # a border that dark images need, below all boxes
        if not outline.is_point:
            _draw_outline(draw, replace(outline, color="white", dashed=False), width + 2)
    for outline in outlines:
        if outline.is_point:
            _draw_point(draw, outline, width)
        else:
            _draw_outline(draw, outline, width)
    taken: list[Rectangle] = []
    for outline in outlines:
        if outline.label:
            margin = RADIUS * width + 1 if outline.is_point else 0
            taken.append(_draw_label(draw, outline.label, outline, taken, margin))
    return canvas


def check_image_name(path: Path) -> None:
    """Raises a ValueError if no image can be written to `path`."""
    image_format = Image.registered_extensions().get(path.suffix.lower())
    if image_format not in Image.SAVE:
        raise ValueError(
            f"path={str(path)!r}: the ending names the image format, such as .png or .jpg, "
            f"got {path.suffix!r}"
        )
    if not path.parent.is_dir():
        raise ValueError(f"path={str(path)!r}: the folder {path.parent} does not exist")


def check_objects(objects: Iterable[GroundedObject]) -> list[GroundedObject]:
    """Returns `objects` as a list.

    Raises:
        TypeError: they are something else, for example the text of an answer.
    """
    wrong: list[object] = [objects]
    listed: list[GroundedObject] = []
    if isinstance(objects, Iterable) and not isinstance(objects, str):
        listed = list(objects)
        wrong = [item for item in listed if not isinstance(item, GroundedObject)]
    for item in wrong:
        raise TypeError(
            f"draw takes a list of objects, such as answer.objects, got "
            f"{type(item).__name__} {str(item)[:60]!r}"
        )
    return listed


def drawn_label(label: str, number: int) -> str:
    """Returns what stands for a label in an image: its number if no font has its characters."""
    return str(number) if missing_characters(label) else label


def label_list(objects: Iterable[GroundedObject]) -> list[str]:
    """Returns the labels of objects with boxes, with the numbers that stand for them in an image.

    >>> box = Box(x0=1, y0=2, x1=3, y1=4)
    >>> label_list([GroundedObject(label="dog", boxes=(box,))])
    ['dog']
    """
    labels = []
    for number, obj in enumerate(objects, 1):
        if obj.label and obj.boxes:
            drawn = drawn_label(obj.label, number)
            labels.append(obj.label if drawn == obj.label else f"{drawn}: {obj.label}")
    return labels


def _scale(size: tuple[int, int], largest_side_px: int | None) -> float:
    longer = max(size)
    scale = max(1, math.ceil(MIN_LONGER_SIDE_PX / longer))
    if largest_side_px is None:
        return scale
    return min(scale, largest_side_px / longer)


def _drawn_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    width, height = (max(MIN_SHORTER_SIDE_PX, round(side * scale)) for side in size)
    return width, height


def _outlines(
    objects: Iterable[GroundedObject],
    scales: tuple[float, float],
    size: tuple[int, int],
    color: str,
    *,
    dashed: bool,
) -> Iterator[_Outline]:
    right, bottom = size[0] - 1, size[1] - 1
    for number, obj in enumerate(objects, 1):
        label = " ".join((obj.label or "").split())  # on one line
        label = drawn_label(label, number)
        for region in obj.boxes:
            corners = []
            for x, y in _corners(region):  # clamped: a model may predict corners far outside
                corners.append((_clamp(x * scales[0], right), _clamp(y * scales[1], bottom)))
            yield _Outline(label, corners, isinstance(region, Point), color, dashed)


def _corners(region: Region) -> tuple[Corner, ...]:
    match region:
        case Quad():
            return region.points
        case Point():
            return ((region.x, region.y),)
    x0, y0, x1, y1 = region.x0, region.y0, region.x1, region.y1
    return (x0, y0), (x1, y0), (x1, y1), (x0, y1)


def _clamp(value: float, largest: float) -> float:
    return min(max(value, 0), largest)


def _draw_outline(draw: ImageDraw.ImageDraw, outline: _Outline, width: int) -> None:
    for start, end in pairwise((*outline.corners, outline.corners[0])):
        pieces = [(start, end)]
        if outline.dashed:
            pieces = list(_dashes(start, end, 4 * width))
        for piece in pieces:
            draw.line(piece, fill=outline.color, width=width)


def _draw_point(draw: ImageDraw.ImageDraw, outline: _Outline, width: int) -> None:
    """Draws a circle with a dot in its center; of an expected point, the circle alone."""
    [(x, y)] = outline.corners
    radius = RADIUS * width
    for extra, color in ((1, "white"), (0, outline.color)):
        around = _square(x, y, radius + extra)
        draw.ellipse(around, outline=color, width=width + 2 * extra)
        if not outline.dashed:
            draw.ellipse(_square(x, y, width + extra), fill=color)


def _square(x: float, y: float, half: float) -> Rectangle:
    return x - half, y - half, x + half, y + half


def _dashes(start: Corner, end: Corner, length: float) -> Iterator[tuple[Corner, Corner]]:
    """Divides a line into pieces of about `length` and yields the first, third, ... and last."""
    x, y = start
    dx, dy = end[0] - x, end[1] - y
    pieces = 2 * round(max(abs(dx), abs(dy)) / length / 2) + 1
    for piece in range(0, pieces, 2):
        a, b = piece / pieces, (piece + 1) / pieces
        yield (x + a * dx, y + a * dy), (x + b * dx, y + b * dy)


def _draw_label(
    draw: ImageDraw.ImageDraw,
    label: str,
    outline: _Outline,
    taken: Sequence[Rectangle],
    margin: int,
) -> Rectangle:
    """Writes a label at its box and returns the rectangle that the label covers.

    Four positions are tried, from above the box to below it, or in reverse order for a dashed box,
    and then the same at its right side. The first one that covers least of `taken` is used.

    Args:
        margin: space above and below the corners, for the circle of a point.
    """
    right, bottom = draw.im.size
    letters = font_for(label, max(13, round(min(max(right, bottom) / 40, min(right, bottom) / 5))))
    label = shortened(label, letters, right - 4)
    width, height = draw.textlength(label, font=letters) + 4, sum(letters.getmetrics()) + 2
    xs, ys = zip(*outline.corners, strict=True)
    highest, lowest = min(ys) - margin, max(ys) + margin
    tops = [highest - height, highest, lowest - height, lowest]
    if outline.dashed:
        tops.reverse()
    rectangles = []
    for left in (min(xs), max(xs) - width):
        left = max(0, min(left, right - width))
        for top in tops:
            top = max(0, min(top, bottom - height))
            rectangles.append((left, top, left + width, top + height))
    rectangle = min(rectangles, key=lambda candidate: _covered(candidate, taken))
    draw.rectangle(rectangle, fill=outline.color, outline="white")
    draw.text((rectangle[0] + 2, rectangle[1]), label, fill="white", font=letters)
    return rectangle


def _covered(rectangle: Rectangle, taken: Sequence[Rectangle]) -> float:
    """Returns the area of a rectangle that other rectangles cover."""
    area = 0.0
    for other in taken:
        width = min(rectangle[2], other[2]) - max(rectangle[0], other[0])
        height = min(rectangle[3], other[3]) - max(rectangle[1], other[1])
        area += max(0, width) * max(0, height)
    return area
