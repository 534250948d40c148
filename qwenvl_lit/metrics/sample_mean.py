"""What the per-sample metrics share: which rows count, each of them once, and the mean over all ranks."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat, rank_zero_warn

from qwenvl_lit.types import Prediction


def sample_key(sample_id: str) -> int:
    """A signed 64-bit hash that is the same in every process and every run.

    >>> sample_key("coco/42")
    -338348784862774994
    """
    return int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "big", signed=True)


class SampleMean(Metric, ABC):
    """The mean of `score` over the rows of a dataset.

    A row that arrives twice (a distributed sampler may repeat some to give every rank as many) counts once, told by `Conversation.id`.
    The sum is exact, so the mean does not depend on batch size, order or number of ranks. Without any row the mean is nan, with a warning.

    Args:
        where: counts only rows whose `Conversation.columns` hold the wanted value, or one of the wanted values, of every named column.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    needs: ClassVar[str]  # what `score` misses in a row that it leaves out, for the warning
    count: int = 0  # rows behind the last `compute`, over all ranks

    keys: list[torch.Tensor]
    values: list[torch.Tensor]  # nan: a row that `score` left out

    def __init__(self, *, where: Mapping[str, str | Sequence[str]] | None = None):
        super().__init__()
        self.where = {column: {wanted} if isinstance(wanted, str) else set(wanted) for column, wanted in (where or {}).items()}
        self.add_state("keys", default=[], dist_reduce_fx="cat")
        self.add_state("values", default=[], dist_reduce_fx="cat")

    @abstractmethod
    def score(self, prediction: Prediction) -> float | None:
        """The score of one row; None if the row lacks what it needs, which leaves the row out."""

    def selects(self, prediction: Prediction) -> bool:
        """Whether the row is one of those `where` asks for."""
        columns = prediction.conversation.columns
        return all(columns.get(column) in wanted for column, wanted in self.where.items())

    def update(self, predictions: Sequence[Prediction]) -> None:
        rows = [(sample_key(p.conversation.id), self.score(p)) for p in predictions if self.selects(p)]
        values = [math.nan if value is None else value for _, value in rows]
        self.keys.append(torch.tensor([key for key, _ in rows], dtype=torch.int64, device=self.device))
        self.values.append(torch.tensor(values, dtype=torch.float64, device=self.device))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        if len(self.keys) == 0:  # torchmetrics would send an empty float32 here and the other ranks int64: the gather breaks
            self.update([])
        super().sync(*args, **kwargs)

    def compute(self) -> torch.Tensor:
        rows: dict[int, float] = {}
        if len(self.keys):
            rows = dict(zip(dim_zero_cat(self.keys).tolist(), dim_zero_cat(self.values).tolist(), strict=True))
        scores = [value for value in rows.values() if not math.isnan(value)]
        self.count = len(scores)
        if len(scores) < len(rows):
            rank_zero_warn(f"{type(self).__name__}: {len(rows) - len(scores)} of {len(rows)} rows left out, they have no {self.needs}")
        if not rows:
            rank_zero_warn(f"{type(self).__name__} is nan: no row came" + (f" whose columns have {self.where}" if self.where else ""))
        return torch.tensor(math.fsum(scores) / len(scores) if scores else math.nan, device=self.device)
