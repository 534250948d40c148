"""ANLS: accuracy of text read from an image, which tolerates a few wrong characters."""

from __future__ import annotations

from collections.abc import Sequence

from torchmetrics.functional.text import edit_distance

from qwenvl_lit.bounds import check_number
from qwenvl_lit.metrics.per_sample import Where, answer_text, reference_texts
from qwenvl_lit.metrics.sample_mean import ProtocolMean, ScoringProtocol
from qwenvl_lit.types import Prediction


def anls(
    answer: str,
    references: Sequence[str],
    threshold: float = 0.5,
    *,
    protocol: ScoringProtocol = "correct",
) -> float:
    """Returns the similarity to the closest reference, or 0 if it is below `threshold`.

    The similarity is 1 minus the edit distance divided by the length of the longer text. Case and
    the amount of white space are ignored. The published script ignores white space in the distance
    but not in the length. With that script, additional white space makes an error cost less.

    >>> anls("Helo world", ["hello world"]), anls("abc", ["xyz"])
    (0.9090909090909091, 0.0)
    """
    official = protocol == "official"
    best = max(_similarity(answer, text, official=official) for text in references)
    return best if best >= threshold else 0.0


def _similarity(a: str, b: str, *, official: bool) -> float:
    plain_a, plain_b = " ".join(a.lower().split()), " ".join(b.lower().split())
    longer = max(len(plain_a), len(plain_b))
    if official:
        longer = max(len(a.upper()), len(b.upper()))
    if plain_a == plain_b or not longer:
        return 1.0
    return 1 - float(edit_distance([plain_a], [plain_b], reduction="sum")) / longer


class ANLS(ProtocolMean):
    """Average normalized Levenshtein similarity: the metric of DocVQA and InfographicVQA.

    Biten et al., ICCV 2019.
    """

    needs = "expected answer in words"

    def __init__(
        self,
        threshold: float = 0.5,
        protocol: ScoringProtocol = "correct",
        *,
        where: Where | None = None,
    ):
        super().__init__(protocol, where=where)
        check_number("threshold", threshold, least=0, most=1)
        self.threshold = threshold

    def score(self, prediction: Prediction) -> float | None:
        references = reference_texts(prediction)
        if not references:
            return None
        answer = answer_text(prediction)
        return anls(answer, references, self.threshold, protocol=self.protocol)
