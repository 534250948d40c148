"""An inspected dataset for the terminal, and its findings as a file."""

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

from qwenvl_lit.data.inspection import Inspection, SetFacts
from qwenvl_lit.data.survey import Kind

SHOWN_ERRORS = 20
SETS_ABREAST = 4  # columns of a table; more would not fit into 80 characters
BAR = 40  # characters of the longest bar
HEADINGS: dict[Kind, str] = {
    "error": "Errors",
    "dropped": "Rows left out",
    "note": "Repaired, or kept as they are",
    "duplicate": "Rows that are in two sets",
}

_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_PLACE = re.compile(rf"^(?:[^'\"]*?: )?(?:row|sample) {_QUOTED}: |^\S[^'\"]*?:\d+: ")
_OWN = re.compile(
    rf"(?<!\w){_QUOTED}(?!\w)|(?:(?<=[\s(])|^)[^\s,;'\"]*/[^\s,;'\"]*|(?<!\w)-?\d[\d.]*"
)


def reason(message: str) -> str:
    """What a message has in common with others of its kind: without place, names and numbers.

    >>> reason("a.jsonl:3: row 'x': image /data/7.jpg does not exist; check the path and `data.root`")
    'image … does not exist; check the path and `data.root`'
    >>> reason("a.jsonl:3: row 'x': is the last turn the assistant's, and is max_length above the answer's length of 7?")
    "is the last turn the assistant's, and is max_length above the answer's length of …?"
    """
    return _OWN.sub("…", _PLACE.sub("", message))


def reasons(inspection: Inspection, kind: Kind) -> list[tuple[str, int]]:
    """The reasons of all findings of a kind and how often each was found, the most frequent first."""
    counts = Counter(
        reason(finding.message)
        for facts in inspection.sets
        for finding in facts.findings
        if finding.kind == kind
    )
    return counts.most_common()


def printable(text: str) -> str:
    """Text of the data for a terminal: control characters and what UTF-8 cannot write are escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def histogram(lengths: np.ndarray, bins: int = 12) -> list[tuple[int, int, int]]:
    """(first, last, how many) of intervals of equal, round width from the shortest to the longest.

    >>> histogram(np.array([3, 5, 12, 29]), bins=5)
    [(0, 9, 2), (10, 19, 1), (20, 29, 1)]
    """
    if not len(lengths):
        return []
    low, high = int(lengths.min()), int(lengths.max())
    width = next(
        step
        for power in range(10)
        for step in (10**power, 10**power * 2, 10**power * 5)
        if (high - low) / step <= bins - 2
    )
    start = low // width * width
    counts = np.bincount((lengths - start) // width)
    return [
        (start + place * width, start + (place + 1) * width - 1, int(count))
        for place, count in enumerate(counts)
    ]


def percentiles(lengths: np.ndarray) -> tuple[int, int, int]:
    """Median, 99th percentile and longest; zeros if there is none."""
    median, most, longest = np.percentile(lengths, (50, 99, 100)) if len(lengths) else (0, 0, 0)
    return int(median), int(most), int(longest)


def set_facts(facts: SetFacts) -> dict[str, str]:
    """A set in numbers, by what they are."""
    median, most, longest = percentiles(facts.lengths)
    return {
        "rows": f"{facts.rows:,}",
        "rows with errors": f"{facts.affected['error']:,}",
        "rows left out": f"{facts.affected['dropped']:,}",
        "rows with notes": f"{facts.affected['note']:,}",
        "rows without an answer": f"{facts.unanswered:,}",
        "images": f"{facts.images:,}",
        "boxes": f"{facts.boxes:,}",
        "tokens": f"{int(facts.lengths.sum(dtype=np.int64)):,}",
        "tokens learned": "-"
        if facts.prompts
        else f"{int(facts.supervised.sum(dtype=np.int64)):,}",
        "tokens of a row: median": f"{median:,}",
        "99 of 100 rows up to": f"{most:,}",
        "longest row": f"{longest:,}",
    }


def error_count(inspection: Inspection) -> str:
    """How many errors there are, in words."""
    count = len(inspection.errors)
    return "1 error" if count == 1 else f"{count:,} errors"


def overlap_lines(inspection: Inspection) -> list[str]:
    """What sets have in common, in words."""
    return [
        f"{overlap.first} and {overlap.second}: rows of {overlap.second} that ask the same of the same images: {overlap.rows:,}; "
        f"images in both: {overlap.images:,}"
        for overlap in inspection.overlaps
    ]


def print_summary(inspection: Inspection, console: Console) -> None:
    """All that a person has to know; of the errors the first ones."""
    for part in _parts(inspection):
        console.print(part, soft_wrap=isinstance(part, Text))


def _parts(inspection: Inspection) -> Iterator[RenderableType]:
    for start in range(0, len(inspection.sets), SETS_ABREAST):
        sets = inspection.sets[start : start + SETS_ABREAST]
        table = Table("", *(Column(Text(printable(facts.name)), justify="right") for facts in sets))
        columns = [set_facts(facts) for facts in sets]
        for name in columns[0]:
            table.add_row(name, *(facts[name] for facts in columns))
        yield table
    for facts in inspection.sets:
        for file in facts.files:
            yield _line(
                f"{facts.name}: {file.path}: {file.rows:,} {'row' if file.rows == 1 else 'rows'}, layout {file.layout}"
            )
    for facts in inspection.sets:
        yield _line(f"\nTokens of a row of {facts.name}", "bold")
        yield from map(_line, _bars(histogram(facts.lengths)))
    for kind in ("note", "dropped"):
        if found := reasons(inspection, kind):
            yield _line(f"\n{HEADINGS[kind]}", "bold")
            yield from (_line(f"{count:>9,}  {why}") for why, count in found[:SHOWN_ERRORS])
    if lines := overlap_lines(inspection):
        yield _line("\nIn two sets", "bold")
        yield from map(_line, lines)
    if errors := inspection.errors:
        yield _line(f"\n{error_count(inspection)}", "bold red")
        yield from (
            _line(f"{count:>9,}  {why}")
            for why, count in reasons(inspection, "error")[:SHOWN_ERRORS]
        )
        more = f" (the first {SHOWN_ERRORS})" if len(errors) > SHOWN_ERRORS else ""
        yield _line(f"One by one{more}", "bold red")
        yield from (_line(f"{name}: {finding.message}") for name, finding in errors[:SHOWN_ERRORS])


def _line(text: str, style: str = "") -> Text:
    start = "\n" if text.startswith("\n") else ""
    return Text(start + printable(text.removeprefix("\n")), style=style)


def _bars(intervals: Sequence[tuple[int, int, int]]) -> Iterator[str]:
    most = max((count for *_, count in intervals), default=0)
    digits = len(f"{intervals[-1][1]:,}") if intervals else 0
    for first, last, count in intervals:
        bar = "█" * round(BAR * count / most) or ("▏" if count else "")
        yield f"{first:>{digits},} - {last:>{digits},}  {bar} {count:,}"


def write_findings(inspection: Inspection, file: Path) -> None:
    """One line of JSON for every finding: set, index, id, kind, message."""
    with file.open("w") as stream:
        for facts in inspection.sets:
            for finding in facts.findings:
                stream.write(json.dumps({"set": facts.name, **asdict(finding)}) + "\n")
