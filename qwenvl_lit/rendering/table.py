"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import SupportsFloat

from rich.table import Table
from rich.text import Text

from qwenvl_lit.terminal import printable

Scores = Mapping[str, SupportsFloat]  # named SET/METRIC, as `trainer.test` logs them


def score_table(scores: Scores, baseline: Scores | None = None) -> Table:
    """Returns a table with a row for each metric and a column for each test set.

    `SET/rows` is an integer in the last row. Other scores have three decimals, and in parentheses
    the rows that the metric has scored, `SET/rows_METRIC`, if these are not all. A cell is empty if
    the test set has no such score.

    Args:
        baseline: scores of the model before training. With a baseline, each test set has a second
            column, on the left, for its baseline scores.
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
    """Returns a table of rows that all have the same columns.

    The first two columns are text and left-aligned. The others are numbers and right-aligned.
    """
    table = Table()
    for index, name in enumerate(rows[0]):
        table.add_column(cell(name), justify="left" if index < 2 else "right")
    for row in rows:
        table.add_row(*map(cell, row.values()))
    return table


def cell(content: str) -> Text:
    """Returns a table cell in which rich's markup and control characters have no effect."""
    return Text(printable(content))


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
