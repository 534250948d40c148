"""Writes an HTML page with scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from qwenvl_lit.atomic import write_text
from qwenvl_lit.models.chatml import runs
from qwenvl_lit.models.protocols import Processor
from qwenvl_lit.rendering.drawing import draw_prediction, label_list, objects_in
from qwenvl_lit.rendering.text import images_with_boxes, prompt_text
from qwenvl_lit.reports.page import (
    IMAGE_SIDE_PX,
    embedded_image,
    example,
    histogram_figure,
    labels,
    page,
    paragraph,
    table,
    text,
)
from qwenvl_lit.reports.scores import (
    ChangedRow,
    Difference,
    Mean,
    ScoredSet,
    bootstrap,
    compare,
    extremes,
    first_scores,
    group_predictions,
    ious,
    sorted_groups,
)
from qwenvl_lit.terminal import counted
from qwenvl_lit.types import BadImage, Conversation, Prediction

# Examples per test set in each list: worst answers, best answers, worse now, better now.
MAX_EXAMPLES = 6
MAX_IMAGES = 4  # images per example
MAX_REFERENCES = 10  # references per example
INTERVAL = "95 % interval"
LEGEND = paragraph(
    'Predicted boxes are <span class="predicted">solid</span>, '
    'expected boxes are <span class="expected">dashed</span>.',
    "faint",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlierRun:
    """The answers of another run to the same test sets."""

    name: str
    sets: Mapping[str, ScoredSet]
    left_out: Sequence[str] = ()  # sets that only this run has answered

    def not_compared(self, now: Iterable[ScoredSet]) -> list[str]:
        """Returns a sentence for each of the two runs that has answered sets alone."""
        sentences = []
        if self.left_out:
            sentences.append(f"Only {self.name} has answered {', '.join(self.left_out)}.")
        if unknown := [scored.name for scored in now if scored.name not in self.sets]:
            sentences.append(f"{self.name} has not answered {', '.join(unknown)}.")
        return sentences


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreReport:
    """The content of a page about scores."""

    title: str
    sets: Sequence[ScoredSet]
    published: Sequence[Mapping[str, str]] = ()  # rows of `benchmark_table`
    notes: Sequence[str] = ()
    earlier: Sequence[EarlierRun] = ()
    processor: Processor | None = None  # shows prompts as the model gets them; None: plain text


def write_report(report: ScoreReport, file: Path) -> None:
    """Writes a page with scores, comparisons with earlier runs, and details of each test set."""
    write_text(file, page(report.title, _body(report)))


def _body(report: ScoreReport) -> Iterator[str]:
    yield f"<h1>{text(report.title)}</h1>"
    for note in report.notes:
        yield paragraph(text(note), "bad")
    if report.published:
        yield "<h2>Benchmarks</h2>" + table(report.published, text_columns=["benchmark", "metric"])
    yield from _scores(report.sets)
    for scored in report.sets:
        if scored.unanswered:
            count = f"{counted(scored.unanswered, 'row')} of {text(scored.name)}"
            yield paragraph(f"Not counted: {count} without an answer.", "bad")
    for earlier in report.earlier:
        yield from _comparison(earlier, report)
    for scored in report.sets:
        yield f"<h2>{text(scored.name)}</h2>"
        yield from _scores_by_group(scored)
        yield from _overlaps(scored)
        yield from _extremes(scored, report.processor)


def _scores(sets: Sequence[ScoredSet]) -> Iterator[str]:
    rows = []
    for scored in sets:
        for metric in scored.totals:
            mean = scored.mean(metric)
            row = {"set": scored.name, "metric": metric, "score": _number(mean.value)}
            rows.append({**row, INTERVAL: _interval(mean), "rows": f"{mean.rows:,}"})
    if rows:
        yield "<h2>Scores</h2>" + table(rows, text_columns=["set", "metric"])
        yield paragraph(
            "The interval shows how much the score could differ on other rows of the same kind "
            "(bootstrap over rows).",
            "faint",
        )


def _scores_by_group(scored: ScoredSet) -> Iterator[str]:
    groupings = group_predictions(scored.predictions)
    for metric in filter(scored.is_mean, scored.totals):
        rows = []
        for title, names in groupings.items():
            group_rows = _group_rows(metric, scored.scores[metric], title, names)
            if len(group_rows) > 1:
                rows += group_rows
        if rows:
            yield f"<h3>{text(metric)} by group</h3>" + table(rows, text_columns=["by", "group"])


def _group_rows(
    metric: str, scores: np.ndarray, title: str, names: np.ndarray
) -> list[dict[str, str]]:
    """Returns a table row for each group that has scores."""
    rows = []
    for name in sorted_groups(names):
        mean = bootstrap(scores[names == name])
        if mean.rows:
            row = {"by": title, "group": name, metric: _number(mean.value)}
            rows.append({**row, INTERVAL: _interval(mean), "rows": f"{mean.rows:,}"})
    return rows


def _overlaps(scored: ScoredSet) -> Iterator[str]:
    overlaps = ious(scored.predictions)
    if not len(overlaps):
        return
    counts, edges = np.histogram(overlaps, bins=20, range=(0, 1))
    named_counts = []
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        named_counts.append((f"IoU {low:.2f} to {high:.2f}", int(count)))
    caption = "IoU of the first predicted box"
    figure = histogram_figure(named_counts, ends=("0", "1"), unit="rows", caption=caption)
    yield f'<h3>Overlap of boxes</h3><div class="plots">{figure}</div>'


def _extremes(scored: ScoredSet, processor: Processor | None) -> Iterator[str]:
    worst, best = extremes(scored, MAX_EXAMPLES)
    scores = first_scores(scored)
    parts = [("Worst answers", worst), ("Best answers", best)]
    if best and scores[best[0]] == scores[worst[0]]:
        parts = [("Some answers (all have the same score)", worst + best)]
    for heading, indices in parts:
        if indices:
            yield f"<h3>{heading}</h3>{LEGEND}"
        for index in indices:
            prediction, remark = scored.predictions[index], f"score {_number(scores[index])}"
            yield _example(prediction, remark, processor)


def comparison_rows(earlier: EarlierRun, sets: Iterable[ScoredSet]) -> list[dict[str, str]]:
    """Returns a table row for each score of `sets` that an earlier run has too."""
    rows = []
    for now in sets:
        if now.name in earlier.sets:
            differences, _ = compare(earlier.sets[now.name], now)
            for metric, difference in differences.items():
                rows.append(_difference_row(now.name, metric, difference))
    return rows


def _comparison(earlier: EarlierRun, report: ScoreReport) -> Iterator[str]:
    worse, better = [], []
    for now in report.sets:
        if now.name not in earlier.sets:
            continue
        _, changed = compare(earlier.sets[now.name], now)
        worse_rows = (row for row in changed if row.by < 0)
        worse += _changed_examples(now.name, worse_rows, report.processor)
        better_rows = (row for row in changed if row.by > 0)
        better += _changed_examples(now.name, better_rows, report.processor)
    yield f"<h2>Against {text(earlier.name)}</h2>"
    for sentence in earlier.not_compared(report.sets):
        yield paragraph(text(sentence))
    rows = comparison_rows(earlier, report.sets)
    if not rows:
        yield paragraph("The two runs have no rows in common that can be compared.")
        return
    yield table(rows, text_columns=["set", "metric"])
    yield paragraph(
        "Scores are those of the rows that both runs have answered. If the interval does not "
        "contain 0, the difference is unlikely to be chance. A score that is no mean over rows, "
        "such as BLEU, has no interval; its better and worse rows are counted by their own scores.",
        "faint",
    )
    for heading, shown in (("Worse now", worse), ("Better now", better)):
        if shown:
            yield f"<h3>{heading}</h3>"
            yield from shown


def _difference_row(set_name: str, metric: str, difference: Difference) -> dict[str, str]:
    return {
        "set": set_name,
        "metric": metric,
        "before": _number(difference.before),
        "now": _number(difference.now),
        "difference": f"{round(difference.change.value, 6):+.3f}",
        INTERVAL: _interval(difference.change, sign="+"),
        "better": f"{difference.better:,}",
        "worse": f"{difference.worse:,}",
        "rows": f"{difference.change.rows:,}",
    }


def _changed_examples(
    set_name: str, changed: Iterable[ChangedRow], processor: Processor | None
) -> list[str]:
    shown = []
    for row in islice(changed, MAX_EXAMPLES):
        remark = f"{set_name}: {row.metric} {row.by:+.3f}"
        shown.append(_example(row.now, remark, processor, before=row.before))
    return shown


def _example(
    prediction: Prediction,
    remark: str,
    processor: Processor | None,
    *,
    before: Prediction | None = None,
) -> str:
    conversation = prediction.conversation
    answers = ""
    if before:
        answers += _answer("<h3>Before</h3>", before.text)
    answers += _answer('<h3 class="predicted">Prediction</h3>', prediction.text)
    if expected := _expected_answers(prediction):
        listed = "\n".join(expected[:MAX_REFERENCES])
        answers += _answer('<h3 class="expected">Expected</h3>', listed)
    prompt = f"<pre>{text(_prompt(conversation, processor))}</pre>"
    header = f'<b>{text(conversation.id)}</b> <span class="faint">{text(remark)}</span>'
    words = f'{prompt}<div class="answers">{answers}</div>'
    return example(header, "".join(_images(prediction)), words)


def _prompt(conversation: Conversation, processor: Processor | None) -> str:
    """Returns the prompt as the model gets it, with all markup.

    It is plain text without a processor, or if an image has been deleted since: the page says so
    beside it.
    """
    if processor is None:
        return prompt_text(conversation)
    try:
        sample = processor.encode(conversation, prompt=True)
    except BadImage:
        return prompt_text(conversation)
    ids, labels = sample.input_ids.tolist(), sample.labels.tolist()
    return "".join(run for run, _ in runs(ids, labels, processor.text))


def _answer(heading: str, content: str) -> str:
    return f"<div>{heading}<pre>{text(content)}</pre></div>"


def _expected_answers(prediction: Prediction) -> list[str]:
    """Returns the distinct texts of the expected answer and the references."""
    texts = [*prediction.conversation.references]
    if prediction.reference is not None:
        texts.insert(0, prediction.reference)
    return list(dict.fromkeys(texts))


def _images(prediction: Prediction) -> Iterator[str]:
    """Yields the images with boxes as HTML, or all images if none has boxes."""
    shown = images_with_boxes(prediction) or range(len(prediction.conversation.images))
    for index in shown[:MAX_IMAGES]:
        try:
            image = draw_prediction(prediction, index, largest_side_px=IMAGE_SIDE_PX)
        except BadImage as error:
            # The image may have been deleted after the model answered. Scores do not depend on it.
            yield paragraph(text(str(error)), "bad")
        else:
            yield embedded_image(image) + _labels(prediction, index)


def _labels(prediction: Prediction, image: int) -> str:
    """Returns the labels of the predicted and the expected boxes in an image as HTML."""
    reference = prediction.conversation.answer
    expected = reference.parts if reference else ()
    html = ""
    for parts, style in ((prediction.parts, "predicted"), (expected, "expected")):
        html += labels(label_list(objects_in(parts, image)), style)
    return html


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{round(value, 6):.3f}"


def _interval(mean: Mean, *, sign: str = "-") -> str:
    """Formats an interval. With `sign="+"`, positive numbers have a sign as well."""
    if np.isnan(mean.low):
        return "–"
    return f"{mean.low:{sign}.3f} to {mean.high:{sign}.3f}"
