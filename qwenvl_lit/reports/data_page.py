"""An inspected dataset as one HTML page that needs no server, no network and no script. Whatever comes from the data is escaped."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from qwenvl_lit.data.inspection import Inspection, SetFacts
from qwenvl_lit.models.chatml import runs
from qwenvl_lit.models.protocols import Processor
from qwenvl_lit.rendering.drawing import draw_objects, objects_of_image
from qwenvl_lit.reports.data import (
    HEADINGS,
    error_count,
    histogram,
    overlap_lines,
    reasons,
    set_facts,
)
from qwenvl_lit.reports.page import IMAGE_SIDE_PX, bars, embedded_image, page, table, text
from qwenvl_lit.types import Conversation

SHOWN_ERRORS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A row as the model gets it."""

    set: str
    conversation: Conversation
    runs: tuple[tuple[str, bool], ...]  # text, and whether it is learned
    tokens: int
    expected: str | None  # of a prompt: the answer it is compared with, in the model's markup
    images: tuple[Image.Image, ...]  # boxes drawn


def examples(
    inspection: Inspection,
    sets: Mapping[str, Sequence[Conversation]],
    processor: Processor,
    *,
    count: int = 10,
    seed: int = 0,
) -> list[Example]:
    """Usable rows drawn at random, an equal share from each set as far as its rows go."""
    shares = {facts.name: 0 for facts in inspection.sets}
    while sum(shares.values()) < count:
        open_sets = [
            facts.name for facts in inspection.sets if shares[facts.name] < len(facts.usable)
        ]
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
    images = [image.open() for image in conversation.images]
    drawn = [
        draw_objects(
            image, objects_of_image(parts, number, image.size), largest_side_px=IMAGE_SIDE_PX
        )
        for number, image in enumerate(images)
    ]
    return Example(
        set=facts.name,
        conversation=conversation,
        runs=tuple(runs(ids, labels, processor.text)),
        tokens=len(ids),
        expected=processor.decode((), conversation).reference if facts.prompts else None,
        images=tuple(drawn),
    )


def write_page(inspection: Inspection, shown: Sequence[Example], file: Path, *, title: str) -> None:
    """The page: verdict, sets, files, lengths, what was found, and `shown`."""
    file.write_text(page(title, _body(inspection, shown, title)), encoding="utf-8")


def _body(inspection: Inspection, shown: Sequence[Example], title: str) -> Iterator[str]:
    errors = inspection.errors
    verdict = (
        f'<b class="bad">{error_count(inspection)}</b>: this data cannot be used as it is.'
        if errors
        else '<b class="good">No errors.</b>'
    )
    yield f"<h1>{text(title)}</h1><p>{verdict} Every finding, one by one, is in <code>findings.jsonl</code> beside this page.</p>"
    yield "<h2>Sets</h2>" + _sets(inspection)
    files = [
        {
            "set": facts.name,
            "file": str(file.path),
            "layout": file.layout,
            "rows of the file": f"{file.rows:,}",
        }
        for facts in inspection.sets
        for file in facts.files
    ]
    if files:
        yield "<h2>Files</h2>" + table(files, left=("set", "file", "layout"))
    yield (
        '<h2>Tokens of a row</h2><div class="plots">'
        + "".join(map(_plot, inspection.sets))
        + "</div>"
    )
    if lines := overlap_lines(inspection):
        yield "<h2>In two sets</h2>" + "".join(f"<p>{text(line)}</p>" for line in lines)
    for kind in ("error", "dropped", "note"):
        if found := reasons(inspection, kind):
            rows = [{"times": f"{count:,}", "what": why} for why, count in found]
            yield f"<h2>{HEADINGS[kind]}</h2>" + table(rows, left=("what",))
    if errors:
        more = f", the first {SHOWN_ERRORS}" if len(errors) > SHOWN_ERRORS else ""
        yield f"<h3>One by one{more}</h3>"
        yield table(
            [{"set": name, "error": finding.message} for name, finding in errors[:SHOWN_ERRORS]],
            left=("set", "error"),
        )
    if shown:
        yield f"<h2>{len(shown)} rows as the model gets them</h2>"
        yield '<p>What is <span class="learned">learned</span> is marked; boxes of question and answer are drawn into the images.</p>'
        yield from map(_shown, shown)


def _sets(inspection: Inspection) -> str:
    columns = {facts.name: set_facts(facts) for facts in inspection.sets}
    names = next(iter(columns.values()))
    return table(
        [{"": name, **{of: values[name] for of, values in columns.items()}} for name in names],
        left=("",),
    )


def _shown(example: Example) -> str:
    images = "".join(map(embedded_image, example.images))
    words = "".join(
        f'<span class="learned">{text(words)}</span>' if learned else text(words)
        for words, learned in example.runs
    )
    expected = (
        f'<h3>Expected</h3><pre><span class="learned">{text(example.expected)}</span></pre>'
        if example.expected
        else ""
    )
    where = f"{example.conversation.where} " if example.conversation.where else ""
    return (
        f'<section class="example"><header><b>{text(example.set)}</b> {text(example.conversation.id)} '
        f'<span class="faint">{text(where)}({example.tokens:,} tokens)</span></header>'
        f'<div class="images">{images}</div><div class="words"><pre>{words}</pre>{expected}</div></section>'
    )


def _plot(facts: SetFacts) -> str:
    intervals = histogram(facts.lengths, bins=40)
    if not intervals:
        return f"<figure><p>nothing usable</p><figcaption>{text(facts.name)}</figcaption></figure>"
    counts = [(f"{first:,} to {last:,} tokens", count) for first, last, count in intervals]
    return bars(
        counts,
        ends=(f"{intervals[0][0]:,}", f"{intervals[-1][1]:,} tokens"),
        what="rows",
        caption=facts.name,
    )
