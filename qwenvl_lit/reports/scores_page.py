"""Scores as one HTML page that needs no server, no network and no script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qwenvl_lit.rendering.drawing import draw_prediction
from qwenvl_lit.rendering.text import images_with_boxes, prompt_text
from qwenvl_lit.reports.page import IMAGE_SIDE_PX, bars, embedded_image, page, table, text
from qwenvl_lit.reports.scores import (
    Changed,
    Mean,
    Scored,
    bootstrap,
    compare,
    extremes,
    first_scores,
    groups,
    in_order,
    ious,
)
from qwenvl_lit.types import BadImage, Prediction

SHOWN = 6  # of the best, of the worst, and of those that changed, of each set
MOST_IMAGES = 4  # of a row
MOST_REFERENCES = 10
LEGEND = '<p class="faint">Boxes are <span class="predicted">solid</span> as predicted, <span class="expected">dashed</span> as expected.</p>'


@dataclass(frozen=True, kw_only=True, slots=True)
class Earlier:
    """Another run's answers to the same sets."""

    name: str
    sets: Mapping[str, Scored]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a page tells."""

    title: str
    sets: Sequence[Scored]
    published: Sequence[Mapping[str, str]] = ()  # rows of the table of benchmarks
    notes: Sequence[str] = ()
    earlier: Sequence[Earlier] = field(default=())


def write_report(report: Report, file: Path) -> None:
    """The page: scores, comparisons, and for each set groups, boxes, and its worst and best answers."""
    file.write_text(page(report.title, _body(report)), encoding="utf-8")


def _body(report: Report) -> Iterator[str]:
    yield f"<h1>{text(report.title)}</h1>"
    yield from (f'<p class="bad">{text(note)}</p>' for note in report.notes)
    if report.published:
        yield "<h2>Benchmarks</h2>" + table(report.published, left=("benchmark", "metric"))
    scores = [_score_row(scored, metric) for scored in report.sets for metric in scored.totals]
    if scores:
        yield "<h2>Scores</h2>" + table(scores, left=("set", "metric"))
        yield '<p class="faint">The interval tells how far the score may move with other rows of the same kind (bootstrap over rows).</p>'
    for scored in report.sets:
        if scored.unanswered:
            yield f'<p class="bad">{scored.unanswered:,} rows of {text(scored.name)} have no answer and do not count.</p>'
    for other in report.earlier:
        yield from _comparison(other, report.sets)
    for scored in report.sets:
        yield f"<h2>{text(scored.name)}</h2>"
        yield from _set(scored)


def _score_row(scored: Scored, metric: str) -> dict[str, str]:
    mean = scored.mean(metric)
    return {
        "set": scored.name,
        "metric": metric,
        "score": _number(mean.value),
        "95 % interval": _range(mean),
        "rows": f"{mean.rows:,}",
    }


def _set(scored: Scored) -> Iterator[str]:
    by = groups(scored.predictions)
    for metric in filter(scored.is_mean, scored.totals):
        rows = []
        for title, labels in by.items():
            for label in in_order(labels):
                mean = bootstrap(scored.scores[metric][labels == label])
                if mean.rows:
                    group = {
                        "by": title,
                        "group": label,
                        metric: _number(mean.value),
                        "95 % interval": _range(mean),
                    }
                    rows.append({**group, "rows": f"{mean.rows:,}"})
        rows = [row for row in rows if sum(other["by"] == row["by"] for other in rows) > 1]
        if rows:
            yield f"<h3>{text(metric)} by group</h3>" + table(rows, left=("by", "group"))
    overlaps = ious(scored.predictions)
    if len(overlaps):
        counts, edges = np.histogram(overlaps, bins=20, range=(0, 1))
        said = [
            (f"IoU {low:.2f} to {high:.2f}", int(count))
            for low, high, count in zip(edges, edges[1:], counts, strict=False)
        ]
        yield "<h3>Overlap of boxes</h3>"
        yield (
            '<div class="plots">'
            + bars(said, ends=("0", "1"), what="rows", caption="IoU of the first predicted box")
            + "</div>"
        )
    worst, best = extremes(scored, SHOWN)
    values = first_scores(scored)
    for heading, places in (("Worst answers", worst), ("Best answers", best)):
        if places:
            yield f"<h3>{heading}</h3>{LEGEND}"
            for place in places:
                yield _example(scored.predictions[place], f"score {_number(values[place])}")


def _comparison(other: Earlier, sets: Sequence[Scored]) -> Iterator[str]:
    rows, shown = [], []
    for now in sets:
        if now.name not in other.sets:
            continue
        differences, changed = compare(other.sets[now.name], now)
        for metric, found in differences.items():
            row = {
                "set": now.name,
                "metric": metric,
                "before": _number(found.before),
                "now": _number(found.now),
            }
            row |= {
                "difference": f"{found.change.value:+.3f}",
                "95 % interval": _range(found.change, signed=True),
            }
            rows.append(
                row
                | {
                    "better": f"{found.better:,}",
                    "worse": f"{found.worse:,}",
                    "rows": f"{found.change.rows:,}",
                }
            )
        for up in (False, True):
            shown += [(now.name, change) for change in changed if (change.by > 0) == up][:SHOWN]
    yield f"<h2>Against {text(other.name)}</h2>"
    if not rows:
        yield "<p>The two have no rows in common that can be compared.</p>"
        return
    yield table(rows, left=("set", "metric"))
    yield '<p class="faint">Differences are taken row by row, on rows that both answered; an interval without 0 is more than chance.</p>'
    for heading, some in (
        ("Worse now", [s for s in shown if s[1].by < 0]),
        ("Better now", [s for s in shown if s[1].by > 0]),
    ):
        if some:
            yield f"<h3>{heading}</h3>"
            yield from (
                _example(change.now, f"{name}: {_said(change)}", before=change.before)
                for name, change in some
            )


def _said(change: Changed) -> str:
    return f"{change.metric} {change.by:+.3f}"


def _example(prediction: Prediction, said: str, *, before: Prediction | None = None) -> str:
    conversation = prediction.conversation
    expected = [prediction.reference] if prediction.reference is not None else []
    expected += [
        reference
        for reference in dict.fromkeys(conversation.references)
        if reference not in expected
    ]
    columns = {"Before": before.text} if before else {}
    boxed = '<h3 class="predicted">', '<h3 class="expected">'
    answers = "".join(
        f"<div><h3>{title}</h3><pre>{text(words)}</pre></div>" for title, words in columns.items()
    )
    answers += f"<div>{boxed[0]}Prediction</h3><pre>{text(prediction.text)}</pre></div>"
    if expected:
        answers += f"<div>{boxed[1]}Expected</h3><pre>{text(chr(10).join(expected[:MOST_REFERENCES]))}</pre></div>"
    return (
        f'<section class="example"><header><b>{text(conversation.id)}</b> <span class="faint">{text(said)}</span></header>'
        f'<div class="images">{"".join(_images(prediction))}</div>'
        f'<div class="words"><pre>{text(prompt_text(conversation))}</pre><div class="answers">{answers}</div></div></section>'
    )


def _images(prediction: Prediction) -> Iterator[str]:
    """Those with boxes, else all; the predicted boxes solid, the expected ones dashed."""
    shown = images_with_boxes(prediction) or range(len(prediction.conversation.images))
    for number in list(shown)[:MOST_IMAGES]:
        try:
            yield embedded_image(draw_prediction(prediction, number, largest_side_px=IMAGE_SIDE_PX))
        except BadImage as fault:  # it may have been here when the question was answered, and is not needed for the scores
            yield f'<p class="bad">{text(str(fault))}</p>'


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{round(value, 6):.3f}"


def _range(mean: Mean, *, signed: bool = False) -> str:
    return (
        "–"
        if np.isnan(mean.low)
        else " to ".join(f"{value:{'+' if signed else ''}.3f}" for value in (mean.low, mean.high))
    )
