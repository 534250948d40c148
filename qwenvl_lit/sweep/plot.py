"""Draws the scores of a sweep over the values that were varied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from qwenvl_lit.atomic import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from qwenvl_lit.sweep.results import Result

MAX_LINES = 8  # more combinations of values are drawn as points
MAX_TICKS = 8
LOG_SCALE_FROM = 8  # ratio of the largest and the smallest value
MIN_GAP = 0.07  # between two ticks, as a share of the axis
AXIS_CHARACTERS = 48  # of all values side by side; longer ones are written at an angle
LINE_CHARACTERS, MAX_CHARACTERS = 28, 50  # of a value at an angle
LEGEND_CHARACTERS = 80


def draw_scores(results: Sequence[Result], keys: Sequence[str], metric: str, file: Path) -> None:
    """Draws the scores over the key with most values, numbers preferred.

    Each combination of the other keys is a line. If there are more than `MAX_LINES` of them, the
    scores are points instead, in a panel for each key.
    """
    results = [result for result in results if result.scores.get(metric) is not None]
    x_key = max(keys, key=lambda key: _suitability_as_x_axis(results, key))
    labels = [_label(result, keys, without=x_key) for result in results]
    if len(set(labels)) > MAX_LINES:
        figure = _points(results, keys, metric)
    else:
        figure = _lines(results, labels, x_key, metric)
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_file(file) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120)


def _suitability_as_x_axis(results: Sequence[Result], key: str) -> tuple[bool, int]:
    return _numbers(results, key) is not None, len(set(_values(results, key)))


def _label(result: Result, keys: Sequence[str], *, without: str) -> str:
    words = []
    for key in keys:
        if key != without:
            words.append(f"{key}={result.values.get(key)}")
    return ", ".join(words)


def _points(results: Sequence[Result], keys: Sequence[str], metric: str) -> Figure:
    """A panel with all scores for each key."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(keys), 4), layout="constrained")
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    scores = [result.scores[metric] for result in results]
    for axes, key in zip(panels, keys, strict=True):
        axes.scatter(_positions(axes, results, key), scores, alpha=0.7)
    panels[0].set_ylabel(metric)
    return figure


def _lines(results: Sequence[Result], labels: Sequence[str], key: str, metric: str) -> Figure:
    """A line over `key` for each distinct label."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    positions = _positions(axes, results, key)
    lines: dict[str, list[tuple[float, float | None]]] = {}
    for label, position, result in zip(labels, positions, results, strict=True):
        lines.setdefault(label, []).append((position, result.scores[metric]))
    for label, points in lines.items():
        points.sort(key=lambda point: point[0])
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, marker="o", label=label)
    axes.set_ylabel(metric)
    if any(labels):  # beside the axes: long labels would cover the lines
        names = [fill(label, LEGEND_CHARACTERS) for label in lines]
        figure.set_figheight(4 + 0.22 * sum(name.count("\n") + 1 for name in names))
        figure.legend(axes.lines, names, loc="outside lower center", frameon=False)
    return figure


def _positions(axes: Axes, results: Sequence[Result], key: str) -> list[float]:
    """Labels the x axis with the values of `key`; returns the position of each result on it.

    Numbers stand at their value, on a log scale if they are far apart. Other values stand side by
    side.
    """
    axes.set_xlabel(key)
    numbers = _numbers(results, key)
    if numbers is None:
        values = _values(results, key)
        choices = list(dict.fromkeys(values))
        axes.set_xticks(range(len(choices)), list(map(_tick_text, choices)))
        if sum(map(len, choices)) > AXIS_CHARACTERS:
            for tick in axes.get_xticklabels():
                tick.set(rotation=30, ha="right", rotation_mode="anchor", fontsize=8)
        axes.margins(x=0.15)
        return list(map(choices.index, values))
    ticks = sorted(set(numbers))
    places = ticks
    if ticks[0] > 0 and ticks[-1] >= LOG_SCALE_FROM * ticks[0]:
        axes.set_xscale("log")
        places = list(map(math.log, ticks))
    gap = MIN_GAP * (places[-1] - places[0])
    if len(ticks) <= MAX_TICKS and all(right - left >= gap for left, right in pairwise(places)):
        axes.set_xticks(ticks, [f"{number:g}" for number in ticks])
        axes.set_xticks([], minor=True)
    return numbers


def _tick_text(value: str) -> str:
    """Returns a value in several lines. A long one is its end, which names a file in a path."""
    if len(value) > MAX_CHARACTERS:
        value = "..." + value[-MAX_CHARACTERS:]
    return fill(value, LINE_CHARACTERS)


def _numbers(results: Sequence[Result], key: str) -> list[float] | None:
    """The values of `key` as numbers; None if any of them is not a number."""
    try:
        return list(map(float, _values(results, key)))
    except ValueError:
        return None


def _values(results: Sequence[Result], key: str) -> list[str]:
    """The value of `key` in each job; "" if a job does not set it."""
    return [result.values.get(key, "") for result in results]
