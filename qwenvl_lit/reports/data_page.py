"""Writes an HTML page about an inspected dataset."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from qwenvl_lit.atomic import write_text
from qwenvl_lit.data.inspection import Inspection, SetFacts
from qwenvl_lit.models.chatml import runs
from qwenvl_lit.models.protocols import Processor
from qwenvl_lit.rendering.drawing import draw_objects, label_list, objects_of_image
from qwenvl_lit.reports.data import (
    FIRST_ERROR,
    HEADINGS,
    bad_image_lines,
    error_count,
    groups,
    histogram,
    overlap_lines,
    rows_used,
    set_facts,
)
from qwenvl_lit.reports.page import (
    IMAGE_SIDE_PX,
    embedded_image,
    example,
    histogram_figure,
    labels,
    page,
    paragraph,
    table,
    text,
)
from qwenvl_lit.terminal import counted
from qwenvl_lit.types import Conversation

SHOWN_ERRORS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A row as the model receives it."""

    set_name: str
    conversation: Conversation
    runs: tuple[tuple[str, bool], ...]  # texts of token sequences, and whether they are supervised
    tokens: int
    reference: str | None  # for prompts, the expected answer in the model's markup
    images: tuple[Image.Image, ...]  # with boxes
    labels: tuple[tuple[str, ...], ...]  # of the boxes in each image


def examples(
    inspection: Inspection,
    sets: Mapping[str, Sequence[Conversation]],
    processor: Processor,
    *,
    count: int = 10,
    seed: int = 0,
) -> list[Example]:
    """Selects random usable rows, the same number from each set that has enough."""
    counts = _equal_counts(inspection, count)
    generator = random.Random(seed)
    selected = []
    for facts in inspection.sets:
        for index in sorted(generator.sample(facts.usable.tolist(), counts[facts.name])):
            selected.append(_example(facts, sets[facts.name][int(index)], processor))
    return selected


def _equal_counts(inspection: Inspection, count: int) -> dict[str, int]:
    """Returns how many of `count` rows to select from each set."""
    capacities = {facts.name: len(facts.usable) for facts in inspection.sets}
    counts = dict.fromkeys(capacities, 0)
    total = min(count, sum(capacities.values()))
    while sum(counts.values()) < total:
        for name, capacity in capacities.items():
            if counts[name] < capacity and sum(counts.values()) < total:
                counts[name] += 1
    return counts


def _example(facts: SetFacts, conversation: Conversation, processor: Processor) -> Example:
    sample = processor.encode(conversation, prompt=facts.prompts)
    ids, labels = sample.input_ids.tolist(), sample.labels.tolist()
    parts = [part for turn in conversation.turns for part in turn.parts]
    images, names = [], []
    for index, source in enumerate(conversation.images):
        image = source.open()
        objects = objects_of_image(parts, index, image.size)
        images.append(draw_objects(image, objects, largest_side_px=IMAGE_SIDE_PX))
        names.append(tuple(label_list(objects)))
    reference = None
    if facts.prompts:
        reference = processor.decode((), conversation).reference
    return Example(
        set_name=facts.name,
        conversation=conversation,
        runs=tuple(runs(ids, labels, processor.text)),
        tokens=len(ids),
        reference=reference,
        images=tuple(images),
        labels=tuple(names),
    )


def write_page(inspection: Inspection, shown: Sequence[Example], file: Path, *, title: str) -> None:
    """Writes a page with statistics, files, histograms, findings and the examples `shown`."""
    write_text(file, page(title, _body(inspection, shown, title)))


