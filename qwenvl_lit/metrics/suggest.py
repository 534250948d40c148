"""Suggests metrics for a test set from the form of its expected answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from qwenvl_lit.metrics.vqa_accuracy import MIN_PEOPLE
from qwenvl_lit.types import Conversation, GroundedObject

INSPECTED_ROWS = 500
_NUMBER = re.compile(r"[$€£]?-?\d[\d.,]*%?")


def suggest_metrics(rows: Sequence[Conversation]) -> list[tuple[str, str]]:
    """Returns suitable files of conf/metrics, the best one first, each with a reason.

    The list is empty if no row has an expected answer.
    """
    inspected = [rows[index] for index in range(min(len(rows), INSPECTED_ROWS))]
    answered = [row for row in inspected if row.answer or row.references]
    if not answered:
        return []
    if any(row.options for row in answered):
        return [("choice", "the rows have options to choose from")]
    if _most(map(_has_box, answered)):
        return [("grounding", "the answers are boxes")]
    texts = list(map(_texts, answered))
    first_texts = [references[0] for references in texts]
    words = sum(len(text.split()) for text in first_texts) / len(texts)
    if words > 5:
        return [("caption", f"the answers are sentences, {words:.0f} words on average")]
    if _most(_NUMBER.fullmatch(text.strip()) for text in first_texts):
        return [
            ("chartqa", "the answers are numbers; 5 % deviation is allowed"),
            ("exact", "or every character has to match"),
        ]
    if _most(len(references) >= MIN_PEOPLE for references in texts):
        return [
            ("vqa", "the answers are short, several people answered"),
            ("docvqa", "or any reference counts, and a nearly right answer counts in part"),
        ]
    return [
        ("exact", "the answers are short; every character has to match"),
        ("docvqa", "or a nearly right answer counts in part, as for text read from an image"),
        ("gqa", "or the answer may stand in a sentence"),
    ]


def _most(facts: Iterable[object]) -> bool:
    """Returns whether more than half of `facts` are true."""
    facts = list(map(bool, facts))
    return sum(facts) > len(facts) / 2


def _has_box(row: Conversation) -> bool:
    parts = row.answer.parts if row.answer else ()
    return any(isinstance(part, GroundedObject) and part.boxes for part in parts)


def _texts(row: Conversation) -> tuple[str, ...]:
    """Returns the references of a row. Without references, returns its expected answer as text."""
    if row.references or row.answer is None:
        return row.references
    return ("".join(part for part in row.answer.parts if isinstance(part, str)),)
