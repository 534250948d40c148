"""Scores as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import SupportsFloat

from rich.table import Table


def score_table(
    scores: Mapping[str, SupportsFloat], baseline: Mapping[str, SupportsFloat] | None = None
) -> Table:
    """A row for each metric and a column for each set, from scores named `SET/METRIC` as `trainer.test` logs them.

    `SET/rows` is shown as a whole number, everything else with three decimals; what a set has no score for stays empty.

    Args:
        baseline: scores under the same names, as of the model before training; every set then has a second column, to its left.
    """
    cells = {
        tuple(name.rsplit("/", 1)): _number(name, value)
        for name, value in scores.items()
        if "/" in name
    }
    before = {
        tuple(name.rsplit("/", 1)): _number(name, value)
        for name, value in (baseline or {}).items()
        if "/" in name
    }
    sets, metrics = _unique([s for s, _ in cells]), _unique([metric for _, metric in cells])
    table = Table()
    table.add_column("metric")
    for name in sets:
        if baseline is not None:
            table.add_column(f"{name}, before", justify="right", style="dim")
        table.add_column(name, justify="right")
    for metric in sorted(metrics, key=lambda metric: metric == "rows"):  # last
        row = [metric]
        for name in sets:
            if baseline is not None:
                row.append(before.get((name, metric), ""))
            row.append(cells.get((name, metric), ""))
        table.add_row(*row)
    return table


def plain_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """Rows that all have the columns of the first, of which two are text and the others numbers."""
    table = Table()
    for place, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if place < 2 else "right")
    for row in rows:
        table.add_row(*row.values())
    return table


def _number(name: str, value: SupportsFloat) -> str:
    return (
        f"{float(value):.0f}" if name.endswith("/rows") else f"{round(float(value), 6):.3f}"
    )  # logged as float32: 0.8325 is a little less


def _unique(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))
