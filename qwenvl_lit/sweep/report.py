"""Compares the jobs of a sweep: a table, the best job first, and a plot of the scores."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwenvl_lit.atomic import atomic_file
from qwenvl_lit.sweep.plot import draw_scores
from qwenvl_lit.sweep.results import Result, read_results, varied_keys
from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    from rich.table import Table

TABLE, PLOT = "sweep.csv", "sweep.png"


def report(folder: Path, *, metric: str, mode: str) -> list[Result]:
    """Writes `sweep.csv` and, if any job has a score, `sweep.png`.

    Args:
        mode: "min" or "max": whether the lowest or highest `metric` is best.

    Returns:
        The jobs, the best one first, those without a score last.

    Raises:
        DataError: jobs have scores, but none has `metric`.
    """
    results = read_results(folder)
    names: set[str] = set()
    for result in results:
        names.update(result.scores)
    known = sorted(names)
    if known and metric not in known:
        raise DataError(
            f"sweep.metric={metric}: the jobs have no such score; they have {', '.join(known)}. "
            f"Repeat the command with one of them and hydra.sweep.dir={folder}; finished jobs do "
            "not train again"
        )
    keys = varied_keys([result.values for result in results])
    ranked = sorted(results, key=lambda result: _rank(result.scores.get(metric), mode))
    columns = list(dict.fromkeys([metric, *known]))
    _write_table(ranked, keys, columns, folder / TABLE)
    has_score = any(result.scores.get(metric) is not None for result in results)
    if keys and has_score:
        draw_scores(results, keys, metric, folder / PLOT)
    return ranked


def _rank(score: float | None, mode: str) -> float:
    if score is None:
        return math.inf
    return score if mode == "min" else -score


def _write_table(
    ranked: Sequence[Result], keys: Sequence[str], metrics: Sequence[str], file: Path
) -> None:
    with atomic_file(file) as part, part.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["job", *keys, *metrics, "seconds", "error"])
        for result in ranked:
            values = map(result.values.get, keys)
            scores = map(result.scores.get, metrics)
            writer.writerow([result.folder.name, *values, *scores, result.seconds, result.error])


def result_table(ranked: Sequence[Result], metric: str) -> Table:
    """Returns a table for the terminal: job, varied values, score, time and error."""
    from rich.table import Table

    from qwenvl_lit.rendering.table import cell

    keys = varied_keys([result.values for result in ranked])
    has_errors = any(result.error for result in ranked)
    table = Table()
    for name in ("job", *keys, metric, "time"):
        table.add_column(cell(name), justify="right", overflow="fold")
    if has_errors:
        table.add_column("error", style="red", overflow="fold")
    for result in ranked:
        score = result.scores.get(metric)
        minutes, seconds = divmod(round(result.seconds), 60)
        row = [result.folder.name, *(result.values.get(key, "") for key in keys)]
        row.append("" if score is None else f"{score:.4g}")
        row.append(f"{minutes}:{seconds:02d}")
        if has_errors:
            row.append(result.error or "")
        table.add_row(*map(cell, row))
    return table
