"""What a sweep found: a table, best job first, and the score drawn over what was varied."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

JOB, TABLE, PLOT = "job.json", "sweep.csv", "sweep.png"
COMPOSED = ".hydra/config.yaml"
LINES = 8  # as many lines a plot takes, more combinations are points


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A job that has ended."""

    folder: Path
    values: dict[str, str]  # what its command line set
    seconds: float
    error: str | None
    scores: dict[
        str, float | None
    ]  # of the checkpoint that was kept as best, else of the last validation


def save_result(
    folder: Path, overrides: Sequence[str], *, seconds: float, error: str | None
) -> None:
    """Write how a job ended into its run folder, with the config that it was run with; until then it counts as unfinished."""
    composed = folder / COMPOSED
    config = composed.read_text(encoding="utf-8") if composed.exists() else None
    record = {
        "overrides": list(overrides),
        "seconds": round(seconds, 1),
        "error": error,
        "config": config,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JOB).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_results(folder: Path) -> list[Result]:
    """The jobs of a sweep's folder that have ended, in the order in which they were made."""
    return [
        _read_result(file)
        for file in sorted(
            folder.glob(f"*/{JOB}"), key=lambda file: (len(file.parent.name), file.parent.name)
        )
    ]


def _read_result(file: Path) -> Result:
    record = json.loads(file.read_text(encoding="utf-8"))
    values = dict(override.split("=", 1) for override in record["overrides"] if "=" in override)
    scores = read_scores(file.parent)
    return Result(
        folder=file.parent,
        values=values,
        seconds=record["seconds"],
        error=record["error"],
        scores=scores,
    )


def read_scores(folder: Path) -> dict[str, float | None]:
    """The validation scores in a run's `metrics.json`, those of its best checkpoint if it kept one; none before it has written them."""
    file = folder / "metrics.json"
    fit = json.loads(file.read_text(encoding="utf-8")).get("fit", {}) if file.exists() else {}
    best, last = fit.get("best") or {}, fit.get("last") or {}
    scores = best if any(name.startswith("val/") for name in best) else last
    return {name: value for name, value in scores.items() if name.startswith("val/")}


def varied(jobs: Sequence[dict[str, str]]) -> list[str]:
    """The keys whose values differ between jobs.

    >>> varied([{"adapter": "lora", "adapter.rank": "4"}, {"adapter": "lora", "adapter.rank": "8"}])
    ['adapter.rank']
    """
    keys = dict.fromkeys(key for values in jobs for key in values)
    return [key for key in keys if len({values.get(key) for values in jobs}) > 1]


def report(folder: Path, *, metric: str, mode: str) -> list[Result]:
    """Write `sweep.csv` and, if any job has a score, `sweep.png`; returns the jobs, best first, those without a score last.

    Args:
        mode: "min" or "max", which end of `metric` is best.

    Raises:
        DataError: jobs have scores, but none has `metric`.
    """
    results = read_results(folder)
    known = sorted({name for result in results for name in result.scores})
    if known and metric not in known:
        raise DataError(
            f"sweep.metric={metric}: the jobs have no such score; they have {', '.join(known)}"
        )
    keys = varied([result.values for result in results])
    ranked = sorted(results, key=lambda result: _rank(result.scores.get(metric), mode))
    with (folder / TABLE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        names = [metric, *(name for name in known if name != metric)]
        writer.writerow(["job", *keys, *names, "seconds", "error"])
        for result in ranked:
            values, scores = (
                [result.values.get(key) for key in keys],
                [result.scores.get(name) for name in names],
            )
            writer.writerow([result.folder.name, *values, *scores, result.seconds, result.error])
    if keys and any(result.scores.get(metric) is not None for result in results):
        draw(results, keys, metric, folder / PLOT)
    return ranked


def _rank(score: float | None, mode: str) -> float:
    return math.inf if score is None else score if mode == "min" else -score


def result_table(ranked: Sequence[Result], metric: str) -> Table:
    """The jobs for the terminal: number, what was varied, score, time, and what went wrong."""
    from rich.table import Table

    keys = varied([result.values for result in ranked])
    failed = any(result.error for result in ranked)
    table = Table()
    for name in ("job", *keys, metric, "time"):
        table.add_column(name, justify="right")
    if failed:
        table.add_column("error", style="red", overflow="fold")
    for result in ranked:
        score = result.scores.get(metric)
        minutes, seconds = divmod(round(result.seconds), 60)
        row = [result.folder.name, *(result.values.get(key, "") for key in keys)]
        row += ["" if score is None else f"{score:.4g}", f"{minutes}:{seconds:02d}"]
        table.add_row(*row, *([result.error or ""] if failed else []))
    return table


def draw(results: Sequence[Result], keys: Sequence[str], metric: str, file: Path) -> None:
    """Draw the scores over the key with most values, a line for each combination of the others; if those are many, points over each key."""
    from matplotlib.figure import Figure

    points = [result for result in results if result.scores.get(metric) is not None]
    across = max(
        keys,
        key=lambda key: (
            _numbers(points, key) is not None,
            len({result.values.get(key) for result in points}),
        ),
    )
    others = [key for key in keys if key != across]
    lines: dict[str, list[Result]] = {}
    for result in points:
        lines.setdefault(", ".join(f"{key}={result.values.get(key)}" for key in others), []).append(
            result
        )
    if len(lines) > LINES:
        figure = Figure(figsize=(4.8 * len(keys), 4), layout="constrained")
        panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
        for axes, key in zip(panels, keys, strict=True):
            axes.scatter(
                _places(axes, points, key), [result.scores[metric] for result in points], alpha=0.7
            )
        panels[0].set_ylabel(metric)
    else:
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        axes = figure.add_subplot()
        place = dict(
            zip((result.folder for result in points), _places(axes, points, across), strict=True)
        )
        for label, line in lines.items():
            line = sorted(line, key=lambda result: place[result.folder])
            axes.plot(
                [place[result.folder] for result in line],
                [result.scores[metric] for result in line],
                marker="o",
                label=label,
            )
        axes.set_ylabel(metric)
        if others:
            axes.legend(frameon=False)
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


def _places(axes: Axes, points: Sequence[Result], key: str) -> list[float]:
    """Where the points stand on an axis over `key`, which is labelled: numbers, on a log scale if they are far apart, else choices."""
    axes.set_xlabel(key)
    numbers = _numbers(points, key)
    if numbers is None:
        choices = list(dict.fromkeys(result.values.get(key, "") for result in points))
        axes.set_xticks(range(len(choices)), choices)
        axes.margins(x=0.15)
        return [choices.index(result.values.get(key, "")) for result in points]
    if min(numbers) > 0 and max(numbers) >= 8 * min(numbers):
        axes.set_xscale("log")
    if len(set(numbers)) <= LINES:
        axes.set_xticks(sorted(set(numbers)), [f"{number:g}" for number in sorted(set(numbers))])
        axes.set_xticks([], minor=True)
    return numbers


def _numbers(points: Sequence[Result], key: str) -> list[float] | None:
    values: list[Any] = [result.values.get(key) for result in points]
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError):
        return None
