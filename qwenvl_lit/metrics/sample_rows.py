"""What all scores of predictions share: which rows count, each of them once, over all ranks."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat, rank_zero_warn

from qwenvl_lit.types import GroundedObject, Part, Prediction


def sample_key(sample_id: str) -> int:
    """A signed 64-bit hash that is the same in every process and every run.

    >>> sample_key("coco/42")
    -338348784862774994
    """
    return int.from_bytes(
        hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "big", signed=True
    )


def said(prediction: Prediction) -> str:
    """The answer as plain text: of an object, its label."""
    return _plain(prediction.parts, prediction.text)


def reference_texts(prediction: Prediction) -> tuple[str, ...]:
    """The row's references; without any, its expected answer, if it has one, as plain text."""
    if prediction.conversation.references or prediction.reference is None:
        return prediction.conversation.references
    answer = prediction.conversation.answer
    return (_plain(answer.parts if answer else (), prediction.reference),)


def _plain(parts: Sequence[Part], text: str) -> str:
    if not any(isinstance(part, GroundedObject) for part in parts):
        return text.strip()
    words = (part.label or "" if isinstance(part, GroundedObject) else part for part in parts)
    return "".join(word for word in words if isinstance(word, str)).strip()


class PerSampleMetric(Metric, ABC):
    """A score of a dataset from some numbers of each row.

    A row that arrives twice (a distributed sampler may repeat some to give every rank as many) counts once, told by `Conversation.id`; the
    numbers of all rows meet in `total`, in an order of their own. So the score does not depend on batch size, order or number of ranks.
    Without any row it is nan, with a warning.

    Args:
        where: counts only rows whose `Conversation.columns` hold the wanted value, or one of the wanted values, of every named column.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    needs: ClassVar[str]  # what `measure` misses in a row that it leaves out, for the warning
    dtype_of_rows: ClassVar[torch.dtype] = torch.float64
    count: int = 0  # rows behind the last `compute`, over all ranks

    keys: list[torch.Tensor]
    sizes: list[torch.Tensor]  # how many numbers a row has; 0: it was left out
    numbers: list[torch.Tensor]

    def __init__(self, *, where: Mapping[str, str | Sequence[str]] | None = None):
        super().__init__()
        self.where = {
            column: {wanted} if isinstance(wanted, str) else set(wanted)
            for column, wanted in (where or {}).items()
        }
        for name in ("keys", "sizes", "numbers"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    @abstractmethod
    def measure(self, prediction: Prediction) -> Sequence[float] | None:
        """The numbers of one row, one at least; None if the row lacks what they need, which leaves it out."""

    @abstractmethod
    def total(self, rows: Sequence[torch.Tensor]) -> float:
        """The score of a dataset, from what `measure` gave for each of its rows: at least one, on the CPU."""

    def row_scores(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """(rows,) float64: what each row scores by itself, for looking at rows; `total` need not be their mean."""
        return torch.tensor([self.total([row]) for row in rows], dtype=torch.float64)

    def selects(self, prediction: Prediction) -> bool:
        """Whether the row is one of those `where` asks for."""
        columns = prediction.conversation.columns
        return all(columns.get(column) in wanted for column, wanted in self.where.items())

    def update(self, predictions: Sequence[Prediction]) -> None:
        rows = [
            (sample_key(p.conversation.id), self.measure(p) or ())
            for p in predictions
            if self.selects(p)
        ]
        self.keys.append(
            torch.tensor([key for key, _ in rows], dtype=torch.int64, device=self.device)
        )
        self.sizes.append(
            torch.tensor(
                [len(numbers) for _, numbers in rows], dtype=torch.int64, device=self.device
            )
        )
        numbers = [number for _, numbers in rows for number in numbers]
        self.numbers.append(torch.tensor(numbers, dtype=self.dtype_of_rows, device=self.device))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        if (
            len(self.keys) == 0
        ):  # torchmetrics would send an empty float32 here and the other ranks int64: the gather breaks
            self.update([])
        super().sync(*args, **kwargs)

    def rows(self) -> dict[int, torch.Tensor]:
        """From `sample_key` to what `measure` gave, empty for rows left out; of this rank, and in `compute` of all, sorted by key."""
        if len(self.keys) == 0:
            return {}
        keys, sizes = dim_zero_cat(self.keys).tolist(), dim_zero_cat(self.sizes).cpu()
        ends = [0, *sizes.cumsum(0).tolist()]
        numbers = dim_zero_cat(self.numbers).cpu()
        return dict(
            sorted(
                (key, numbers[start:end])
                for key, (start, end) in dict(zip(keys, pairwise(ends), strict=True)).items()
            )
        )

    def compute(self) -> torch.Tensor:
        rows = self.rows()
        kept = [numbers for numbers in rows.values() if len(numbers)]
        self.count = len(kept)
        if len(kept) < len(rows):
            rank_zero_warn(
                f"{type(self).__name__}: {len(rows) - len(kept)} of {len(rows)} rows left out, they have no {self.needs}"
            )
        if not rows:
            rank_zero_warn(
                f"{type(self).__name__} is nan: no row came"
                + (f" whose columns have {self.where}" if self.where else "")
            )
        return torch.tensor(
            self.total(kept) if kept else float("nan"), dtype=torch.float64, device=self.device
        )
