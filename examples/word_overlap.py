"""A metric of your own: the fraction of the words of the reference that the answer has."""

from __future__ import annotations

from qwenvl_lit.metrics.per_sample import answer_text, reference_texts
from qwenvl_lit.metrics.sample_mean import SampleMean
from qwenvl_lit.types import Prediction


class WordOverlap(SampleMean):
    """The best share over the references of a row, averaged over all rows."""

    needs = "expected answer in words"  # for the warning about rows that are left out

    def score(self, prediction: Prediction) -> float | None:
        words = set(answer_text(prediction).lower().split())
        shares = []
        for reference in reference_texts(prediction):
            expected = set(reference.lower().split())
            if expected:
                shares.append(len(expected & words) / len(expected))
        return max(shares, default=None)  # None leaves the row out
