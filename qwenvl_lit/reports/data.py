"""Prints a summary of an inspected dataset, and writes the findings to a file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console, RenderableType
from rich.table import Column, Table
from rich.text import Text

from qwenvl_lit.atomic import atomic_file
from qwenvl_lit.data.findings import record
from qwenvl_lit.data.inspection import File, Inspection, SetFacts
from qwenvl_lit.data.survey import Finding, Kind
from qwenvl_lit.rendering.table import cell
from qwenvl_lit.terminal import counted, printable
from qwenvl_lit.types import location_of

SHOWN_ERRORS = 20
FEW_ERRORS = 10  # up to so many are not grouped
SHOWN_PLACES = 2  # of a group of findings
SETS_PER_TABLE = 4  # more columns would not fit into 80 characters
BAR_LENGTH = 40  # characters
FIRST_ERROR = (
    "Reading a row ends at its first error, so a row may have more: correct these, and check again."
)
HEADINGS: dict[Kind, str] = {
    "error": "Errors",
    "dropped": "Rows left out",
    "note": "Repaired, unusual, or kept as they are",
    "image": "Unusual images, each counted once",
    "duplicate": "Rows that are in two sets",
}

_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_PATH = r"(?:(?<=[\s(])|^)[^\s,;'\"]*/[^\s,;'\"]*"
_NUMBER = r"(?<!\w)-?\d[\d.]*"
_SPECIFIC = re.compile(rf"(?<!\w){_QUOTED}(?!\w)|{_PATH}|{_NUMBER}")


@dataclass(frozen=True, slots=True)
class Group:
    """Findings of one kind whose problems differ only in names, paths and numbers."""

    problem: str  # with "…" in place of what differs
    count: int
    places: str  # those of the first findings


def group(findings: Sequence[Finding]) -> list[Group]:
    """Groups findings of one kind, the largest group first."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        groups.setdefault(tuple(_SPECIFIC.split(finding.problem)), []).append(finding)
    result = []
    for members in sorted(groups.values(), key=len, reverse=True):
        result.append(
            Group(_shared([each.problem for each in members]), len(members), _places(members))
        )
    return result


def groups(inspection: Inspection, kind: Kind) -> list[Group]:
    """Returns the groups of the findings of a kind, over all sets."""
    findings: list[Finding] = []
    for facts in inspection.sets:
        findings += [finding for finding in facts.findings if finding.kind == kind]
    return group(findings)


def _shared(problems: Sequence[str]) -> str:
    """Replaces names, paths and numbers that are not the same in all `problems`.

    >>> _shared(["row 3 has `a`, 7", "row 3 has `a`, 8"])
    'row 3 has `a`, …'
    """
    fixed = _SPECIFIC.split(problems[0])
    text = fixed[0]
    values = zip(*map(_SPECIFIC.findall, problems), strict=True)
    for specific, following in zip(values, fixed[1:], strict=True):
        text += specific[0] if len(set(specific)) == 1 else "…"
        text += following
    return text


def _places(findings: Sequence[Finding]) -> str:
    """Returns the places of the first findings, and how many others there are."""
    places = list(dict.fromkeys(map(_place, findings[:SHOWN_PLACES])))
    rest = len(findings) - SHOWN_PLACES
    return ", ".join(places) + (f" and {rest:,} more" if rest > 0 else "")


def _place(finding: Finding) -> str:
    # The id of a row without one is its file and line.
    if finding.where and (not finding.id or finding.where.endswith(finding.id)):
        return finding.where
    return location_of(finding.where, finding.id).removesuffix(": ")


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
        "rows with an empty answer": f"{facts.empty_answers:,}",
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
    return counted(len(inspection.errors), "error")


def rows_used(file: File) -> str:
    """Returns how many rows of a file a set has, as text.

    >>> rows_used(File(path=Path("a.jsonl"), layout="query", rows=30, used=29))
    '29 of its 30 rows'
    """
    rows = counted(file.rows, "row")
    return rows if file.used == file.rows else f"{file.used:,} of its {rows}"


