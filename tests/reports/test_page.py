"""The look of the reports: colors of both schemes, and tables on narrow screens."""

import re
from itertools import product

import pytest
from PIL import ImageColor

from qwenvl_lit.reports.page import STYLE, table

COLORS = {}  # the light and the dark value of each variable of STYLE
for name, light, dark in re.findall(r"--([\w-]+): light-dark\((#\w+), (#\w+)\)", STYLE):
    COLORS[name] = light, dark
ON = {"ink": "paper", "faint": "paper", "good": "paper", "bad": "paper", "predicted": "paper"}
ON["on-marked"] = "marked"


def luminance(color: str) -> float:
    """The relative luminance of the WCAG."""
    total = 0.0
    for value, weight in zip(ImageColor.getrgb(color), (0.2126, 0.7152, 0.0722), strict=True):
        share = value / 255
        linear = share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4
        total += weight * linear
    return total


@pytest.mark.parametrize(("scheme", "text"), [*product((0, 1), ON)])
def test_text_is_readable_in_the_light_and_in_the_dark(scheme, text):
    lights = sorted(luminance(COLORS[name][scheme]) for name in (text, ON[text]))
    assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5  # the contrast that WCAG AA asks for


def test_every_color_has_two_schemes():
    assert re.search("color-scheme: light dark", STYLE)
    assert not re.search("#[0-9a-f]{3,6}", re.sub(r"light-dark\(.*?\)", "", STYLE))


def test_short_words_are_not_split_and_long_ones_are():
    path = "/data/a/long/path/of/a/file.jsonl"
    html = table(
        [{"metric": "grounded_caption", "first": path, "score": path}],
        text_columns=["metric", "first"],
    )
    assert '<td class="text">grounded_caption</td>' in html
    assert f'<td class="text long">{path}</td>' in html
    assert f"<td>{path}</td>" in html
