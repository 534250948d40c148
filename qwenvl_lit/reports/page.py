"""What HTML pages share: one file each, without server, network or script. Whatever comes from the data is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from PIL import Image

from qwenvl_lit.reports.data import printable

IMAGE_SIDE_PX = 480

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2430; background: #fff; max-width: 1100px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #d5dae1 }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } th { color: #5a6675; font-weight: 600 }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e4e8ed; text-align: right; vertical-align: top }
td.text, th.text { text-align: left; overflow-wrap: anywhere; min-width: 5rem }
.good { color: #00695c } .bad { color: #b3261e } .faint { color: #5a6675 }
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem } figure { margin: 0 } figcaption { color: #5a6675 }
svg text { font: 11px system-ui, sans-serif; fill: #5a6675 } svg rect { fill: #3b6ea8 }
.example { border: 1px solid #d5dae1; border-radius: 6px; padding: .8rem; margin: 1rem 0; display: flex; flex-wrap: wrap; gap: 1rem }
.example header { flex-basis: 100%; overflow-wrap: anywhere } .example .images { display: flex; flex-direction: column; gap: .5rem }
.example img { max-width: 100%; width: 340px; height: auto } .example .words { flex: 1 1 20rem; min-width: 0 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace; margin: 0; color: #5a6675;
  max-height: 30rem; overflow: auto }
.learned { color: #064e3b; background: #c8efdd; border-radius: 2px }
.answers { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: .8rem } .answers > div { flex: 1 1 10rem; min-width: 0 }
.answers h3 { margin: 0 } .answers pre { color: #1c2430 } .wide { overflow-x: auto }
.predicted { color: #d81b60 } .expected { color: #00695c }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page around `parts`, which are HTML."""
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{text(title)}</title><style>{STYLE}</style></head><body>
{body}
</body></html>
"""


def table(rows: Sequence[Mapping[str, str]], *, left: Iterable[str]) -> str:
    """Rows that all have the columns of the first; `left` names those of text, the others are numbers."""

    def cells(tag: str, values: Iterable[tuple[str, str]]) -> str:
        return "".join(
            f"<{tag}{' class=text' if name in left else ''}>{text(value)}</{tag}>"
            for name, value in values
        )

    head = cells("th", ((name, name) for name in rows[0]))
    return (
        f'<div class="wide"><table><tr>{head}</tr>'
        + "".join(f"<tr>{cells('td', row.items())}</tr>" for row in rows)
        + "</table></div>"
    )


def text(words: str) -> str:
    """Text of the data for the page; line breaks stay, other control characters and lone surrogates are written out."""
    return escape("\n".join(map(printable, words.split("\n"))))


def embedded_image(image: Image.Image) -> str:
    """The image itself, as part of the page."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return (
        f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}">'
    )


def bars(
    counts: Sequence[tuple[str, int]],
    *,
    ends: tuple[str, str],
    what: str,
    caption: str,
    width: int = 340,
    height: int = 150,
) -> str:
    """A histogram: for each interval what is said where the mouse rests, and how many; `ends` of the axis, `what` is counted."""
    most, step = max(1, *(count for _, count in counts)), width / len(counts)
    drawn = "".join(
        f'<rect x="{place * step:.1f}" width="{max(1, step - 1):.1f}" y="{15 + height * (1 - count / most):.1f}" '
        f'height="{height * count / most:.1f}"><title>{text(said)}: {count:,} {what}</title></rect>'
        for place, (said, count) in enumerate(counts)
    )
    return (
        f'<figure><svg width="{width}" height="{height + 32}">{drawn}'
        f'<text x="0" y="10">{most:,} {what}</text>'
        f'<text x="0" y="{height + 28}">{text(ends[0])}</text>'
        f'<text x="{width}" y="{height + 28}" text-anchor="end">{text(ends[1])}</text></svg>'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )
