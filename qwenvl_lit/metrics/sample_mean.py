"""Scores that each row has by itself, and their mean."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from qwenvl_lit.metrics.sample_rows import PerSampleMetric
from qwenvl_lit.types import DataError, Prediction

Scoring = Literal["correct", "official"]


class SampleMean(PerSampleMetric):
    """The mean of `score` over the rows of a dataset; the sum is exact."""

    @abstractmethod
    def score(self, prediction: Prediction) -> float | None:
        """The score of one row; None if the row lacks what it needs, which leaves the row out."""

    def measure(self, prediction: Prediction) -> tuple[float] | None:
        value = self.score(prediction)
        return None if value is None else (value,)

    def row_scores(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(rows))

    def total(self, rows: Sequence[torch.Tensor]) -> float:
        return math.fsum(self.row_scores(rows).tolist()) / len(rows)


class ProtocolMean(SampleMean):
    """Such a mean, where the script that published scores come from has faults.

    Args:
        protocol: `correct`: what the score is defined as; `official`: what the published script computes, faults included.

    Raises:
        DataError: `protocol` is neither.
    """

    def __init__(
        self,
        protocol: Scoring = "correct",
        *,
        where: Mapping[str, str | Sequence[str]] | None = None,
    ):
        super().__init__(where=where)
        if protocol not in ("correct", "official"):
            raise DataError(f"protocol={protocol}: expected correct or official")
        self.protocol = protocol