def _body(inspection: Inspection, shown: Sequence[Example], title: str) -> Iterator[str]:
    yield f"<h1>{text(title)}</h1>"
    yield paragraph(_verdict(inspection) + " <code>findings.jsonl</code> lists every finding.")
    yield "<h2>Sets</h2>" + _sets_table(inspection)
    yield from _files(inspection)
    figures = "".join(map(_lengths_figure, inspection.sets))
    yield f'<h2>Tokens per row</h2><div class="plots">{figures}</div>'
    if lines := overlap_lines(inspection):
        yield "<h2>In two sets</h2>" + "".join(paragraph(text(line)) for line in lines)
    for kind in ("error", "dropped", "note", "image"):
        rows = []
        for each in groups(inspection, kind):
            row = {"times": f"{each.count:,}", "finding": each.problem, "first": each.places}
            rows.append(row)
        if rows:
            yield f"<h2>{HEADINGS[kind]}</h2>" + table(rows, text_columns=["finding", "first"])
    for line in bad_image_lines(inspection):
        yield paragraph(text(line))
    yield from _errors(inspection)
    if shown:
        yield f"<h2>{counted(len(shown), 'row')} as the model receives them</h2>"
        yield paragraph(
            '<span class="supervised">Supervised text</span> is marked. Boxes of the question and '
            "of the answer are drawn on the images."
        )
        yield from map(_shown, shown)


def _verdict(inspection: Inspection) -> str:
    if inspection.errors:
        return f'<b class="bad">{error_count(inspection)}</b>: fix them before using this data.'
    return '<b class="good">No errors.</b>'


def _sets_table(inspection: Inspection) -> str:
    """Returns a table of statistics with a column for each set."""
    figures_by_set = {facts.name: set_facts(facts) for facts in inspection.sets}
    rows = []
    for name in next(iter(figures_by_set.values())):
        row = {"": name}
        for set_name, figures in figures_by_set.items():
            row[set_name] = figures[name]
        rows.append(row)
    return table(rows, text_columns=[""])


def _files(inspection: Inspection) -> Iterator[str]:
    rows = []
    for facts in inspection.sets:
        for file in facts.files:
            row = {"set": facts.name, "file": str(file.path), "layout": file.layout}
            rows.append({**row, "rows": rows_used(file)})
    if rows:
        yield "<h2>Files</h2>" + table(rows, text_columns=["set", "file", "layout"])


def _errors(inspection: Inspection) -> Iterator[str]:
    errors = inspection.errors
    if not errors:
        return
    yield paragraph(FIRST_ERROR)
    more = f", the first {SHOWN_ERRORS}" if len(errors) > SHOWN_ERRORS else ""
    yield f"<h3>One by one{more}</h3>"
    rows = [{"set": name, "error": finding.message} for name, finding in errors[:SHOWN_ERRORS]]
    yield table(rows, text_columns=["set", "error"])


def _shown(row: Example) -> str:
    conversation = row.conversation
    source = f"{conversation.where} " if conversation.where else ""
    header = (
        f"<b>{text(row.set_name)}</b> {text(conversation.id)} "
        f'<span class="faint">{text(source)}({row.tokens:,} tokens)</span>'
    )
    content = ""
    for run, supervised in row.runs:
        content += _supervised(run) if supervised else text(run)
    words = f"<pre>{content}</pre>"
    if row.reference:
        words += f"<h3>Expected</h3><pre>{_supervised(row.reference)}</pre>"
    images = ""
    for image, names in zip(row.images, row.labels, strict=True):
        images += embedded_image(image) + labels(names, "predicted")
    return example(header, images, words)


def _supervised(content: str) -> str:
    return f'<span class="supervised">{text(content)}</span>'


def _lengths_figure(facts: SetFacts) -> str:
    intervals = histogram(facts.lengths, bins=40)
    if not intervals:
        caption = f"<figcaption>{text(facts.name)}</figcaption>"
        return f"<figure><p>no usable rows</p>{caption}</figure>"
    counts = [(f"{first:,} to {last:,} tokens", count) for first, last, count in intervals]
    ends = (f"{intervals[0][0]:,}", f"{intervals[-1][1]:,} tokens")
    return histogram_figure(counts, ends=ends, unit="rows", caption=facts.name)
