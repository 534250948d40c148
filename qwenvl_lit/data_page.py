"""An inspected dataset as one HTML page that needs no server, no network and no script. Whatever comes from the data is escaped."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from qwenvl_lit.callbacks.drawing import draw_objects, objects_of_picture
from qwenvl_lit.chatml import runs
from qwenvl_lit.data.inspection import Inspection, SetFacts
from qwenvl_lit.data_report import HEADINGS, error_count, histogram, overlap_lines, printable, reasons, set_facts
from qwenvl_lit.families.protocols import Processor
from qwenvl_lit.types import Conversation

SHOWN_ERRORS = 200
PICTURE_SIDE_PX = 480

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
.example header { flex-basis: 100%; overflow-wrap: anywhere } .example .pictures { display: flex; flex-direction: column; gap: .5rem }
.example img { max-width: 100%; width: 340px; height: auto } .example .words { flex: 1 1 20rem; min-width: 0 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace; margin: 0; color: #5a6675;
  max-height: 30rem; overflow: auto }
.learned { color: #064e3b; background: #c8efdd; border-radius: 2px }
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A row as the model gets it."""

    set: str
    conversation: Conversation
    runs: tuple[tuple[str, bool], ...]  # text, and whether it is learned
    tokens: int
    expected: str | None  # of a prompt: the answer it is compared with, in the model's markup
    pictures: tuple[Image.Image, ...]  # boxes drawn


def examples(
    inspection: Inspection, sets: Mapping[str, Sequence[Conversation]], processor: Processor, *, count: int = 10, seed: int = 0
) -> list[Example]:
    """Usable rows drawn at random, an equal share from each set as far as its rows go."""
    shares = {facts.name: 0 for facts in inspection.sets}
    while sum(shares.values()) < count:
        open_sets = [facts.name for facts in inspection.sets if shares[facts.name] < len(facts.usable)]
        if not open_sets:
            break
        for name in open_sets[: count - sum(shares.values())]:
            shares[name] += 1
    chosen = random.Random(seed)
    return [
        _example(facts, sets[facts.name][int(index)], processor)
        for facts in inspection.sets
        for index in sorted(chosen.sample(facts.usable.tolist(), shares[facts.name]))
    ]


def _example(facts: SetFacts, conversation: Conversation, processor: Processor) -> Example:
    sample = processor.encode(conversation, prompt=facts.prompts)
    ids, labels = sample.input_ids.tolist(), sample.labels.tolist()
    parts = [part for turn in conversation.turns for part in turn.parts]
    images = [picture.open() for picture in conversation.pictures]
    drawn = [
        draw_objects(image, objects_of_picture(parts, number, image.size), largest_side_px=PICTURE_SIDE_PX)
        for number, image in enumerate(images)
    ]
    return Example(
        set=facts.name,
        conversation=conversation,
        runs=tuple(runs(ids, labels, processor.text)),
        tokens=len(ids),
        expected=processor.decode((), conversation).reference if facts.prompts else None,
        pictures=tuple(drawn),
    )


