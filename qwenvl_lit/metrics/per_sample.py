"""The base class of all metrics over predictions: selects rows and counts each one once."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat, rank_zero_warn

from qwenvl_lit.types import GroundedObject, Part, Prediction

Where = Mapping[str, str | Sequence[str]]  # name of a column -> wanted value, or several of them


def sample_key(sample_id: str) -> int:
    """Hashes an id to a signed 64-bit integer, the same in every process and every run.

    >>> sample_key("coco/42")
    -338348784862774994
    """
    digest = hashlib.blake2b(sample_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def answer_text(prediction: Prediction) -> str:
    """Returns the answer as plain text, with the label in place of each object."""
    return _plain_text(prediction.parts, prediction.text)


def reference_texts(prediction: Prediction) -> tuple[str, ...]:
    """Returns the references of the row, or its expected answer as plain text if it has none.

    Empty if the row has neither.
    """
    conversation = prediction.conversation
    if conversation.references or prediction.reference is None:
        return conversation.references
    expected_parts = conversation.answer.parts if conversation.answer else ()
    return (_plain_text(expected_parts, prediction.reference),)


def _plain_text(parts: Sequence[Part], text: str) -> str:
    """Joins `parts` if there is an object among them; otherwise `text` holds no markup."""
    if not any(isinstance(part, GroundedObject) for part in parts):
        return text.strip()
    words = []
    for part in parts:
        if isinstance(part, GroundedObject):
            words.append(part.label or "")
        elif isinstance(part, str):
            words.append(part)
    return "".join(words).strip()


class PerSampleMetric(Metric, ABC):
    """A score of a dataset that is computed from a few numbers per row.

    Rows are identified by `Conversation.id`. A row that arrives twice counts once, because a
    distributed sampler may repeat rows to give every rank the same number. `total` receives the
    rows of all ranks sorted by key, so the score does not depend on batch size, row order or number
    of ranks. Without any row the score is NaN, with a warning.

    Args:
        where: Count only rows whose `Conversation.columns` have the wanted value, or one of the
            wanted values, in every column named here.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    needs: ClassVar[str]  # what a row without numbers lacks; for the warning
    dtype_of_rows: ClassVar[torch.dtype] = torch.float64
    count: int = 0  # rows in the last `compute`, over all ranks

    keys: list[torch.Tensor]
    sizes: list[torch.Tensor]  # how many numbers each row has; 0 if it was left out
    numbers: list[torch.Tensor]

    def __init__(self, *, where: Where | None = None):
        super().__init__()
        self.where: dict[str, set[str]] = {}
        for column, wanted in (where or {}).items():
            self.where[column] = {wanted} if isinstance(wanted, str) else set(wanted)
        for name in ("keys", "sizes", "numbers"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    @abstractmethod
    def measure(self, prediction: Prediction) -> Sequence[float] | None:
        """Returns the numbers of one row, at least one; None leaves the row out."""

    @abstractmethod
    def total(self, rows: Sequence[torch.Tensor]) -> float:
        """Computes the score of a dataset from the numbers of at least one row, on the CPU."""

    def row_scores(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Computes each row's own score, (rows,) float64. `total` need not be their mean."""
        return torch.tensor([self.total([row]) for row in rows], dtype=torch.float64)

    def selects(self, prediction: Prediction) -> bool:
        """Tells whether the row satisfies `where`."""
        columns = prediction.conversation.columns
        return all(columns.get(column) in wanted for column, wanted in self.where.items())

    def update(self, predictions: Sequence[Prediction]) -> None:
        keys, sizes, numbers = [], [], []
        for key, row in self._measured(predictions):
            keys.append(key)
            sizes.append(len(row))
            numbers.extend(row)
        device = self.device
        self.keys.append(torch.tensor(keys, dtype=torch.int64, device=device))
        self.sizes.append(torch.tensor(sizes, dtype=torch.int64, device=device))
        self.numbers.append(torch.tensor(numbers, dtype=self.dtype_of_rows, device=device))

    def _measured(self, predictions: Sequence[Prediction]) -> list[tuple[int, Sequence[float]]]:
        """The key and the numbers of each selected row; no numbers if the row is left out."""
        measured = []
        for prediction in predictions:
            if self.selects(prediction):
                key = sample_key(prediction.conversation.id)
                measured.append((key, self.measure(prediction) or ()))
        return measured

    def sync(self, *args: Any, **kwargs: Any) -> None:
        # A rank without batches would send torchmetrics' empty float32 state. The other ranks send
        # int64, and the gather would fail.
        if len(self.keys) == 0:
            self.update([])
        super().sync(*args, **kwargs)

    def rows(self) -> dict[int, torch.Tensor]:
        """Returns the numbers of each row by `sample_key`, sorted by key; none for rows left out.

        Holds the rows of this rank, and inside `compute` those of all ranks.
        """
        if len(self.keys) == 0:
            return {}
        keys = dim_zero_cat(self.keys).tolist()
        ends = dim_zero_cat(self.sizes).cpu().cumsum(0).tolist()
        numbers = dim_zero_cat(self.numbers).cpu()
        rows = {}
        start = 0
        for key, end in zip(keys, ends, strict=True):
            rows[key] = numbers[start:end]
            start = end
        return dict(sorted(rows.items()))

    def compute(self) -> torch.Tensor:
        rows = self.rows()
        self.count = sum(len(row) > 0 for row in rows.values())
        return torch.tensor(self._score(rows), dtype=torch.float64, device=self.device)

    def evaluate(self, predictions: Sequence[Prediction]) -> tuple[float, dict[int, float]]:
        """Scores `predictions` alone: the state of the metric and other ranks take no part.

        Returns:
            The score, as `compute` would return it, and the score of each row by `sample_key`, of
            the rows that are not left out.
        """
        measured = dict(self._measured(predictions))  # the last row of an id counts
        rows = {}
        for key in sorted(measured):
            rows[key] = torch.tensor(measured[key], dtype=self.dtype_of_rows)
        score = self._score(rows)
        kept = {key: row for key, row in rows.items() if len(row)}
        if not kept:
            return score, {}
        row_scores = self.row_scores(list(kept.values())).tolist()
        return score, dict(zip(kept, row_scores, strict=True))

    def _score(self, rows: Mapping[int, torch.Tensor]) -> float:
        """The score of all rows; warns about rows that are left out, or if there is none."""
        name = type(self).__name__
        kept = [row for row in rows.values() if len(row)]
        left_out = len(rows) - len(kept)
        if left_out:
            rank_zero_warn(
                f"{name}: {left_out} of {len(rows)} rows left out, they have no {self.needs}"
            )
        if not rows:
            condition = f" whose columns have {self.where}" if self.where else ""
            rank_zero_warn(f"{name} is nan: there is no row{condition}")
        if not kept:
            return math.nan
        return self.total(kept)
