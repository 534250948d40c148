"""Tables for the terminal."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import SupportsFloat

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from qwenvl_lit.terminal import printable

FILE_WIDTH = 160  # characters of a line in a file, which can hold whole names
MEASURED_WIDTH = 10_000  # wider than any table

Cells = Mapping[tuple[str, str], str]  # formatted scores by test set and metric
Scores = Mapping[str, SupportsFloat]  # named SET/METRIC, as `trainer.test` logs them


def output_console(*, stderr: bool = False) -> Console:
    """Returns a console that prints tables. A file gets lines of `FILE_WIDTH` characters.

    The environment variable COLUMNS sets another width.
    """
    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = FILE_WIDTH
    return console


def score_table(
    scores: Scores, baseline: Scores | None = None, *, width: int = FILE_WIDTH
) -> Table:
    """Returns a table with a row for each metric and a column for each test set.

    `SET/rows` is an integer in the last row. Other scores have three decimals, and in parentheses
    the rows that the metric has scored, `SET/rows_METRIC`, if these are not all. A cell is empty if
    the test set has no such score. If such a table is wider than `width`, the result has a row for
    each metric of each set instead.

    Args:
        baseline: scores of the model before training. With a baseline, each test set has a second
            column, on the left, for its baseline scores.
    """
    cells = _cells(scores)
    baseline_cells = None
    if baseline is not None:
        baseline_cells = _cells(baseline)
    table = _table_of_sets(cells, baseline_cells)
    if Console(width=MEASURED_WIDTH).measure(table).maximum <= width:
        return table
    return _list_of_scores(cells, baseline_cells)


def _table_of_sets(cells: Cells, baseline: Cells | None) -> Table:
    sets = dict.fromkeys(name for name, _ in cells)
    table = Table()
    table.add_column("metric")
    for name in sets:
        if baseline is not None:
            table.add_column(cell(f"{name}, before"), justify="right", style="dim")
        table.add_column(cell(name), justify="right")
    for metric in _metrics(cells):
        row = [metric]
        for name in sets:
            if baseline is not None:
                row.append(baseline.get((name, metric), ""))
            row.append(cells.get((name, metric), ""))
        table.add_row(*map(cell, row))
    return table


def _list_of_scores(cells: Cells, baseline: Cells | None) -> Table:
    table = Table()
    for heading in ("set", "metric"):
        table.add_column(heading, overflow="fold")
    if baseline is not None:
        table.add_column("before", justify="right", style="dim", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    for name in dict.fromkeys(name for name, _ in cells):
        heading = name
        for metric in _metrics(cells):
            if (name, metric) in cells:
                row = [heading, metric]
                if baseline is not None:
                    row.append(baseline.get((name, metric), ""))
                table.add_row(*map(cell, (*row, cells[name, metric])))
                heading = ""  # a set is named once
        table.add_section()
    return table


def _metrics(cells: Cells) -> list[str]:
    """Returns the distinct metrics, with the number of rows as the last one."""
    metrics = dict.fromkeys(metric for _, metric in cells)
    return sorted(metrics, key=lambda metric: metric == "rows")


def plain_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """Returns a table of rows that all have the same columns.

    The first two columns are text and left-aligned. The others are numbers and right-aligned.
    """
    table = Table()
    for index, name in enumerate(rows[0]):
        justify: JustifyMethod = "right"
        if index < 2:
            justify = "left"
        table.add_column(cell(name), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*map(cell, row.values()))
    return table


def cell(content: str) -> Text:
    """Returns a table cell in which rich's markup and control characters have no effect.

    Text that does not fit is continued on the next line, and never cut.
    """
    return Text(printable(content), overflow="fold")


def _cells(scores: Scores) -> dict[tuple[str, str], str]:
    """Returns formatted scores by test set and metric. The name of a set may contain slashes."""
    cells = {}
    for name, value in scores.items():
        set_name, slash, metric = name.rpartition("/")
        if not slash or metric.startswith("rows_"):
            continue
        if metric == "rows":
            cells[set_name, metric] = f"{float(value):.0f}"
        else:
            # Scores are logged as float32. 0.8325 as float32 is smaller, so that rounding it to
            # three decimals directly would give 0.832.
            cells[set_name, metric] = f"{round(float(value), 6):.3f}"
            scored, rows = scores.get(f"{set_name}/rows_{metric}"), scores.get(f"{set_name}/rows")
            if scored is not None and rows is not None and float(scored) != float(rows):
                cells[set_name, metric] += f" ({float(scored):.0f} rows)"
    return cells
