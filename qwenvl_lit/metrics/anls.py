"""ANLS: answers that were read, forgiving a few wrong characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchmetrics.functional.text import edit_distance

from qwenvl_lit.metrics.sample_mean import ProtocolMean, Scoring
from qwenvl_lit.metrics.sample_rows import reference_texts, said
from qwenvl_lit.types import Prediction


def anls(
    answer: str, answers: Sequence[str], threshold: float = 0.5, *, protocol: Scoring = "correct"
) -> float:
    """1 minus the edit distance to the closest of `answers` as a share of the longer of the two; 0 below `threshold`. Case and the width
    of white space do not count.

    The published script measures the longer one with that white space: the more there is, the less an error costs.

    >>> anls("Helo world", ["hello world"]), anls("abc", ["xyz"])
    (0.9090909090909091, 0.0)
    """
    best = max(_similarity(answer, other, raw=protocol == "official") for other in answers)
    return best if best >= threshold else 0.0


def _similarity(a: str, b: str, *, raw: bool) -> float:
    short_a, short_b = (" ".join(text.lower().split()) for text in (a, b))
    longer = max(len(a.upper()), len(b.upper())) if raw else max(len(short_a), len(short_b))
    if short_a == short_b or not longer:
        return 1.0
    return 1 - float(edit_distance([short_a], [short_b], reduction="sum")) / longer


class ANLS(ProtocolMean):
    """Average normalised Levenshtein similarity: the measure of DocVQA and InfographicVQA (Biten et al., ICCV 2019)."""

    needs = "expected answer"

    def __init__(
        self,
        threshold: float = 0.5,
        protocol: Scoring = "correct",
        *,
        where: Mapping[str, str | Sequence[str]] | None = None,
    ):
        super().__init__(protocol, where=where)
        self.threshold = threshold

    def score(self, prediction: Prediction) -> float | None:
        answers = reference_texts(prediction)
        return (
            anls(said(prediction), answers, self.threshold, protocol=self.protocol)
            if answers
            else None
        )
