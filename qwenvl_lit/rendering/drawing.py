"""Boxes and labels on images, readable on any background and at any size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from qwenvl_lit.grounding import to_frame
from qwenvl_lit.types import Box, GroundedObject, Part, Prediction, Quad

Point = tuple[float, float]
Rectangle = tuple[float, float, float, float]

PREDICTED = "#d81b60"  # these two can be told apart with every kind of colour blindness
EXPECTED = "#00695c"
SMALLEST_SIDE_PX = 320  # of the longer side: below it labels would cover the image
HAN_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "SimHei",
)


def draw_prediction(
    prediction: Prediction, image: int = 0, *, largest_side_px: int | None = None
) -> Image.Image:
    """One image of the conversation with the objects of the answer and, if it is known, of the expected one (see `draw_objects`)."""
    source, answer = prediction.conversation.images[image], prediction.conversation.answer
    opened = source.open()
    predicted = objects_of_image(prediction.parts, image, opened.size)
    expected = objects_of_image(answer.parts if answer else (), image, opened.size)
    return draw_objects(opened, predicted, expected, largest_side_px=largest_side_px)


def objects_of_image(
    parts: Iterable[Part], image: int, size: tuple[int, int]
) -> list[GroundedObject]:
    """The objects among `parts` that have boxes in this image of `size` (width, height), boxes in its pixels."""
    objects = (
        part
        for part in parts
        if isinstance(part, GroundedObject) and part.image == image and part.boxes
    )
    return [
        replace(obj, boxes=tuple(to_frame(box, "pixel", size=size) for box in obj.boxes))
        for obj in objects
    ]


def draw_objects(
    image: Image.Image,
    predicted: Sequence[GroundedObject],
    expected: Sequence[GroundedObject] = (),
    *,
    largest_side_px: int | None = None,
) -> Image.Image:
    """A copy of the image, in RGB, with predicted boxes solid and expected ones dashed, each with its label.

    Boxes are in pixels of `image` and drawn as they are, inverted too; what is outside is drawn at the edge. An image whose longer side is
    below 320 px is enlarged by a whole number without smoothing, so that labels stay readable; `largest_side_px` shrinks a larger one
    before drawing.
    """
    longer = max(image.size)
    scale: float = max(1, -(-SMALLEST_SIDE_PX // longer))
    if largest_side_px is not None:
        scale = min(scale, largest_side_px / longer)
    smoothing = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BICUBIC
    canvas = image.convert("RGB").resize(
        [max(1, round(side * scale)) for side in image.size], smoothing
    )
    draw = ImageDraw.Draw(canvas)
    width = max(3, round(max(canvas.size) / 250))
    right, bottom = (side - 1 for side in canvas.size)

    def within(x: float, y: float) -> Point:  # a model may put a corner far outside
        return min(max(x, 0), right), min(max(y, 0), bottom)

    marks = [
        (obj.label, [within(x * scale, y * scale) for x, y in _corners(region)], colour, dashed)
        for objects, colour, dashed in ((expected, EXPECTED, True), (predicted, PREDICTED, False))
        for obj in objects
        for region in obj.boxes
    ]
    for _, corners, colour, dashed in marks:
        _outline(draw, corners, colour, width, dashed)
    taken: list[Rectangle] = []
    for label, corners, colour, dashed in marks:
        if label:
            taken.append(_tag(draw, label, corners, colour, below=dashed, taken=taken))
    return canvas


@lru_cache(maxsize=64)
def font(size_px: int, *, han: bool = False) -> ImageFont.FreeTypeFont:
    """A scalable font: Pillow's own, or with `han` one of the usual Chinese fonts, if the machine has any."""
    if han:
        installed = {entry.name: entry.fname for entry in font_manager.fontManager.ttflist}
        for name in HAN_FONTS:
            if name in installed:
                return ImageFont.truetype(installed[name], size_px)
    letters = ImageFont.load_default(size_px)
    assert isinstance(
        letters, ImageFont.FreeTypeFont
    )  # Pillow's wheels are all built with FreeType
    return letters


def has_han(text: str) -> bool:
    """Whether the text has characters of Chinese, Japanese or Korean writing, or their full-width punctuation."""
    return any(
        "\u2e80" <= character <= "\u9fff" or "\uac00" <= character <= "\uffef" for character in text
    )


def _corners(region: Box | Quad) -> tuple[Point, ...]:
    if isinstance(region, Quad):
        return region.points
    return (
        (region.x0, region.y0),
        (region.x1, region.y0),
        (region.x1, region.y1),
        (region.x0, region.y1),
    )


def _outline(
    draw: ImageDraw.ImageDraw, corners: Sequence[Point], colour: str, width: int, dashed: bool
) -> None:
    sides = list(pairwise((*corners, corners[0])))
    for side in sides:  # white around the colour: seen on dark images too
        draw.line(side, fill="white", width=width + 2)
    for side in sides:
        for piece in _dashes(*side, 4 * width) if dashed else [side]:
            draw.line(piece, fill=colour, width=width)


def _dashes(start: Point, end: Point, length: float) -> Iterator[tuple[Point, Point]]:
    """Every other piece of about `length` of a line, beginning and ending with a drawn one."""
    (x, y), (dx, dy) = start, (end[0] - start[0], end[1] - start[1])
    pieces = 2 * round(max(abs(dx), abs(dy)) / length / 2) + 1
    for piece in range(0, pieces, 2):
        a, b = piece / pieces, (piece + 1) / pieces
        yield (x + a * dx, y + a * dy), (x + b * dx, y + b * dy)


def _tag(
    draw: ImageDraw.ImageDraw,
    label: str,
    corners: Sequence[Point],
    colour: str,
    *,
    below: bool,
    taken: Sequence[Rectangle],
) -> Rectangle:
    """Write a label at its box where it covers no other: first outside above (or below) it, then inside, then the other side."""
    right, bottom = draw.im.size
    letters = font(max(13, round(max(right, bottom) / 40)), han=has_han(label))
    width, height = draw.textlength(label, font=letters) + 4, sum(letters.getmetrics()) + 2
    ys = [y for _, y in corners]
    tops = [min(ys) - height, min(ys), max(ys) - height, max(ys)]
    x = max(0, min(*(x for x, _ in corners), right - width))
    spots = [
        (x, y, x + width, y + height)
        for y in (max(0, min(top, bottom - height)) for top in (reversed(tops) if below else tops))
    ]
    spot = next(
        (spot for spot in spots if not any(_overlap(spot, other) for other in taken)), spots[0]
    )
    draw.rectangle(spot, fill=colour)
    draw.text((spot[0] + 2, spot[1]), label, fill="white", font=letters)
    return spot


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
