"""Accuracy on multiple choice, where the answer is the letter of an option."""

from __future__ import annotations

import re

from qwenvl_lit.metrics.sample_mean import SampleMean
from qwenvl_lit.metrics.sample_rows import reference_texts, said
from qwenvl_lit.types import Prediction

_LETTER = re.compile(
    r"\s*(?:(?:(?i:the\s+)?(?i:correct\s+)?(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*)?\(?([A-Za-z])(?:\)|[.:](?!\w)|,?\s*$)"
    r"|(?i:(?:the\s+)?(?:correct\s+)?(?:answer|option|choice)(?:\s+is)?)\s*:?\s*\(?([A-Z])\b)"
)


def chosen_letter(text: str) -> str | None:
    """The letter that an answer begins with, alone or marked as one: `B`, `b.`, `(B)`, `B: a dog`, `Answer: B`, `The answer is B`.

    None if there is no such letter; the article of `A dog` is none.

    >>> [chosen_letter(text) for text in ("B", "(b) two", "C. a dog", "The answer is D because", "A dog", "Both")]
    ['B', 'B', 'C', 'D', None, None]
    """
    found = _LETTER.match(text)
    return (found[1] or found[2]).upper() if found else None


class ChoiceAccuracy(SampleMean):
    """Share of answers that choose the expected letter; an answer without a letter is wrong."""

    needs = "expected letter"

    def score(self, prediction: Prediction) -> float | None:
        expected = {chosen_letter(answer) for answer in reference_texts(prediction)} - {None}
        return float(chosen_letter(said(prediction)) in expected) if expected else None
