"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import SupportsFloat

from rich.table import Table
from rich.text import Text

from qwenvl_lit.terminal import printable

Scores = Mapping[str, SupportsFloat]  # by SET/METRIC, as `trainer.test` logs them


def score_table(scores: Scores, baseline: Scores | None = None) -> Table:
    """Returns a table with a row for each metric and a column for each set.

    `SET/rows` is a whole number and in the last row; other scores have three decimals. A cell is
    empty if the set has no such score.

    Args:
        baseline: scores of the model before training; each set then has a column for them, to the
            left of its own.
    """
    cells = _cells(scores)
    baseline_cells = _cells(baseline or {})
    sets = dict.fromkeys(name for name, _ in cells)
    metrics = dict.fromkeys(metric for _, metric in cells)
    table = Table()
    table.add_column("metric")
    for name in sets:
        if baseline is not None:
            table.add_column(cell(f"{name}, before"), justify="right", style="dim")
        table.add_column(cell(name), justify="right")
    for metric in sorted(metrics, key=lambda metric: metric == "rows"):
        row = [metric]
        for name in sets:
            if baseline is not None:
                row.append(baseline_cells.get((name, metric), ""))
            row.append(cells.get((name, metric), ""))
        table.add_row(*map(cell, row))
    return table


def plain_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """Returns a table of rows that all have the columns of the first.

    The first two columns are text, the others numbers.
    """
    table = Table()
    for index, name in enumerate(rows[0]):
        table.add_column(cell(name), justify="left" if index < 2 else "right")
    for row in rows:
        table.add_row(*map(cell, row.values()))
    return table


def cell(content: str) -> Text:
    """Returns text of the data for a table: without markup of rich and control characters."""
    return Text(printable(content))


def _cells(scores: Scores) -> dict[tuple[str, str], str]:
    """Formatted scores by set and metric; a set may have a slash in its name."""
    cells = {}
    for name, value in scores.items():
        set_name, slash, metric = name.rpartition("/")
        if not slash:
            continue
        if metric == "rows":
            cells[set_name, metric] = f"{float(value):.0f}"
        else:
            # logged as float32: 0.8325 is slightly less, and would be rounded down
            cells[set_name, metric] = f"{round(float(value), 6):.3f}"
    return cells
