"""Builds HTML pages that are a single file and need no server, network access or scripts.

Text from the data must be escaped with `text`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape

from PIL import Image

from qwenvl_lit.terminal import printable

IMAGE_SIDE_PX = 480

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2430; background: #fff;
  max-width: 1100px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #d5dae1 }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th { color: #5a6675; font-weight: 600 }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e4e8ed;
  text-align: right; vertical-align: top }
td.text, th.text { text-align: left; overflow-wrap: anywhere; min-width: 5rem }
.wide { overflow-x: auto }
.good { color: #00695c } .bad { color: #b3261e } .faint { color: #5a6675 }
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem }
figure { margin: 0 } figcaption { color: #5a6675 }
svg text { font: 11px system-ui, sans-serif; fill: #5a6675 } svg rect { fill: #3b6ea8 }
.example { border: 1px solid #d5dae1; border-radius: 6px; padding: .8rem; margin: 1rem 0;
  display: flex; flex-wrap: wrap; gap: 1rem }
.example header { flex-basis: 100%; overflow-wrap: anywhere }
.example .images { display: flex; flex-direction: column; gap: .5rem }
.example img { max-width: 100%; width: 340px; height: auto }
.example .words { flex: 1 1 20rem; min-width: 0 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace;
  margin: 0; color: #5a6675; max-height: 30rem; overflow: auto }
.supervised { color: #064e3b; background: #c8efdd; border-radius: 2px }
.answers { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: .8rem }
.answers > div { flex: 1 1 10rem; min-width: 0 }
.answers h3 { margin: 0 } .answers pre { color: #1c2430 }
.labels { margin: 0; max-width: 340px; font-size: 13px; overflow-wrap: anywhere }
.predicted { color: #d81b60 } .expected { color: #00695c }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, parts: Iterable[str]) -> str:
    """Returns a complete HTML page, whose body consists of the HTML in `parts`."""
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{text(title)}</title><style>{STYLE}</style></head><body>
{body}
</body></html>
"""


def text(content: str) -> str:
    """Returns text from the data as HTML.

    Line breaks are preserved. Other control characters and lone surrogates become escape sequences.
    """
    return escape("\n".join(map(printable, content.split("\n"))))


def paragraph(html: str, style: str = "") -> str:
    """Returns a paragraph. `style` is a class of `STYLE`."""
    return f'<p class="{style}">{html}</p>' if style else f"<p>{html}</p>"


def table(rows: Sequence[Mapping[str, str]], *, text_columns: Collection[str]) -> str:
    """Returns a table of rows that all have the same columns.

    Args:
        text_columns: names of left-aligned columns. The other columns are numbers, right-aligned.
    """
    html = '<div class="wide"><table>'
    names = list(rows[0])
    html += _table_row("th", dict(zip(names, names, strict=True)), text_columns)
    for row in rows:
        html += _table_row("td", row, text_columns)
    return html + "</table></div>"


def _table_row(tag: str, cells: Mapping[str, str], text_columns: Collection[str]) -> str:
    html = ""
    for name, content in cells.items():
        style = " class=text" if name in text_columns else ""
        html += f"<{tag}{style}>{text(content)}</{tag}>"
    return f"<tr>{html}</tr>"


def example(header: str, images: str, words: str) -> str:
    """Returns a frame with `header` above `images` and `words` side by side. All are HTML."""
    return (
        f'<section class="example"><header>{header}</header>'
        f'<div class="images">{images}</div><div class="words">{words}</div></section>'
    )


def labels(names: Sequence[str], style: str = "") -> str:
    """Returns the labels that are drawn in an image as text, which needs no font to draw it with.

    The result is empty if there are none.
    """
    if not names:
        return ""
    return paragraph(text(", ".join(dict.fromkeys(names))), f"labels {style}".rstrip())


def embedded_image(image: Image.Image) -> str:
    """Returns an `<img>` element that contains the image as JPEG data."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{data}">'


def histogram_figure(
    counts: Sequence[tuple[str, int]],
    *,
    ends: tuple[str, str],
    unit: str,
    caption: str,
    width: int = 340,
    height: int = 150,
) -> str:
    """Returns a histogram as SVG.

    Args:
        counts: the name and the count of each interval. The name is shown as a tooltip.
        ends: the labels of the two ends of the axis.
        unit: the noun for the counted objects, such as "rows".
    """
    highest = max(1, *(count for _, count in counts))
    step = width / len(counts)
    bars = ""
    for index, (name, count) in enumerate(counts):
        bar_height = height * count / highest
        bar_top = 15 + height * (1 - count / highest)
        bars += (
            f'<rect x="{index * step:.1f}" width="{max(1, step - 1):.1f}" '
            f'y="{bar_top:.1f}" height="{bar_height:.1f}">'
            f"<title>{text(name)}: {count:,} {unit}</title></rect>"
        )
    start, end = ends
    return (
        f'<figure><svg width="{width}" height="{height + 32}">{bars}'
        f'<text x="0" y="10">{highest:,} {unit}</text>'
        f'<text x="0" y="{height + 28}">{text(start)}</text>'
        f'<text x="{width}" y="{height + 28}" text-anchor="end">{text(end)}</text></svg>'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )
