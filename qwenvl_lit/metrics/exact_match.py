"""Exact match: the answer is right when it is, character by character, an expected one."""

from __future__ import annotations

from collections.abc import Sequence

from qwenvl_lit.metrics.sample_mean import SampleMean
from qwenvl_lit.types import Prediction


def exact_match(text: str, answers: Sequence[str]) -> bool:
    """Whether `text` equals one of `answers`; white space around either does not count, case and punctuation do.

    >>> exact_match("two ", ["2", "two"]), exact_match("Two", ["2", "two"])
    (True, False)
    """
    return text.strip() in {answer.strip() for answer in answers}


class ExactMatch(SampleMean):
    """Share of answers that equal the expected one or one of the row's references.

    The whole answer is compared in the family's markup, boxes included, as `eval_mm` of Qwen-VL does for AI2D and OCR-VQA
    (there without boxes; OCR-VQA lower-cased first).
    """

    needs = "expected answer"

    def score(self, prediction: Prediction) -> float | None:
        expected = () if prediction.reference is None else (prediction.reference,)
        answers = (*expected, *prediction.conversation.references)
        return float(exact_match(prediction.text, answers)) if answers else None
