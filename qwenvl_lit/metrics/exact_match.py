"""Exact match: the answer is right when it is, character by character, an expected one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwenvl_lit.metrics.sample_mean import SampleMean
from qwenvl_lit.types import Prediction


def exact_match(text: str, answers: Sequence[str], *, ignore_case: bool = False) -> bool:
    """Whether `text` equals one of `answers`; white space around either does not count, case does unless told otherwise.

    >>> exact_match("two ", ["2", "two"]), exact_match("Two", ["2", "two"]), exact_match("Two", ["2", "two"], ignore_case=True)
    (True, False, True)
    """
    changed = str.lower if ignore_case else str
    return changed(text.strip()) in {changed(answer.strip()) for answer in answers}


class ExactMatch(SampleMean):
    """Share of answers that equal the expected one or one of the row's references, in the family's markup, boxes included.

    Args:
        ignore_case: as Qwen-VL's `eval_mm` does for AI2D and OCR-VQA.
    """

    needs = "expected answer"

    def __init__(
        self, ignore_case: bool = False, *, where: Mapping[str, str | Sequence[str]] | None = None
    ):
        super().__init__(where=where)
        self.ignore_case = ignore_case

    def score(self, prediction: Prediction) -> float | None:
        expected = () if prediction.reference is None else (prediction.reference,)
        answers = (*expected, *prediction.conversation.references)
        return (
            float(exact_match(prediction.text, answers, ignore_case=self.ignore_case))
            if answers
            else None
        )
