"""Metrics that score each row separately and average the scores."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch

from qwenvl_lit.metrics.per_sample import PerSampleMetric, Where
from qwenvl_lit.types import Prediction

ScoringProtocol = Literal["correct", "official"]


class SampleMean(PerSampleMetric):
    """The mean of `score` over the rows of a dataset. The sum is exact (`math.fsum`)."""

    @abstractmethod
    def score(self, prediction: Prediction) -> float | None:
        """Returns the score of a row, or None if the row lacks what `needs` names."""

    def measure(self, prediction: Prediction) -> tuple[float] | None:
        value = self.score(prediction)
        return None if value is None else (value,)

    def row_scores(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(rows))

    def total(self, rows: Sequence[torch.Tensor]) -> float:
        return math.fsum(self.row_scores(rows).tolist()) / len(rows)


class ProtocolMean(SampleMean):
    """A `SampleMean` for a score whose published script deviates from its definition.

    Args:
        protocol: "correct" computes the score by its definition. "official" reproduces the
            published script, including its errors.

    Raises:
        ValueError: `protocol` has another value.
    """

    def __init__(self, protocol: ScoringProtocol = "correct", *, where: Where | None = None):
        super().__init__(where=where)
        self.protocol = check_protocol(protocol)


def check_protocol(protocol: ScoringProtocol) -> ScoringProtocol:
    """Returns `protocol`.

    Raises:
        ValueError: it is neither "correct" nor "official".
    """
    if protocol not in ("correct", "official"):
        raise ValueError(f"protocol={protocol}: expected correct or official")
    return protocol