def write_page(inspection: Inspection, shown: Sequence[Example], file: Path, *, title: str) -> None:
    """The page: verdict, sets, files, lengths, what was found, and `shown`."""
    body = "\n".join(_body(inspection, shown, title))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{_text(title)}</title><style>{STYLE}</style></head><body>
{body}
</body></html>
"""
    file.write_text(page, encoding="utf-8")


def _body(inspection: Inspection, shown: Sequence[Example], title: str) -> Iterator[str]:
    errors = inspection.errors
    verdict = (
        f'<b class="bad">{error_count(inspection)}</b>: this data cannot be used as it is.' if errors else '<b class="good">No errors.</b>'
    )
    yield f"<h1>{_text(title)}</h1><p>{verdict} Every finding, one by one, is in <code>findings.jsonl</code> beside this page.</p>"
    yield "<h2>Sets</h2>" + _sets(inspection)
    files = [
        {"set": facts.name, "file": str(file.path), "layout": file.layout, "rows of the file": f"{file.rows:,}"}
        for facts in inspection.sets
        for file in facts.files
    ]
    if files:
        yield "<h2>Files</h2>" + _table(files, text=("set", "file", "layout"))
    yield '<h2>Tokens of a row</h2><div class="plots">' + "".join(map(_plot, inspection.sets)) + "</div>"
    if lines := overlap_lines(inspection):
        yield "<h2>In two sets</h2>" + "".join(f"<p>{_text(line)}</p>" for line in lines)
    for kind in ("error", "dropped", "note"):
        if found := reasons(inspection, kind):
            rows = [{"times": f"{count:,}", "what": why} for why, count in found]
            yield f"<h2>{HEADINGS[kind]}</h2>" + _table(rows, text=("what",))
    if errors:
        more = f", the first {SHOWN_ERRORS}" if len(errors) > SHOWN_ERRORS else ""
        yield f"<h3>One by one{more}</h3>"
        yield _table([{"set": name, "error": finding.message} for name, finding in errors[:SHOWN_ERRORS]], text=("set", "error"))
    if shown:
        yield f"<h2>{len(shown)} rows as the model gets them</h2>"
        yield '<p>What is <span class="learned">learned</span> is marked; boxes of question and answer are drawn into the pictures.</p>'
        yield from map(_shown, shown)


def _sets(inspection: Inspection) -> str:
    columns = {facts.name: set_facts(facts) for facts in inspection.sets}
    names = next(iter(columns.values()))
    return _table([{"": name, **{of: values[name] for of, values in columns.items()}} for name in names], text=("",))


def _shown(example: Example) -> str:
    pictures = "".join(f'<img alt="" src="data:image/jpeg;base64,{_jpeg(image)}">' for image in example.pictures)
    words = "".join(f'<span class="learned">{_text(text)}</span>' if learned else _text(text) for text, learned in example.runs)
    expected = f'<h3>Expected</h3><pre><span class="learned">{_text(example.expected)}</span></pre>' if example.expected else ""
    where = f"{example.conversation.where} " if example.conversation.where else ""
    return (
        f'<section class="example"><header><b>{_text(example.set)}</b> {_text(example.conversation.id)} '
        f'<span class="faint">{_text(where)}({example.tokens:,} tokens)</span></header>'
        f'<div class="pictures">{pictures}</div><div class="words"><pre>{words}</pre>{expected}</div></section>'
    )


def _plot(facts: SetFacts, width: int = 340, height: int = 150) -> str:
    intervals = histogram(facts.lengths, bins=40)
    if not intervals:
        return f"<figure><p>nothing usable</p><figcaption>{_text(facts.name)}</figcaption></figure>"
    most, step = max(count for *_, count in intervals), width / len(intervals)
    bars = "".join(
        f'<rect x="{place * step:.1f}" width="{max(1, step - 1):.1f}" y="{15 + height * (1 - count / most):.1f}" '
        f'height="{height * count / most:.1f}"><title>{first:,} to {last:,} tokens: {count:,} rows</title></rect>'
        for place, (first, last, count) in enumerate(intervals)
    )
    return (
        f'<figure><svg width="{width}" height="{height + 32}">{bars}'
        f'<text x="0" y="10">{most:,} rows</text>'
        f'<text x="0" y="{height + 28}">{intervals[0][0]:,}</text>'
        f'<text x="{width}" y="{height + 28}" text-anchor="end">{intervals[-1][1]:,} tokens</text></svg>'
        f"<figcaption>{_text(facts.name)}</figcaption></figure>"
    )


def _table(rows: Sequence[Mapping[str, str]], *, text: Iterable[str]) -> str:
    def cells(tag: str, values: Iterable[tuple[str, str]]) -> str:
        return "".join(f"<{tag}{' class=text' if name in text else ''}>{_text(value)}</{tag}>" for name, value in values)

    head = cells("th", ((name, name) for name in rows[0]))
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{cells('td', row.items())}</tr>" for row in rows) + "</table>"


def _text(text: str) -> str:
    """Text of the data for the page; line breaks stay, other control characters and lone surrogates are written out."""
    return escape("\n".join(map(printable, text.split("\n"))))


def _jpeg(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return base64.b64encode(stream.getvalue()).decode()
