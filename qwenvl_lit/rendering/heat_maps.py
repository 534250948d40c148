"""Draws maps over an image, such as attention, as a grid of titled heat maps."""

# n maps, h x w cells

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont

from qwenvl_lit.rendering.fonts import font_for, missing_characters

COLORS = colormaps["YlOrRd"]
STRONGEST = 0.8  # opacity of the largest value
PANEL_PX = 224  # side of a square image in the grid
LONGEST_PX = 480  # longer side of any image
LEAST_WIDTH_PX = 110  # of a panel, for its title
GAP_PX = 14
TITLE_PX = 17
BACKGROUND, INK, EDGE = "white", "#222222", "#cccccc"
WIDE = 1.5  # width of the grid over its height, about


def draw_heat_maps(image: Image.Image, maps: np.ndarray, titles: Sequence[str]) -> Image.Image:
    """Returns the image once for each map, with the map over it and its title above.

    All images are about equally large, whatever their proportions. Colors run from yellow to red,
    and values close to 0 are transparent. Each map has a scale of its own, from 0 to its largest
    value.

    Args:
        maps: (n, h, w), from 0. Each map covers the whole image.
        titles: of each map, such as the text of a token. Long ones are cut at their end, and blanks
            have names. A title that no font can write is the index of its map.

    Raises:
        ValueError: there is no map, or titles and maps differ in number.
    """
    if not len(maps) or len(maps) != len(titles):
        raise ValueError(f"expected a title for each of at least one map, got {len(titles)} titles")
    size = _panel_size(image.size)
    base = _lightened(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    panel_width = max(size[0], LEAST_WIDTH_PX)
    titles = [_legible(title, number) for number, title in enumerate(titles)]
    fonts = [font_for(title, TITLE_PX) for title in titles]
    title_height = max(sum(font.getmetrics()) for font in fonts) + 4
    cell = panel_width + GAP_PX, size[1] + title_height + GAP_PX
    columns = min(len(maps), max(1, round(math.sqrt(len(maps) * WIDE * cell[1] / cell[0]))))
    rows = math.ceil(len(maps) / columns)
    columns = math.ceil(len(maps) / rows)  # without an almost empty last row
    canvas = Image.new(
        "RGB", (columns * cell[0] + GAP_PX, rows * cell[1] + GAP_PX), color=BACKGROUND
    )
    draw = ImageDraw.Draw(canvas)
    for index, (values, title) in enumerate(zip(maps, titles, strict=True)):
        row, column = divmod(index, columns)
        left, top = GAP_PX + column * cell[0], GAP_PX + row * cell[1]
        shown = _cut(draw, title, fonts[index], panel_width)
        draw.text((left, top), shown, fill=INK, font=fonts[index])
        canvas.paste(_heated(base, values), (left, top + title_height))
        corner = left + size[0], top + title_height + size[1]
        draw.rectangle((left - 1, top + title_height - 1, *corner), outline=EDGE)
    return canvas


def _legible(text: str, number: int) -> str:
    """Returns a title that can be read; see `draw_heat_maps`.

    >>> _legible(" dog", 0), _legible(" ", 1), _legible("\\n\\n", 2)
    ('dog', '(space)', '(line end)')
    """
    if text.strip():
        return f"({number})" if missing_characters(text) else " ".join(text.split())
    if not text:
        return "(nothing)"
    return "(line end)" if "\n" in text else "(space)"


def _panel_size(size: tuple[int, int]) -> tuple[int, int]:
    """Returns the size of an image in the grid: the area of `PANEL_PX` squared, if it is not thin.

    >>> _panel_size((640, 640)), _panel_size((400, 100)), _panel_size((4000, 100))
    ((224, 224), (448, 112), (480, 12))
    """
    scale = min(PANEL_PX / math.sqrt(size[0] * size[1]), LONGEST_PX / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _lightened(image: Image.Image) -> Image.Image:
    """Returns the image in gray, lighter, so that the colors of a map are the only ones."""
    gray = image.convert("L").convert("RGB")
    return Image.blend(gray, Image.new("RGB", image.size, "white"), 0.25)


def _heated(base: Image.Image, values: np.ndarray) -> Image.Image:
    largest = values.max()
    scaled = values / largest if largest > 0 else np.zeros_like(values)
    cells = Image.fromarray(scaled.astype(np.float32))
    smooth = np.asarray(cells.resize(base.size, Image.Resampling.BILINEAR)).clip(0, 1)
    colors = COLORS(smooth)[:, :, :3] * 255
    opacity = STRONGEST * smooth[:, :, None]
    blended = np.asarray(base) * (1 - opacity) + colors * opacity
    return Image.fromarray(blended.round().astype(np.uint8))


def _cut(draw: ImageDraw.ImageDraw, title: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if draw.textlength(title, font=font) <= width:
        return title
    while title and draw.textlength(title + "...", font=font) > width:
        title = title[:-1]
    return title + "..."
