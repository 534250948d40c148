"""Suggests metrics for a test set from the form of its expected answers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from qwenvl_lit.metrics.boxes import has_points
from qwenvl_lit.metrics.per_sample import has_boxes, has_words
from qwenvl_lit.metrics.vqa_accuracy import MIN_PEOPLE
from qwenvl_lit.types import Conversation

INSPECTED_ROWS = 500
MIN_SHARE = 0.2  # of the rows that a kind of answer must have to be mentioned
LONG = 5  # words; an answer with more is a sentence
_NUMBER = re.compile(r"[$€£]?-?\d[\d.,]*%?")
_BY_KIND: dict[str, list[tuple[str, str]]] = {
    "options": [("choice", "the rows have options to choose from")],
    "boxes": [
        ("grounding", "the answers are boxes"),
        ("click", "or the center of a box has to lie in the expected box, as for clicks"),
    ],
    "points": [("exact", "the answers are points; metrics=click needs boxes in their place")],
    "words and boxes": [
        ("grounding", "the answers have boxes; the first one is compared"),
        ("caption", "and their words, without the boxes"),
    ],
    "sentences": [("caption", "the answers are sentences")],
    "numbers": [
        ("chartqa", "the answers are numbers; 5 % deviation is allowed"),
        ("exact", "or every character has to match"),
    ],
    "yes or no": [
        ("yes_no", "the answers are yes or no"),
        ("exact", "or every character has to match"),
    ],
    "people": [
        ("vqa", "the answers are short, several people answered"),
        ("docvqa", "or any reference counts, and a nearly right answer counts in part"),
    ],
    "words": [
        ("exact", "the answers are short; every character has to match"),
        ("docvqa", "or a nearly right answer counts in part, as for text read from an image"),
        ("gqa", "or the answer may stand in a sentence"),
    ],
}


def suggest_metrics(rows: Sequence[Conversation]) -> list[tuple[str, str]]:
    """Returns suitable files of conf/metrics, each with a reason.

    A mixed test set gets suggestions for each kind of answer, the most frequent kind first. The
    list is empty if no row has an expected answer.
    """
    inspected = [rows[index] for index in range(min(len(rows), INSPECTED_ROWS))]
    answered = [row for row in inspected if row.answer or row.references]
    kinds = Counter(map(_kind, answered))
    suggestions: dict[str, str] = {}
    for kind, count in kinds.most_common():
        if count < MIN_SHARE * len(answered):
            continue
        share = f" ({count} of {len(answered)} rows)" if len(kinds) > 1 else ""
        for metrics, why in _BY_KIND[kind]:
            suggestions.setdefault(metrics, f"{why}{share}")
    return list(suggestions.items())


def _kind(row: Conversation) -> str:
    if row.options:
        return "options"
    parts = row.answer.parts if row.answer else ()
    if has_points(parts):
        return "points"
    if has_boxes(parts):
        return "words and boxes" if has_words(parts) else "boxes"
    texts = _texts(row)
    if len(texts[0].split()) > LONG:
        return "sentences"
    if _NUMBER.fullmatch(texts[0].strip()):
        return "numbers"
    if len(texts) >= MIN_PEOPLE:
        return "people"
    words = {text.strip().lower() for text in texts}
    return "yes or no" if words in ({"yes"}, {"no"}) else "words"


def _texts(row: Conversation) -> tuple[str, ...]:
    """Returns the references of a row. Without references, returns its expected answer as text."""
    if row.references or row.answer is None:
        return row.references
    return ("".join(part for part in row.answer.parts if isinstance(part, str)),)
