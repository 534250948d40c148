"""Analyzes scores: by row, by group, with confidence intervals, and between two runs."""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qwenvl_lit.data.predictions import prediction_rows
from qwenvl_lit.metrics.boxes import (
    expected_boxes,
    expects_points,
    first_box,
    first_box_iou,
    has_points,
)
from qwenvl_lit.metrics.per_sample import PerSampleMetric, has_boxes, sample_key
from qwenvl_lit.models.protocols import Processor
from qwenvl_lit.types import Conversation, DataError, Prediction

RESAMPLES = 1000
CONFIDENCE = 0.95
MAX_GROUPS = 12  # a column with more distinct values identifies rows and does not group them

Rows = Sequence[Conversation]


class Mean(NamedTuple):
    """A mean score over rows, with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredSet:
    """The answers to one test set, with their scores by metric."""

    name: str
    predictions: Sequence[Prediction]
    totals: Mapping[str, float]  # metric -> score of the test set
    scores: Mapping[str, np.ndarray]  # metric -> score of each prediction, NaN if it is not counted
    metrics: Mapping[str, PerSampleMetric]  # those in `totals`
    unanswered: int = 0  # number of rows of the test set without a prediction

    def is_mean(self, metric: str) -> bool:
        """Returns whether the score is the mean over rows. BLEU, for example, is not."""
        mean = np.nanmean(self.scores[metric])
        return bool(np.isclose(mean, self.totals[metric], rtol=1e-5, atol=1e-7))

    def score_of_rows(self, metric: str, indices: np.ndarray) -> float:
        """Returns the score of some of the predictions, all of which are counted."""
        if self.is_mean(metric):
            return float(self.scores[metric][indices].mean())
        score, _ = self.metrics[metric].evaluate([self.predictions[index] for index in indices])
        return score

    def mean(self, metric: str) -> Mean:
        """Returns a score. Its interval is NaN if the score is not a mean over rows."""
        mean = bootstrap(self.scores[metric])._replace(value=self.totals[metric])
        if not self.is_mean(metric):
            return mean._replace(low=np.nan, high=np.nan)
        return mean


class Difference(NamedTuple):
    """The change of a metric between two runs, on the rows that both have answered."""

    before: float
    now: float
    change: Mean  # its interval is NaN if the score is not a mean over rows
    better: int  # number of rows whose score is higher now
    worse: int  # number of rows whose score is lower now


class ChangedRow(NamedTuple):
    """A row whose score by `metric` changed between two runs."""

    metric: str
    by: float
    before: Prediction
    now: Prediction


def bootstrap(values: np.ndarray, *, seed: int = 0) -> Mean:
    """Returns the mean of all values except NaN, with its percentile bootstrap interval.

    >>> bootstrap(np.array([0.0, 1.0, 1.0, 1.0, np.nan]))
    Mean(value=0.75, low=0.25, high=1.0, rows=4)
    """
    values = values[~np.isnan(values)]
    count = len(values)
    if not count:
        return Mean(np.nan, np.nan, np.nan, 0)
    # Only the number of times that a resample has each distinct value matters.
    distinct, counts = np.unique(values, return_counts=True)
    generator = np.random.default_rng(seed)
    resamples = generator.multinomial(count, counts / count, size=RESAMPLES)
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    low, high = np.quantile(resamples @ distinct / count, tails)
    return Mean(float(values.mean()), float(low), float(high), count)


def read_answer_texts(file: Path) -> dict[str, dict[int, tuple[str, str]]]:
    """Reads row id and text of the answers in a `predictions.jsonl`, by test set and row index.

    Raises:
        DataError: the file has no rows, or `prediction_rows` raises the error.
    """
    answers_by_set: dict[str, dict[int, tuple[str, str]]] = {}
    for row in prediction_rows(file):
        answers_of_set = answers_by_set.setdefault(row["set"], {})
        answers_of_set[row["index"]] = (row["id"], row["prediction"])
    if not answers_by_set:
        raise DataError(f"predictions={file} has no rows")
    return answers_by_set


def read_predictions(
    file: Path, sets: Mapping[str, Rows], processor: Processor
) -> dict[str, list[Prediction]]:
    """Reads the predictions in a `predictions.jsonl`, by test set and sorted by row index.

    Raises:
        DataError: as `answered_rows`.
    """
    predictions: dict[str, list[Prediction]] = {}
    for name, row, text in answered_rows(file, sets):
        predictions.setdefault(name, []).append(processor.read(text, row))
    return predictions


def answered_rows(file: Path, sets: Mapping[str, Rows]) -> Iterator[tuple[str, Conversation, str]]:
    """Yields test set, row and text of the answers in a `predictions.jsonl`, sorted by row index.

    Answers to sets that are not in `sets` are left out.

    Raises:
        DataError: the file has no answers to `sets`, or to rows that are not in a set, or
            `read_answer_texts` raises the error.
    """
    answers_by_set = read_answer_texts(file)
    if answers_by_set.keys().isdisjoint(sets):
        raise DataError(
            f"{file} answers the sets {', '.join(answers_by_set)}, the data has {', '.join(sets)}; "
            "choose the data= with which the answers were generated (data.test={NAME: FILE} names "
            "a set)"
        )
    for name, answers_of_set in answers_by_set.items():
        if name not in sets:
            continue
        for index, (row_id, text) in sorted(answers_of_set.items()):
            source = f"{file}: row {index} of {name}"
            yield name, _row(sets[name], index, row_id, source=source), text


def _row(rows: Rows, index: int, row_id: str, *, source: str) -> Conversation:
    """Returns the row at `index`.

    Raises:
        DataError: the row does not exist or has another id. The message begins with `source`.
    """
    state = "does not exist"
    if 0 <= index < len(rows):
        row = rows[index]
        if row.id == row_id:
            return replace(row, index=index)
        state = f"is {row.id!r}"
    raise DataError(
        f"{source} is {row_id!r}, which {state} in the data; "
        "choose the data= with which the answers were generated"
    )


def score_set(
    name: str,
    predictions: Sequence[Prediction],
    metrics: Mapping[str, PerSampleMetric],
    *,
    rows: int | None = None,
) -> ScoredSet:
    """Scores the answers to the test set `name`.

    Metrics that cannot score any row are left out, as in the `test` command.

    Args:
        rows: the number of rows of the test set, if rows without answers are to be counted.
    """
    totals, scores, scoring = {}, {}, {}
    for title, metric in metrics.items():
        metric.title = f"{name}/{title}"
        total, row_scores = metric.evaluate(predictions)
        total = float(np.float32(total))  # rounded as Lightning logs it
        if np.isfinite(total):
            totals[title], scoring[title] = total, metric
            scores[title] = _scores_of(predictions, row_scores)
    return ScoredSet(
        name=name,
        predictions=predictions,
        totals=totals,
        scores=scores,
        metrics=scoring,
        unanswered=0 if rows is None else rows - len(predictions),
    )


def _scores_of(predictions: Sequence[Prediction], row_scores: Mapping[int, float]) -> np.ndarray:
    """Returns the score of each prediction.

    The score is NaN if the prediction is not counted or a later prediction has the same row id.
    """
    last_of_id = {row.conversation.id: index for index, row in enumerate(predictions)}
    values = np.full(len(predictions), np.nan)
    for row_id, index in last_of_id.items():
        values[index] = row_scores.get(sample_key(row_id), np.nan)
    return values


def group_predictions(predictions: Sequence[Prediction]) -> dict[str, np.ndarray]:
    """Groups predictions in several ways: by each column of the data and by properties of rows.

    Returns:
        A mapping from the title of a grouping to the group name of each prediction. The name is ""
        if the prediction is in no group. Groupings with fewer than two or more than `MAX_GROUPS`
        groups are left out.
    """
    columns: set[str] = set()
    for prediction in predictions:
        columns.update(prediction.conversation.columns)
    groupings: dict[str, list[str]] = {}
    for column in sorted(columns):
        groupings[column] = [row.conversation.columns.get(column, "") for row in predictions]
    rows = [prediction.conversation for prediction in predictions]
    groupings["images"] = [str(len(row.images)) for row in rows]
    groupings["words of the expected answer"] = list(map(_words_group, predictions))
    groupings["box, % of the image"] = list(map(_area_group, predictions))
    groupings["choices"] = [str(len(row.options) or "") for row in rows]

    useful = {}
    for title, names in groupings.items():
        if 2 <= len(set(names) - {""}) <= MAX_GROUPS:
            useful[title] = np.array(names, dtype=object)
    return useful


def sorted_groups(names: Iterable[str]) -> list[str]:
    """Returns distinct groups: numbers and intervals by size, then names in alphabetical order."""
    return sorted(set(names) - {""}, key=_group_order)


def _group_order(name: str) -> tuple[bool, float, str]:
    number = re.match(r"[0-9]+(?:\.[0-9]+)?(?=[ –]|$)", name)
    if number:
        return False, float(number[0]), ""
    return True, 0.0, name


def _words_group(prediction: Prediction) -> str:
    """Returns the interval of the number of words in the expected answer.

    Returns "" without an expected answer, or if the expected answer has boxes.
    """
    answer = prediction.conversation.answer
    if answer is None:
        return ""
    if has_boxes(answer.parts):
        return ""
    words = len((prediction.reference or "").split())
    first, last = _interval(words, (1, 2, 4, 8, 16))
    if last is None:
        return f"{first} and more"
    return f"{first}" if last == first + 1 else f"{first}–{last - 1}"


def _area_group(prediction: Prediction) -> str:
    """Returns the interval of the area of the first expected box in percent, or "" without box."""
    box = first_box(expected_boxes(prediction))
    if box is None or expects_points(prediction):
        return ""
    area = 100 * abs((box.x1 - box.x0) * (box.y1 - box.y0))
    low, high = _interval(area, (0, 1, 5, 20, 50))
    return f"{low} and more" if high is None else f"{low}–{high}"


def _interval(value: float, starts: Sequence[int]) -> tuple[int, int | None]:
    """Returns the start of the interval that contains `value`, and of the next one if it exists."""
    index = max(0, bisect_right(starts, value) - 1)
    if index == len(starts) - 1:
        return starts[index], None
    return starts[index], starts[index + 1]


def ious(predictions: Sequence[Prediction]) -> np.ndarray:
    """Returns the IoU of the first predicted and expected box of each row with an expected box.

    Answers with points have none.
    """
    values = [first_box_iou(each) for each in predictions if not has_points(each.parts)]
    return np.array([value for value in values if value is not None])


def extremes(scored: ScoredSet, count: int, *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Returns the indices of the `count` worst and the `count` best answers.

    Answers are ranked by `first_scores`, and answers with equal scores in random order. No index is
    in both lists.
    """
    values = first_scores(scored)
    known = np.random.default_rng(seed).permutation(np.flatnonzero(~np.isnan(values)))
    ranked = known[np.argsort(values[known], kind="stable")].tolist()
    half = len(ranked) // 2
    worst = ranked[: min(count, len(ranked) - half)]
    best = ranked[::-1][: min(count, half)]
    return worst, best


