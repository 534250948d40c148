"""Scores that each row has by itself, and their mean."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch

from qwenvl_lit.metrics.sample_rows import SampleRows
from qwenvl_lit.types import Prediction


class SampleMean(SampleRows):
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
