"""Stores the result of each job of a sweep, and compares the jobs in a table."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from qwenvl_lit.atomic import write_text
from qwenvl_lit.metrics.summary import read_fit_summary
from qwenvl_lit.sweep.plot import draw_scores
from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    from rich.table import Table

RESULT, TABLE, PLOT = "job.json", "sweep.csv", "sweep.png"
COMPOSED = ".hydra/config.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A job that has ended."""

    folder: Path
    overrides: tuple[str, ...]
    seconds: float
    error: str | None
    config: str | None  # the text of `COMPOSED` with which the job ran
    scores: dict[str, float | None]  # of the best checkpoint, else of the last validation

    @property
    def values(self) -> dict[str, str]:
        """The values that the command line of the job has set."""
        return override_values(self.overrides)


def override_values(overrides: Sequence[str]) -> dict[str, str]:
    """Returns the value of each key.

    >>> override_values(["adapter=lora", "adapter.rank=4", "~callbacks.samples"])
    {'adapter': 'lora', 'adapter.rank': '4'}
    """
    return dict(override.split("=", 1) for override in overrides if "=" in override)


def save_result(
    folder: Path, overrides: Sequence[str], *, seconds: float, error: str | None
) -> None:
    """Writes how a job ended, and the config it ran with, into its run folder.

    A job without this file counts as unfinished.
    """
    composed = folder / COMPOSED
    record = {
        "overrides": list(overrides),
        "seconds": round(seconds, 1),
        "error": error,
        "config": composed.read_text(encoding="utf-8") if composed.exists() else None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RESULT, json.dumps(record, indent=2) + "\n")


def read_result(folder: Path) -> Result | None:
    """Reads the result of the job in `folder`; None if it has not ended."""
    file = folder / RESULT
    if not file.exists():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    return Result(
        folder=folder,
        overrides=tuple(record["overrides"]),
        seconds=record["seconds"],
        error=record["error"],
        config=record["config"],
        scores=read_fit_summary(folder).scores,
    )


def read_results(folder: Path) -> list[Result]:
    """Reads the jobs of a sweep's folder that have ended, in the order of their numbers."""
    results = []
    for job_folder in folder.glob("*"):
        result = read_result(job_folder)
        if result is not None:
            results.append(result)
    results.sort(key=lambda result: (len(result.folder.name), result.folder.name))
    return results


def varied_keys(jobs: Sequence[Mapping[str, str]]) -> list[str]:
    """Returns the keys whose values differ between jobs.

    >>> varied_keys([{"adapter": "lora", "rank": "4"}, {"adapter": "lora", "rank": "8"}])
    ['rank']
    """
    varied = []
    for key in dict.fromkeys(chain.from_iterable(jobs)):
        if len({values.get(key) for values in jobs}) > 1:
            varied.append(key)
    return varied


def report(folder: Path, *, metric: str, mode: str) -> list[Result]:
    """Writes `sweep.csv` and, if any job has a score, `sweep.png`.

    Args:
        mode: "min" or "max", the best end of `metric`.

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
            f"sweep.metric={metric}: the jobs have no such score; they have {', '.join(known)}"
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
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["job", *keys, *metrics, "seconds", "error"])
        for result in ranked:
            values = map(result.values.get, keys)
            scores = map(result.scores.get, metrics)
            writer.writerow([result.folder.name, *values, *scores, result.seconds, result.error])


def result_table(ranked: Sequence[Result], metric: str) -> Table:
    """Returns a table for the terminal: job, varied values, score, time and error."""
    from rich.table import Table

    keys = varied_keys([result.values for result in ranked])
    has_errors = any(result.error for result in ranked)
    table = Table()
    for name in ("job", *keys, metric, "time"):
        table.add_column(name, justify="right")
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
        table.add_row(*row)
    return table
