"""Draws the objects of the demo images with Pillow.

The objects differ in shape and color, so that a tiny model can distinguish them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFilter

Color = tuple[int, int, int]
Point = tuple[float, float]

CANVAS_PX = 480
MARGIN_PX = 40  # space for the outline
UNIT_PX = (CANVAS_PX - 2 * MARGIN_PX) / 100
OUTLINE: Color = (43, 39, 60)


@cache
def draw_sprite(name: str, side_px: int) -> Image.Image:
    """Returns an RGBA image of the object, stretched to touch all four sides.

    The background is transparent. The image is cached, so callers must not modify it.
    """
    image = Image.new("RGBA", (CANVAS_PX, CANVAS_PX))
    _ALL_DRAWINGS[name](Pen(image))
    blurred = image.getchannel("A").filter(ImageFilter.GaussianBlur(9))
    widened = blurred.point(lambda value: 255 if value > 8 else 0)
    outlined = Image.new("RGBA", image.size)
    outlined.paste(OUTLINE, mask=widened)
    outlined.alpha_composite(image)
    return outlined.crop(outlined.getbbox()).resize((side_px, side_px), Image.Resampling.BOX)


class Pen:
    """Draws on a square of 100 x 100 units. The origin is at the top left, and y points down."""

    def __init__(self, image: Image.Image):
        self._draw = ImageDraw.Draw(image)

    def polygon(self, points: Iterable[Point], color: Color) -> None:
        self._draw.polygon(_pixels(points), fill=color)

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: Color) -> None:
        """Draws an ellipse around (x, y)."""
        self._draw.ellipse(_pixels([(x - rx, y - ry), (x + rx, y + ry)]), fill=color)

    def dome(self, x: float, y: float, rx: float, ry: float, color: Color) -> None:
        """Draws the upper half of an ellipse around (x, y)."""
        self._draw.pieslice(_pixels([(x - rx, y - ry), (x + rx, y + ry)]), 180, 360, fill=color)

    def rectangle(
        self, x0: float, y0: float, x1: float, y1: float, color: Color, radius: float = 0
    ) -> None:
        self._draw.rounded_rectangle(_pixels([(x0, y0), (x1, y1)]), radius * UNIT_PX, fill=color)

    def line(self, points: Sequence[Point], color: Color, width: float) -> None:
        """Draws a line with round ends and joints."""
        self._draw.line(_pixels(points), fill=color, width=round(width * UNIT_PX))
        for x, y in points:
            self.ellipse(x, y, width / 2, width / 2, color)


def _pixels(points: Iterable[Point]) -> list[Point]:
    return [(MARGIN_PX + x * UNIT_PX, MARGIN_PX + y * UNIT_PX) for x, y in points]


def _around(count: int, *radii: float) -> list[Point]:
    """Returns `count` corners around the center, clockwise from the top.

    Their distances from the center cycle through `radii`.
    """
    corners = []
    for k in range(count):
        angle = math.radians(-90 + 360 / count * k)
        radius = radii[k % len(radii)]
        corners.append((50 + radius * math.cos(angle), 50 + radius * math.sin(angle)))
    return corners


def _arc(x: float, rx: float, ry: float, degrees: range) -> list[Point]:
    """Returns points of an ellipse around (x, 50) at the angles `degrees`."""
    angles = [math.radians(angle) for angle in degrees]
    return [(x + rx * math.cos(angle), 50 + ry * math.sin(angle)) for angle in angles]


def _sun(pen: Pen) -> None:
    pen.polygon(_around(24, 44, 29), (255, 193, 37))
    pen.ellipse(50, 50, 27, 27, (255, 128, 20))


def _moon(pen: Pen) -> None:
    outer = _arc(52, 42, 42, range(-60, -301, -4))
    inner = _arc(73, -36, 36, range(88, -89, -4))
    pen.polygon(outer + inner, (122, 128, 214))
    for x, y, r in ((24, 42, 5), (31, 64, 6), (34, 27, 3.5)):
        pen.ellipse(x, y, r, r, (92, 96, 184))


def _star(pen: Pen) -> None:
    pen.polygon(_around(10, 44, 19), (255, 222, 50))


def _heart(pen: Pen) -> None:
    curve = []
    for degrees in range(0, 360, 4):
        t = math.radians(degrees)
        height = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        curve.append((50 + 42 * math.sin(t) ** 3, 47 - 2.6 * height))
    pen.polygon(curve, (226, 28, 60))
    pen.ellipse(31, 30, 8, 6, (255, 150, 165))


def _tree(pen: Pen) -> None:
    pen.rectangle(42, 60, 58, 94, (130, 84, 46))
    for x, y, r in ((30, 48, 22), (70, 48, 22), (50, 28, 24), (50, 52, 22)):
        pen.ellipse(x, y, r, r, (44, 150, 66))
    for x, y, r in ((44, 24, 8), (28, 44, 7), (62, 42, 8)):
        pen.ellipse(x, y, r, r, (98, 190, 92))


def _house(pen: Pen) -> None:
    pen.rectangle(66, 12, 76, 40, (150, 90, 70))
    pen.rectangle(16, 44, 84, 92, (247, 222, 170))
    pen.polygon([(6, 48), (50, 8), (94, 48)], (178, 58, 40))
    pen.rectangle(56, 60, 74, 92, (120, 72, 44))
    pen.rectangle(26, 58, 46, 76, (110, 190, 235))


def _car(pen: Pen) -> None:
    pen.polygon([(22, 52), (34, 22), (68, 22), (82, 52)], (30, 100, 220))
    pen.rectangle(6, 46, 94, 74, (30, 100, 220), radius=9)
    pen.polygon([(31, 47), (38, 29), (48, 29), (48, 47)], (205, 235, 255))
    pen.polygon([(54, 47), (54, 29), (64, 29), (73, 47)], (205, 235, 255))
    pen.rectangle(86, 54, 94, 61, (255, 225, 90))
    for x in (27, 73):
        pen.ellipse(x, 73, 13, 13, OUTLINE)
        pen.ellipse(x, 73, 6, 6, (200, 200, 210))


def _boat(pen: Pen) -> None:
    pen.rectangle(47, 6, 52, 66, (120, 80, 50))
    pen.polygon([(55, 10), (55, 58), (92, 58)], (255, 120, 60))
    pen.polygon([(44, 18), (44, 58), (14, 58)], (255, 250, 240))
    pen.polygon([(6, 66), (94, 66), (80, 92), (20, 92)], (110, 60, 35))
    pen.polygon([(6, 66), (94, 66), (91, 72), (9, 72)], (235, 200, 150))


def _fish(pen: Pen) -> None:
    pen.polygon([(66, 50), (95, 20), (90, 50), (95, 80)], (0, 140, 150))
    pen.polygon([(30, 30), (52, 8), (66, 34)], (0, 140, 150))
    pen.polygon([(38, 70), (54, 90), (62, 68)], (0, 140, 150))
    pen.ellipse(42, 50, 36, 26, (40, 205, 205))
    pen.polygon([(42, 26), (50, 25), (50, 75), (42, 74)], (235, 255, 250))
    pen.polygon([(58, 28), (65, 31), (65, 69), (58, 72)], (235, 255, 250))
    pen.ellipse(23, 43, 6.5, 6.5, (255, 255, 255))
    pen.ellipse(22, 43, 3.5, 3.5, OUTLINE)


def _flower(pen: Pen) -> None:
    pen.line([(50, 50), (50, 93)], (60, 160, 60), 6)
    pen.ellipse(68, 80, 17, 8, (60, 160, 60))
    pen.ellipse(32, 80, 17, 8, (60, 160, 60))
    for k in range(6):
        angle = math.radians(60 * k + 30)
        pen.ellipse(50 + 21 * math.cos(angle), 36 + 21 * math.sin(angle), 14, 14, (255, 110, 190))
    pen.ellipse(50, 36, 12, 12, (255, 214, 60))


def _cup(pen: Pen) -> None:
    pen.ellipse(74, 60, 19, 18, (140, 70, 190))
    pen.ellipse(74, 60, 10, 10, (225, 205, 240))
    pen.polygon([(10, 36), (76, 36), (68, 92), (18, 92)], (140, 70, 190))
    pen.ellipse(43, 36, 33, 8, (185, 130, 225))
    pen.ellipse(43, 37, 26, 5, (92, 52, 30))
    for x in (30, 52):
        pen.line([(x, 24), (x + 5, 17), (x, 10)], (168, 172, 185), 4.5)


def _apple(pen: Pen) -> None:
    pen.line([(50, 34), (54, 10)], (110, 70, 40), 6)
    pen.polygon([(56, 22), (66, 8), (86, 8), (76, 22)], (30, 120, 50))
    for x in (35, 65):
        pen.ellipse(x, 56, 27, 30, (150, 215, 40))
    pen.ellipse(42, 72, 16, 20, (150, 215, 40))
    pen.ellipse(58, 72, 16, 20, (150, 215, 40))
    pen.ellipse(26, 46, 7, 10, (222, 245, 150))


def _key(pen: Pen) -> None:
    brass = (186, 140, 30)
    pen.line([(38, 38), (90, 90)], brass, 10)
    pen.line([(72, 72), (84, 60)], brass, 9)
    pen.line([(86, 86), (96, 76)], brass, 9)
    pen.ellipse(28, 28, 24, 24, brass)
    pen.ellipse(26, 26, 11, 11, (245, 240, 228))


def _umbrella(pen: Pen) -> None:
    pen.line([(50, 8), (50, 84), (56, 91), (64, 91), (69, 84)], (92, 60, 40), 5)
    pen.dome(50, 54, 44, 42, (215, 40, 60))
    pen.dome(50, 54, 28, 42, (255, 245, 235))
    pen.dome(50, 54, 11, 42, (215, 40, 60))


def _mushroom(pen: Pen) -> None:
    pen.polygon([(38, 50), (62, 50), (70, 92), (30, 92)], (250, 236, 205))
    pen.dome(50, 58, 44, 50, (205, 45, 35))
    for x, y, r in ((50, 22, 7), (28, 42, 7.5), (70, 38, 8), (49, 46, 5)):
        pen.ellipse(x, y, r, r, (255, 255, 255))


def _clock(pen: Pen) -> None:
    pen.ellipse(50, 50, 44, 44, (30, 60, 120))
    pen.ellipse(50, 50, 34, 34, (255, 255, 255))
    for x, y in _around(12, 29):
        pen.ellipse(x, y, 2.2, 2.2, OUTLINE)
    pen.line([(50, 26), (50, 50), (66, 58)], OUTLINE, 5)


def _bell(pen: Pen) -> None:
    pen.ellipse(50, 84, 10, 10, (150, 95, 20))
    pen.ellipse(50, 12, 7, 7, (235, 165, 30))
    pen.dome(50, 46, 28, 36, (235, 165, 30))
    pen.polygon([(22, 45), (78, 45), (84, 70), (94, 82), (6, 82), (16, 70)], (235, 165, 30))
    pen.line([(36, 40), (32, 66)], (255, 225, 140), 6)


def _cactus(pen: Pen) -> None:
    green = (60, 150, 90)
    pen.line([(20, 34), (20, 48), (50, 52)], green, 12)
    pen.line([(80, 26), (80, 42), (50, 46)], green, 12)
    pen.rectangle(38, 8, 62, 74, green, radius=12)
    pen.polygon([(24, 70), (76, 70), (68, 94), (32, 94)], (214, 110, 60))
    for x, y in ((46, 22), (54, 34), (46, 58), (54, 64)):
        pen.ellipse(x, y, 2, 2, (225, 245, 215))


def _rocket(pen: Pen) -> None:
    pen.polygon([(38, 74), (50, 96), (62, 74)], (255, 150, 30))
    pen.polygon([(34, 48), (12, 80), (36, 74)], (210, 45, 55))
    pen.polygon([(66, 48), (88, 80), (64, 74)], (210, 45, 55))
    pen.ellipse(50, 44, 20, 40, (225, 230, 238))
    pen.rectangle(33, 62, 67, 76, (225, 230, 238))
    pen.polygon([(35, 22), (50, 2), (65, 22)], (210, 45, 55))
    pen.ellipse(50, 42, 9, 9, (50, 140, 220))


def _snowman(pen: Pen) -> None:
    pen.line([(28, 62), (8, 46)], (110, 70, 45), 4)
    pen.line([(72, 62), (92, 46)], (110, 70, 45), 4)
    pen.ellipse(50, 72, 28, 23, (255, 255, 255))
    pen.ellipse(50, 36, 19, 18, (255, 255, 255))
    pen.rectangle(36, 4, 64, 20, (50, 50, 70))
    pen.rectangle(28, 18, 72, 24, (50, 50, 70))
    pen.rectangle(33, 47, 67, 54, (60, 170, 90), radius=3)
    for x in (43, 57):
        pen.ellipse(x, 33, 2.6, 2.6, OUTLINE)
    pen.polygon([(49, 37), (49, 43), (66, 42)], (255, 130, 30))


_DRAWINGS: dict[str, Callable[[Pen], None]] = {
    "sun": _sun,
    "moon": _moon,
    "star": _star,
    "heart": _heart,
    "tree": _tree,
    "house": _house,
    "car": _car,
    "boat": _boat,
    "fish": _fish,
    "flower": _flower,
    "cup": _cup,
    "apple": _apple,
    "key": _key,
    "umbrella": _umbrella,
    "mushroom": _mushroom,
    "clock": _clock,
}
# Classes without training data in the demo. They demonstrate adding classes to a trained model.
_NEW_DRAWINGS: dict[str, Callable[[Pen], None]] = {
    "bell": _bell,
    "cactus": _cactus,
    "rocket": _rocket,
    "snowman": _snowman,
}
_ALL_DRAWINGS = _DRAWINGS | _NEW_DRAWINGS
CLASSES = tuple(_DRAWINGS)
NEW_CLASSES = tuple(_NEW_DRAWINGS)
