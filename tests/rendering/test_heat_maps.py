import numpy as np
import pytest
from PIL import Image

from qwenvl_lit.rendering.heat_maps import GAP_PX, LEAST_WIDTH_PX, draw_heat_maps


def one_cell(row: int, column: int, side: int = 4) -> np.ndarray:
    values = np.zeros((side, side), dtype=np.float32)
    values[row, column] = 0.01  # the scale of a map is its own
    return values


@pytest.mark.parametrize(
    ("size", "panel"), [((800, 800), (224, 224)), ((40, 10), (448, 112)), ((9, 900), (5, 480))]
)
def test_panels_have_about_the_same_area_and_their_map_in_place(size, panel):
    image = Image.new("RGB", size, (0, 90, 0))
    drawing = draw_heat_maps(image, np.stack([one_cell(3, 3), one_cell(0, 0)]), ["dog", "cat"])
    width = max(panel[0], LEAST_WIDTH_PX)
    columns = 1 if size == (40, 10) else 2
    assert drawing.width == columns * (width + GAP_PX) + GAP_PX
    title = (drawing.height - GAP_PX) // (2 // columns) - GAP_PX - panel[1]
    assert 20 < title < 40
    left, top = GAP_PX, GAP_PX + title
    corners = [
        drawing.getpixel((left + round(x * panel[0]), top + round(y * panel[1])))
        for x, y in ((0.9, 0.9), (0.1, 0.1))
    ]
    assert corners[0][0] > corners[0][2] + 60, "red where the map is largest"
    assert len(set(corners[1])) == 1, "gray where it is 0"
    assert corners[1][0] > 64, "lighter than the image"
    assert drawing.getpixel((1, 1)) == (255, 255, 255)


def test_titles_are_cut_blanks_have_names_and_maps_of_zeros_are_drawn():
    image = Image.new("L", (30, 30))
    long, cut = "x" * 200, "x" * 300
    maps = np.zeros((2, 2, 2))
    assert draw_heat_maps(image, maps, [long, " "]).tobytes() == (
        draw_heat_maps(image, maps, [cut, "\t"]).tobytes()
    )
    named = draw_heat_maps(image, maps[:1], ["\n"])
    assert named.tobytes() == draw_heat_maps(image, maps[:1], ["(line end)"]).tobytes()
    for titles, count in (([], 0), (["a"], 2)):
        with pytest.raises(ValueError, match="expected a title for each of at least one map"):
            draw_heat_maps(image, maps[:count], titles)
