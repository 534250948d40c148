"""Relaxed accuracy: a number that was read from a chart may deviate by 5 %."""

from __future__ import annotations

import math

from qwenvl_lit.metrics.per_sample import answer_text, reference_texts
from qwenvl_lit.metrics.sample_mean import ProtocolMean
from qwenvl_lit.types import Prediction


def relaxed_match(answer: str, expected: str, tolerance: float = 0.05) -> bool:
    """Returns whether `answer` deviates from the number `expected` by at most `tolerance`.

    `tolerance` is relative to `expected`. If one of the two is not a number, the texts must be
    equal, ignoring case and white space around them. "50%" is the number 0.5. "1,000" is not a
    number, as in the published definition (Masry et al., Findings of ACL 2022).

    >>> relaxed_match("9.5", "10"), relaxed_match("10.6", "10")
    (True, False)
    >>> relaxed_match("0.0", "0"), relaxed_match("Yes", "yes")
    (True, True)
    """
    number, target = _number(answer.strip()), _number(expected.strip())
    if number is None or target is None or not math.isfinite(number) or not math.isfinite(target):
        return answer.strip().lower() == expected.strip().lower()
    rounding = 1 + 1e-9  # in binary, 1.05 deviates from 1 by slightly more than 5 %
    return abs(number - target) <= tolerance * abs(target) * rounding


def relaxed_match_official(answer: str, expected: str) -> bool:
    """Compares as Qwen-VL's script does: the deviation is relative to the answer.

    An answer of 0 is compared as text.
    """
    answer = answer.strip()
    number, target = _number(answer), _number(expected)
    if target is not None and number:
        return abs(target - number) / abs(number) <= 0.05
    return expected.lower() == answer.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


class RelaxedAccuracy(ProtocolMean):
    """Fraction of answers that match a reference within 5 %.

    This is the metric of ChartQA, which reports the mean over its two test sets.
    """

    needs = "expected answer in words"

    def score(self, prediction: Prediction) -> float | None:
        references = reference_texts(prediction)
        if not references:
            return None
        answer = answer_text(prediction)
        match = relaxed_match if self.protocol == "correct" else relaxed_match_official
        return float(any(match(answer, reference) for reference in references))
