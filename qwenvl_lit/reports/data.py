"""Prints a summary of an inspected dataset, and writes the findings to a file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console, RenderableType
from rich.table import Column, Table
from rich.text import Text

from qwenvl_lit.atomic import atomic_file
from qwenvl_lit.data.inspection import Inspection, SetFacts
from qwenvl_lit.data.survey import Kind
from qwenvl_lit.terminal import printable

SHOWN_ERRORS = 20
SETS_PER_TABLE = 4  # more columns would not fit into 80 characters
BAR_LENGTH = 40  # characters
HEADINGS: dict[Kind, str] = {
    "error": "Errors",
    "dropped": "Rows left out",
    "note": "Repaired, unusual, or kept as they are",
    "image": "Unusual images, each counted once",
    "duplicate": "Rows that are in two sets",
}

_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_LOCATION = re.compile(
    rf"^(?:[^'\"]*?: )?(?:row|sample) {_QUOTED}: |^\S[^'\"]*?:\d+(?: \(row \d+\))?: "
)
_PATH = r"(?:(?<=[\s(])|^)[^\s,;'\"]*/[^\s,;'\"]*"
_NUMBER = r"(?<!\w)-?\d[\d.]*"
_SPECIFIC = re.compile(rf"(?<!\w){_QUOTED}(?!\w)|{_PATH}|{_NUMBER}")


def reason(message: str) -> str:
    """Removes location, names and numbers from a message, so that equal findings have equal text.

    >>> reason("a.jsonl:3: row 'x': image /data/7.jpg does not exist; check `data.root`")
    'image … does not exist; check `data.root`'
    >>> reason("a.jsonl:3: row 'x': the answer's length is 7")
    "the answer's length is …"
    """
    return _SPECIFIC.sub("…", _LOCATION.sub("", message))


def reasons(inspection: Inspection, kind: Kind) -> list[tuple[str, int]]:
    """Returns the distinct reasons of findings of a kind with their counts, most frequent first."""
    counts: Counter[str] = Counter()
    for facts in inspection.sets:
        for finding in facts.findings:
            if finding.kind == kind:
                counts[reason(finding.message)] += 1
    return counts.most_common()


def histogram(lengths: np.ndarray, bins: int = 12) -> list[tuple[int, int, int]]:
    """Returns (first, last, count) of consecutive intervals that cover all lengths.

    All intervals have the same width, which is a round number.

    >>> histogram(np.array([3, 5, 12, 29]), bins=5)
    [(0, 9, 2), (10, 19, 1), (20, 29, 1)]
    """
    if not len(lengths):
        return []
    width = _round_width(int(lengths.max() - lengths.min()), bins)
    start = int(lengths.min()) // width * width
    intervals = []
    for count in np.bincount((lengths - start) // width):
        intervals.append((start, start + width - 1, int(count)))
        start += width
    return intervals


def _round_width(span: int, bins: int) -> int:
    """Returns the smallest of 1, 2, 5, 10, ... of which `bins - 2` intervals cover `span`."""
    for power in range(10):
        for factor in (1, 2, 5):
            width = 10**power * factor
            if span / width <= bins - 2:
                return width
    raise AssertionError(f"no row has {span} tokens")


def percentiles(lengths: np.ndarray) -> tuple[int, int, int]:
    """Returns the median, the 99th percentile and the maximum, or zeros if `lengths` is empty."""
    if not len(lengths):
        return 0, 0, 0
    median, percentile_99, maximum = np.percentile(lengths, (50, 99, 100))
    return int(median), int(percentile_99), int(maximum)


def set_facts(facts: SetFacts) -> dict[str, str]:
    """Returns the statistics of a set by name, formatted as text."""
    median, percentile_99, maximum = percentiles(facts.lengths)
    supervised = f"{int(facts.supervised.sum(dtype=np.int64)):,}"
    return {
        "rows": f"{facts.rows:,}",
        "rows with errors": f"{facts.affected['error']:,}",
        "rows left out": f"{facts.affected['dropped']:,}",
        "rows with notes": f"{facts.affected['note']:,}",
        "rows without an answer": f"{facts.unanswered:,}",
        "images": f"{facts.images:,}",
        "boxes": f"{facts.boxes:,}",
        "tokens": f"{int(facts.lengths.sum(dtype=np.int64)):,}",
        "supervised tokens": "-" if facts.prompts else supervised,
        "tokens per row: median": f"{median:,}",
        "tokens per row: 99 %": f"{percentile_99:,}",
        "tokens per row: max": f"{maximum:,}",
    }


def error_count(inspection: Inspection) -> str:
    """Returns the number of errors as text, such as "2 errors"."""
    return _count_noun(len(inspection.errors), "error")


def _count_noun(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def overlap_lines(inspection: Inspection) -> list[str]:
    """Returns a line for each pair of sets that have rows or images in common."""
    lines = []
    for overlap in inspection.overlaps:
        lines.append(
            f"{overlap.first} and {overlap.second}: {overlap.rows:,} rows of {overlap.second} have "
            f"the images and the question of a row of {overlap.first}; "
            f"{overlap.images:,} images are in both"
        )
    return lines


def print_summary(inspection: Inspection, console: Console) -> None:
    """Prints statistics of a dataset, its findings by frequency, and its first errors."""
    for part in _summary(inspection):
        console.print(part, soft_wrap=isinstance(part, Text))


def _summary(inspection: Inspection) -> Iterator[RenderableType]:
    sets = inspection.sets
    for start in range(0, len(sets), SETS_PER_TABLE):
        yield _table(sets[start : start + SETS_PER_TABLE])
    for facts in sets:
        for file in facts.files:
            rows = _count_noun(file.rows, "row")
            yield _line(f"{facts.name}: {file.path}: {rows}, layout {file.layout}")
    for facts in sets:
        yield _heading(f"Tokens per row of {facts.name}")
        yield from map(_line, _bars(histogram(facts.lengths)))
    for kind in ("image", "note", "dropped"):
        if lines := _reason_lines(inspection, kind):
            yield _heading(HEADINGS[kind])
            yield from map(_line, lines)
    if lines := overlap_lines(inspection):
        yield _heading("In two sets")
        yield from map(_line, lines)
    if errors := inspection.errors:
        yield _heading(error_count(inspection), "bold red")
        yield from map(_line, _reason_lines(inspection, "error"))
        more = f" (the first {SHOWN_ERRORS})" if len(errors) > SHOWN_ERRORS else ""
        yield _line(f"One by one{more}", "bold red")
        for name, finding in errors[:SHOWN_ERRORS]:
            yield _line(f"{name}: {finding.message}")


def _table(sets: Sequence[SetFacts]) -> Table:
    """Returns a table of statistics with a column for each set."""
    headings = [Column(Text(printable(facts.name)), justify="right") for facts in sets]
    table = Table("", *headings)
    columns = list(map(set_facts, sets))
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def _reason_lines(inspection: Inspection, kind: Kind) -> list[str]:
    most_frequent = reasons(inspection, kind)[:SHOWN_ERRORS]
    return [f"{count:>9,}  {shared}" for shared, count in most_frequent]


def _heading(text: str, style: str = "bold") -> Text:
    return Text("\n" + printable(text), style=style)


def _line(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style)


def _bars(intervals: Sequence[tuple[int, int, int]]) -> Iterator[str]:
    """Yields the lines of a text histogram."""
    if not intervals:
        return
    highest = max(count for _, _, count in intervals)
    digits = len(f"{intervals[-1][1]:,}")
    for first, last, count in intervals:
        bar = "█" * round(BAR_LENGTH * count / highest)
        if count and not bar:
            bar = "▏"
        yield f"{first:>{digits},} - {last:>{digits},}  {bar} {count:,}"


def write_findings(inspection: Inspection, file: Path) -> None:
    """Writes the findings as JSON lines with set, kind, index, id and message."""
    with atomic_file(file) as unfinished, unfinished.open("w", encoding="utf-8") as stream:
        for facts in inspection.sets:
            for finding in facts.findings:
                stream.write(json.dumps({"set": facts.name, **asdict(finding)}) + "\n")
