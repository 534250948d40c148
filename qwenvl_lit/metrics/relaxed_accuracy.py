"""Relaxed accuracy: numbers that were read off a chart may be 5 % off."""

from __future__ import annotations

import math

from qwenvl_lit.metrics.sample_mean import ProtocolMean
from qwenvl_lit.metrics.sample_rows import reference_texts, said
from qwenvl_lit.types import Prediction


def relaxed_match(answer: str, expected: str, tolerance: float = 0.05) -> bool:
    """Whether `answer` is within `tolerance` of the number `expected`; words have to be equal but for case and white space around them.

    50% is 0.5. A number with commas is words, as in the published definition (Masry et al., Findings of ACL 2022).

    >>> relaxed_match("9.5", "10"), relaxed_match("10.6", "10"), relaxed_match("0.0", "0"), relaxed_match("Yes", "yes")
    (True, False, True, True)
    """
    number, wanted = _number(answer.strip()), _number(expected.strip())
    if number is None or wanted is None or not math.isfinite(number) or not math.isfinite(wanted):
        return answer.strip().lower() == expected.strip().lower()
    return abs(number - wanted) <= tolerance * abs(wanted) * (
        1 + 1e-9
    )  # 1.05 is within 5 % of 1, whatever its binary digits


def relaxed_match_official(answer: str, expected: str) -> bool:
    """The same as Qwen-VL's script has it, which swaps the two: 5 % of the *answer*, and an answer of 0 is words."""
    answer = answer.strip()
    number, wanted = _number(answer), _number(expected)
    if wanted is not None and number:
        return abs(wanted - number) / abs(number) <= 0.05
    return expected.lower() == answer.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


class RelaxedAccuracy(ProtocolMean):
    """Share of answers that match an expected one within 5 %: the measure of ChartQA, where both test sets are averaged."""

    needs = "expected answer"

    def score(self, prediction: Prediction) -> float | None:
        answers = reference_texts(prediction)
        match = relaxed_match if self.protocol == "correct" else relaxed_match_official
        return (
            float(any(match(said(prediction), answer) for answer in answers)) if answers else None
        )
