"""Scores as numbers to trust: those of each row, how sure their mean is, what they are by group, and how two runs differ."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qwenvl_lit.metrics.boxes import first_box_iou, labelled_boxes
from qwenvl_lit.metrics.per_sample import PerSampleMetric, sample_key
from qwenvl_lit.models.protocols import Processor
from qwenvl_lit.types import Conversation, DataError, GroundedObject, Prediction

RESAMPLES = 1000
SURE = 0.95
MOST_GROUPS = 12  # of a column; one with more values names rows and does not group them

Rows = Sequence[Conversation]


class Mean(NamedTuple):
    """A score of some rows and the interval that it is in, 95 % sure."""

    value: float
    low: float
    high: float
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """The answers to one set."""

    name: str
    predictions: Sequence[Prediction]
    totals: Mapping[str, float]  # what each metric says of them together
    scores: Mapping[
        str, np.ndarray
    ]  # of each prediction by each metric; nan where it does not count
    unanswered: int = 0  # rows of the set that no answer was there for

    def is_mean(self, metric: str) -> bool:
        """Whether the score is the mean of what each row scores, as of most metrics; BLEU is of all rows together."""
        return bool(
            np.isclose(np.nanmean(self.scores[metric]), self.totals[metric], rtol=1e-5, atol=1e-7)
        )

    def mean(self, metric: str) -> Mean:
        """A metric's score, with its interval where it is a mean."""
        mean = bootstrap(self.scores[metric])._replace(value=self.totals[metric])
        return mean if self.is_mean(metric) else mean._replace(low=np.nan, high=np.nan)


class Difference(NamedTuple):
    """How a metric changed from one run to another, on the rows that both have answered."""

    before: float
    now: float
    change: Mean
    better: int
    worse: int


class Changed(NamedTuple):
    """A row whose score by `metric` is another now."""

    metric: str
    by: float
    before: Prediction
    now: Prediction


def bootstrap(values: np.ndarray, *, seed: int = 0) -> Mean:
    """The mean of what is not nan, and the percentile interval of the means of samples drawn from it with replacement.

    >>> bootstrap(np.array([0.0, 1.0, 1.0, 1.0, np.nan]))
    Mean(value=0.75, low=0.25, high=1.0, rows=4)
    """
    values = values[~np.isnan(values)]
    if not len(values):
        return Mean(np.nan, np.nan, np.nan, 0)
    distinct, counts = np.unique(
        values, return_counts=True
    )  # how often each value is drawn is all that matters
    drawn = np.random.default_rng(seed).multinomial(
        len(values), counts / len(values), size=RESAMPLES
    )
    low, high = np.quantile(drawn @ distinct / len(values), [(1 - SURE) / 2, (1 + SURE) / 2])
    return Mean(float(values.mean()), float(low), float(high), len(values))