def bad_image_lines(inspection: Inspection) -> list[str]:
    """Returns a line for each set with rows that `data.on_bad_image=drop` concerns."""
    if inspection.max_bad_fraction is None:
        return []
    lines = []
    for facts in inspection.sets:
        if not facts.bad_images:
            continue
        most = int(inspection.max_bad_fraction * facts.rows)
        verb = "leaves out" if facts.bad_images <= most else "would leave out"
        limit = f"data.max_bad_fraction={inspection.max_bad_fraction} allows {most:,}"
        lines.append(
            f"{facts.name}: data.on_bad_image=drop {verb} {facts.bad_images:,} of "
            f"{counted(facts.rows, 'row')} for missing or broken images; {limit}"
        )
    return lines


def overlap_lines(inspection: Inspection) -> list[str]:
    """Returns a line for each pair of sets that have rows or images in common."""
    lines = []
    for overlap in inspection.overlaps:
        lines.append(
            f"{overlap.first} and {overlap.second}: {counted(overlap.rows, 'row')} of "
            f"{overlap.second} with the images and the question of a row of {overlap.first}; "
            f"{counted(overlap.images, 'image')} in both"
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
            yield _line(f"{facts.name}: {file.path}: {rows_used(file)}, layout {file.layout}")
    for facts in sets:
        yield _heading(f"Tokens per row of {facts.name}")
        yield from map(_line, _bars(histogram(facts.lengths)))
    for kind in ("image", "note", "dropped"):
        if lines := _group_lines(inspection, kind):
            yield _heading(HEADINGS[kind])
            yield from map(_line, lines)
    if lines := bad_image_lines(inspection):
        yield _heading("Missing and broken images")
        yield from map(_line, lines)
    if lines := overlap_lines(inspection):
        yield _heading("In two sets")
        yield from map(_line, lines)
    if errors := inspection.errors:
        yield _heading(error_count(inspection), "bold red")
        yield _line(FIRST_ERROR)
        if len(errors) > FEW_ERRORS:
            yield from map(_line, _group_lines(inspection, "error"))
            more = f" (the first {SHOWN_ERRORS})" if len(errors) > SHOWN_ERRORS else ""
            yield _line(f"One by one{more}", "bold red")
        for name, finding in errors[:SHOWN_ERRORS]:
            yield _line(f"{name}: {finding.message}")


def _table(sets: Sequence[SetFacts]) -> Table:
    """Returns a table of statistics with a column for each set."""
    headings = [Column(cell(facts.name), justify="right") for facts in sets]
    table = Table("", *headings)
    columns = list(map(set_facts, sets))
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def _group_lines(inspection: Inspection, kind: Kind) -> list[str]:
    lines = []
    for each in groups(inspection, kind)[:SHOWN_ERRORS]:
        lines += [f"{each.count:>9,}  {each.problem}", f"{'':>9}  {each.places}"]
    return lines


def _heading(text: str, style: str = "bold") -> Text:
    return Text("\n" + printable(text), style=style)


def _line(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style)


def _bars(intervals: Sequence[tuple[int, int, int]]) -> Iterator[str]:
    """Yields the lines of a text histogram."""
    if not intervals:
        yield "no usable rows"
        return
    highest = max(count for _, _, count in intervals)
    digits = len(f"{intervals[-1][1]:,}")
    for first, last, count in intervals:
        bar = "█" * round(BAR_LENGTH * count / highest)
        if count and not bar:
            bar = "▏"
        yield f"{first:>{digits},} - {last:>{digits},}  {bar} {count:,}"


def write_findings(inspection: Inspection, file: Path) -> None:
    """Writes the findings as JSON lines, see `record`."""
    with atomic_file(file) as unfinished, unfinished.open("w", encoding="utf-8") as stream:
        for facts in inspection.sets:
            for finding in facts.findings:
                stream.write(json.dumps(record(facts.name, finding)) + "\n")
