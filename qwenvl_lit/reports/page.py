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

LONG_WORD = 24  # characters; a longer word, such as a path, is split to fit its column
STYLE = """
:root { color-scheme: light dark;
  --paper: light-dark(#fff, #17191c); --ink: light-dark(#1c2430, #e7e9ec);
  --faint: light-dark(#5a6675, #a2acb8); --line: light-dark(#d5dae1, #363c44);
  --good: light-dark(#00695c, #5fd0bd); --bad: light-dark(#b3261e, #ff9d94);
  --predicted: light-dark(#d81b60, #ff80ab); --bar: light-dark(#3b6ea8, #7fb2ea);
  --marked: light-dark(#c8efdd, #14503a); --on-marked: light-dark(#064e3b, #d3f7e6) }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1100px; margin: 2rem auto; padding: 0 1rem }
h1, h2, h3, p { overflow-wrap: anywhere }
h1 { font-size: 1.6rem; margin-bottom: .2rem }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th { color: var(--faint); font-weight: 600 }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line);
  text-align: right; vertical-align: top; white-space: nowrap }
.text { text-align: left; white-space: normal }
.long { overflow-wrap: anywhere; min-width: 12rem }
.wide { overflow-x: auto }
.good { color: var(--good) } .bad { color: var(--bad) } .faint { color: var(--faint) }
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem }
figure { margin: 0; max-width: 100% }
figcaption { color: var(--faint); max-width: 340px; overflow-wrap: anywhere }
svg { max-width: 100%; height: auto }
svg text { font: 11px system-ui, sans-serif; fill: var(--faint) } svg rect { fill: var(--bar) }
.example { border: 1px solid var(--line); border-radius: 6px; padding: .8rem; margin: 1rem 0;
  display: flex; flex-wrap: wrap; gap: 1rem }
.example header { flex-basis: 100%; overflow-wrap: anywhere }
.example .images { display: flex; flex-direction: column; gap: .5rem;
  max-width: min(340px, 100%) }
.example img { max-width: 100%; max-height: 480px; align-self: start;
  outline: 1px solid var(--line) }
.example .words { flex: 1 1 20rem; min-width: 0 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace;
  margin: 0; color: var(--faint); max-height: 30rem; overflow: auto }
.supervised { color: var(--on-marked); background: var(--marked); border-radius: 2px }
.answers { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: .8rem }
.answers > div { flex: 1 1 10rem; min-width: 0 }
.answers h3 { margin: 0 } .answers pre { color: var(--ink) }
.labels { margin: 0; max-width: 340px; font-size: 13px; overflow-wrap: anywhere }
.predicted { color: var(--predicted) } .expected { color: var(--good) }
@media (max-width: 30rem) {
  th, td { padding-inline: .4rem }
  .example .words { flex-basis: 100% }
}
@media print {
  body { margin: 0; max-width: none }
  .example, figure, tr { break-inside: avoid } h2, h3 { break-after: avoid }
  .wide { overflow: visible } pre { max-height: none }
  .supervised, svg rect { print-color-adjust: exact }
}
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
        style = ""
        if name in text_columns:
            style = ' class="text"'
            if any(len(word) > LONG_WORD for word in content.split()):
                style = ' class="text long"'
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
    size = f'width="{width}" height="{height + 32}" viewBox="0 0 {width} {height + 32}"'
    return (
        f"<figure><svg {size}>{bars}"
        f'<text x="0" y="10">{highest:,} {unit}</text>'
        f'<text x="0" y="{height + 28}">{text(start)}</text>'
        f'<text x="{width}" y="{height + 28}" text-anchor="end">{text(end)}</text></svg>'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )
