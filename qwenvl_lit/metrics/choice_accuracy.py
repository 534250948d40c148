"""Accuracy on multiple-choice questions whose expected answer is the letter of an option."""

from __future__ import annotations

import re

from qwenvl_lit.metrics.per_sample import answer_text, reference_texts
from qwenvl_lit.metrics.sample_mean import SampleMean
from qwenvl_lit.types import Prediction

_INTRODUCTION = r"(?i:(?:the\s+)?(?:correct\s+)?(?:answer|option|choice)(?:\s+is)?)\s*:?\s*"
_LETTER = re.compile(
    r"\s*(?:"
    rf"(?:{_INTRODUCTION})?\(?([A-Za-z])(?:\)|[.:](?!\w)|,?\s*$)"  # "b.", "(B)", "Answer: b"
    rf"|{_INTRODUCTION}\(?([A-Z])\b"  # "The answer is B because"
    r")"
)


def chosen_letter(text: str) -> str | None:
    """Returns the option letter with which an answer begins, in upper case, or None.

    The letter stands alone or is marked as a choice: `B`, `b.`, `(B)`, `B: a dog`, `Answer: B`,
    `The answer is B`. The article in `A dog` is not an option letter.

    >>> [chosen_letter(text) for text in ("B", "(b) two", "C. a dog", "The answer is D because")]
    ['B', 'B', 'C', 'D']
    >>> [chosen_letter(text) for text in ("A dog", "Both")]
    [None, None]
    """
    match = _LETTER.match(text)
    if match is None:
        return None
    return (match[1] or match[2]).upper()


class ChoiceAccuracy(SampleMean):
    """Fraction of answers with the expected letter. An answer without a letter is wrong."""

    needs = "expected letter"

    def score(self, prediction: Prediction) -> float | None:
        expected = {chosen_letter(text) for text in reference_texts(prediction)} - {None}
        if not expected:
            return None
        return float(chosen_letter(answer_text(prediction)) in expected)
