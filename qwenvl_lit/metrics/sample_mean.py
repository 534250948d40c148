"""Metrics that score each row by itself and average the rows."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch

from qwenvl_lit.metrics.per_sample import PerSampleMetric, Where
from qwenvl_lit.types import DataError, Prediction

ScoringProtocol = Literal["correct", "official"]


class SampleMean(PerSampleMetric):
    """The mean of `score` over the rows of a dataset; the sum is exact."""

    @abstractmethod
    def score(self, prediction: Prediction) -> float | None:
        """Returns the score of one row; None leaves out a row that lacks what the score needs."""

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
        protocol: `correct` computes the score as it is defined, `official` as the published script
            computes it, faults included.

    Raises:
        DataError: `protocol` is neither.
    """

    def __init__(self, protocol: ScoringProtocol = "correct", *, where: Where | None = None):
        super().__init__(where=where)
        if protocol not in ("correct", "official"):
            raise DataError(f"protocol={protocol}: expected correct or official")
        self.protocol = protocol