def read_predictions(file: Path) -> dict[str, dict[int, tuple[str, str]]]:
    """Id and text of the answers in a `predictions.jsonl`, by set and by the row's place in it.

    Raises:
        DataError: it cannot be read, or a line is no prediction.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        raise DataError(f"predictions={file} cannot be read: {fault}") from None
    found: dict[str, dict[int, tuple[str, str]]] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            found.setdefault(row["set"], {})[int(row["index"])] = (
                row["id"],
                str(row["prediction"]),
            )
        except (ValueError, TypeError, KeyError) as fault:
            raise DataError(
                f"{file}:{number}: expected {{set, index, id, prediction}} as `predict` writes them: {fault!r}"
            ) from None
    if not found:
        raise DataError(f"predictions={file} has no rows")
    return found


def answers(
    file: Path, sets: Mapping[str, Rows], processor: Processor
) -> dict[str, list[Prediction]]:
    """The predictions in a file as they were made, in the order of the rows that they answer; by set.

    Raises:
        DataError: as `read_predictions`, or they answer other rows.
    """
    found = read_predictions(file)
    if unknown := sorted(set(found) - set(sets)):
        raise DataError(
            f"{file} answers the sets {', '.join(unknown)}, the data has {', '.join(sets)}; give the data= it was made with"
        )
    return {
        name: [
            _answer(file, sets[name], name, index, *row, processor)
            for index, row in sorted(found[name].items())
        ]
        for name in found
    }


def _answer(
    file: Path, rows: Rows, name: str, index: int, id: str, text: str, processor: Processor
) -> Prediction:
    row = rows[index] if 0 <= index < len(rows) else None
    if row is None or row.id != id:
        here = "does not exist" if row is None else f"is {row.id!r}"
        raise DataError(
            f"{file}: row {index} of {name} is {id!r}, which {here} in the data; give the data= it was made with"
        )
    return processor.read(text, replace(row, index=index))


def score(
    name: str,
    predictions: Sequence[Prediction],
    metrics: Mapping[str, PerSampleMetric],
    *,
    rows: int | None = None,
) -> Scored:
    """What `metrics` say of the answers to a set of so many `rows`; as in a test, one that found no row it could score is left out."""
    totals, scores = {}, {}
    for title, metric in metrics.items():
        own = metric.clone()
        own.distributed_available_fn = lambda: (
            False
        )  # all answers are here; other processes may be there and do not take part
        own.reset()
        own.update(predictions)
        total = float(own.compute().float())  # as the task logs it, to the last digit
        if np.isfinite(total):
            totals[title] = total
            scores[title] = row_scores(own, predictions)
    return Scored(
        name=name,
        predictions=predictions,
        totals=totals,
        scores=scores,
        unanswered=0 if rows is None else rows - len(predictions),
    )


def row_scores(metric: PerSampleMetric, predictions: Sequence[Prediction]) -> np.ndarray:
    """What an updated metric says of each of the predictions; nan where it does not count, or where another with the same id does."""
    kept = {key: numbers for key, numbers in metric.rows().items() if len(numbers)}
    of_key = dict(
        zip(kept, metric.row_scores(list(kept.values())).tolist() if kept else (), strict=True)
    )
    values = np.full(len(predictions), np.nan)
    for id, place in {
        prediction.conversation.id: place for place, prediction in enumerate(predictions)
    }.items():
        values[place] = of_key.get(sample_key(id), np.nan)
    return values


def groups(predictions: Sequence[Prediction]) -> dict[str, np.ndarray]:
    """What group each answer is in, by what it is grouped by; "" where that says nothing. Only what tells rows apart is there."""
    named = sorted(
        {column for prediction in predictions for column in prediction.conversation.columns}
    )
    by: dict[str, Callable[[Prediction], str]] = {
        **{
            column: lambda p, column=column: p.conversation.columns.get(column, "")
            for column in named
        },
        "images": lambda p: str(len(p.conversation.images)),
        "words of the expected answer": lambda p: _interval(_words(p), (1, 2, 4, 8, 16), ""),
        "box, % of the image": lambda p: _interval(_expected_share(p), (0, 1, 5, 20, 50), ""),
        "choices": lambda p: str(len(p.conversation.options) or ""),
    }
    found = {
        title: np.array([group(prediction) for prediction in predictions], dtype=object)
        for title, group in by.items()
    }
    return {
        title: labels
        for title, labels in found.items()
        if 2 <= len(set(labels) - {""}) <= MOST_GROUPS
    }


def in_order(labels: Iterable[str]) -> list[str]:
    """Each group once: numbers and intervals by size, names by letter."""

    def place(label: str) -> tuple[bool, float, str]:
        number = label.split(" ")[0].replace("–", " ").split(" ")[0]
        return (
            (False, float(number), "")
            if number.replace(".", "", 1).isdigit()
            else (True, 0.0, label)
        )

    return sorted(set(labels) - {""}, key=place)


def _words(prediction: Prediction) -> float | None:
    answer = prediction.conversation.answer
    if answer is None or any(
        isinstance(part, GroundedObject) and part.boxes for part in answer.parts
    ):
        return None
    return len((prediction.reference or "").split())


def _expected_share(prediction: Prediction) -> float | None:
    answer = prediction.conversation.answer
    boxes = [
        box
        for _, box in labelled_boxes(answer.parts if answer else (), prediction.conversation)
        if box
    ]
    return 100 * abs((boxes[0].x1 - boxes[0].x0) * (boxes[0].y1 - boxes[0].y0)) if boxes else None


def _interval(value: float | None, starts: Sequence[int], nothing: str) -> str:
    if value is None:
        return nothing
    place = max((number for number, start in enumerate(starts) if value >= start), default=0)
    if place == len(starts) - 1:
        return f"{starts[place]} and more"
    last = starts[place + 1]
    return (
        f"{starts[place]}"
        if last == starts[place] + 1 and starts[0]
        else f"{starts[place]}–{last - (1 if starts[0] else 0)}"
    )


def ious(predictions: Sequence[Prediction]) -> np.ndarray:
    """IoU of the first predicted with the first expected box, of those answers that have an expected one."""
    return np.array([iou for iou in map(first_box_iou, predictions) if iou is not None])


def extremes(scored: Scored, count: int, *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Places of the `count` worst and the `count` best answers, by the first metric that scores a row; drawn at random among equals."""
    values = first_scores(scored)
    known = np.random.default_rng(seed).permutation(np.flatnonzero(~np.isnan(values)))
    ranked = known[np.argsort(values[known], kind="stable")]
    half = len(ranked) // 2
    return ranked[: min(count, len(ranked) - half)].tolist(), ranked[::-1][
        : min(count, half)
    ].tolist()


def first_scores(scored: Scored) -> np.ndarray:
    """Of each answer, its score by the first metric that has one."""
    values = np.full(len(scored.predictions), np.nan)
    for own in scored.scores.values():
        values = np.where(np.isnan(values), own, values)
    return values


def compare(before: Scored, now: Scored) -> tuple[dict[str, Difference], list[Changed]]:
    """What changed between two runs, on the rows that both answered: by metric, and row by row, the largest changes first."""
    places = {
        prediction.conversation.index: place for place, prediction in enumerate(before.predictions)
    }
    both = [
        (places[p.conversation.index], place)
        for place, p in enumerate(now.predictions)
        if p.conversation.index in places
    ]
    old, new = np.array([a for a, _ in both], dtype=int), np.array([b for _, b in both], dtype=int)
    differences, changed = {}, []
    for metric in now.scores:
        if metric not in before.scores or not len(both):
            continue
        was, is_ = before.scores[metric][old], now.scores[metric][new]
        by = is_ - was
        known = ~np.isnan(by)
        if not known.any():
            continue
        better, worse = int((by > 0).sum()), int((by < 0).sum())
        differences[metric] = Difference(
            float(was[known].mean()), float(is_[known].mean()), bootstrap(by), better, worse
        )
        changed += [
            Changed(
                metric,
                float(by[place]),
                before.predictions[old[place]],
                now.predictions[new[place]],
            )
            for place in np.flatnonzero(known & (by != 0))
        ]
    random.Random(0).shuffle(changed)  # among equals
    changed.sort(key=lambda change: -abs(change.by))
    seen: set[int] = set()  # several metrics may tell of one row
    return differences, [
        c
        for c in changed
        if not (c.now.conversation.index in seen or seen.add(c.now.conversation.index))
    ]
