"""Exact match: an answer is correct if it is the same text as an expected answer."""

from __future__ import annotations

from collections.abc import Sequence

from qwenvl_lit.metrics.per_sample import Where
from qwenvl_lit.metrics.sample_mean import SampleMean
from qwenvl_lit.types import Prediction


def exact_match(text: str, references: Sequence[str], *, ignore_case: bool = False) -> bool:
    """Returns whether `text` equals one of `references`, ignoring white space around them.

    >>> exact_match("two ", ["2", "two"]), exact_match("Two", ["2", "two"])
    (True, False)
    >>> exact_match("Two", ["2", "two"], ignore_case=True)
    True
    """
    normalize = str.lower if ignore_case else str
    return normalize(text.strip()) in {normalize(other.strip()) for other in references}


class ExactMatch(SampleMean):
    """Fraction of answers that equal the expected answer or one of the row's references.

    Answers are compared as text, including the family's box markup.

    Args:
        ignore_case: ignore case, as `eval_mm` of Qwen-VL does for AI2D and OCR-VQA.
    """

    needs = "expected answer"

    def __init__(self, ignore_case: bool = False, *, where: Where | None = None):
        super().__init__(where=where)
        self.ignore_case = ignore_case

    def score(self, prediction: Prediction) -> float | None:
        references = list(prediction.conversation.references)
        if prediction.reference is not None:
            references.append(prediction.reference)
        if not references:
            return None
        return float(exact_match(prediction.text, references, ignore_case=self.ignore_case))