def first_scores(scored: ScoredSet) -> np.ndarray:
    """Returns the score of each answer by the first metric that scores it."""
    values = np.full(len(scored.predictions), np.nan)
    for metric_scores in scored.scores.values():
        values = np.where(np.isnan(values), metric_scores, values)
    return values


def compare(before: ScoredSet, now: ScoredSet) -> tuple[dict[str, Difference], list[ChangedRow]]:
    """Compares two runs on the rows that both have answered.

    Returns:
        The difference by metric, and the changed rows, those with the largest change first. If a
        row has changed by several metrics, only its largest change is listed.
    """
    before_indices, now_indices = _common_rows(before.predictions, now.predictions)
    differences: dict[str, Difference] = {}
    changed: list[ChangedRow] = []
    for metric in now.scores:
        if metric not in before.scores:
            continue
        old = before.scores[metric][before_indices]
        new = now.scores[metric][now_indices]
        change = new - old
        known = ~np.isnan(change)
        if not known.any():
            continue
        old_score = before.score_of_rows(metric, before_indices[known])
        new_score = now.score_of_rows(metric, now_indices[known])
        mean_change = bootstrap(change)
        if not (before.is_mean(metric) and now.is_mean(metric)):
            mean_change = Mean(new_score - old_score, np.nan, np.nan, mean_change.rows)
        differences[metric] = Difference(
            before=old_score,
            now=new_score,
            change=mean_change,
            better=int((change > 0).sum()),
            worse=int((change < 0).sum()),
        )
        for index in np.flatnonzero(known & (change != 0)):
            old_prediction = before.predictions[before_indices[index]]
            new_prediction = now.predictions[now_indices[index]]
            row = ChangedRow(metric, float(change[index]), old_prediction, new_prediction)
            changed.append(row)
    random.Random(0).shuffle(changed)  # the sort is stable, so ties are in random order
    changed.sort(key=lambda row: -abs(row.by))
    return differences, _first_of_each_row(changed)


def _common_rows(
    before: Sequence[Prediction], now: Sequence[Prediction]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices in `before` and in `now` of rows that are in both."""
    index_before = {row.conversation.index: index for index, row in enumerate(before)}
    before_indices, now_indices = [], []
    for index, prediction in enumerate(now):
        if prediction.conversation.index in index_before:
            before_indices.append(index_before[prediction.conversation.index])
            now_indices.append(index)
    return np.array(before_indices, dtype=int), np.array(now_indices, dtype=int)


def _first_of_each_row(changed: Iterable[ChangedRow]) -> list[ChangedRow]:
    """Returns the first change of each row, because several metrics may have changed."""
    by_index: dict[int, ChangedRow] = {}
    for row in changed:
        by_index.setdefault(row.now.conversation.index, row)
    return list(by_index.values())
