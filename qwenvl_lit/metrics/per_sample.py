"""The base class of all metrics over predictions. It selects rows and counts each row once."""

from __future__ import annotations

import hashlib
import inspect
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.prints import rank_zero_only

from qwenvl_lit.terminal import counted, printable
from qwenvl_lit.types import GroundedObject, Part, Prediction

ROWS = "rows"  # SET/rows: the rows answered; SET/rows_METRIC: those that a metric has scored
SHOWN = 6  # scores without any row that a warning names
Where = Mapping[str, str | Sequence[str]]  # column name -> accepted value, or accepted values
log = logging.getLogger(__name__)


def sample_key(sample_id: str) -> int:
    """Hashes a row id to a signed 64-bit integer, which is the same in every process and run.

    >>> sample_key("coco/42")
    -338348784862774994
    """
    digest = hashlib.blake2b(sample_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def answer_text(prediction: Prediction) -> str:
    """Returns the answer as plain text, in which each object is replaced by its label."""
    return _plain_text(prediction.parts, prediction.text)


def reference_texts(prediction: Prediction) -> tuple[str, ...]:
    """Returns the references of the row. Without references, returns the expected answer as text.

    Returns an empty tuple if the row has neither, or if its expected answer is boxes alone: their
    labels repeat the question, so a wrong box would score as a right answer.
    """
    conversation = prediction.conversation
    if conversation.references or prediction.reference is None:
        return conversation.references
    expected_parts = conversation.answer.parts if conversation.answer else ()
    if has_boxes(expected_parts):
        if not has_words(expected_parts):
            return ()
        _warn_once(
            "expected answers have words and boxes: metrics of text compare the words alone; "
            "metrics=grounding compares the boxes"
        )
    return (_plain_text(expected_parts, prediction.reference),)


def has_boxes(parts: Sequence[Part]) -> bool:
    """Returns whether an answer has an object with boxes."""
    return any(isinstance(part, GroundedObject) and part.boxes for part in parts)


def has_words(parts: Sequence[Part]) -> bool:
    """Returns whether an answer has words beside its objects with boxes.

    >>> has_words(("a dog",)), has_words((", ", "."))
    (True, False)
    """
    words = []
    for part in parts:
        if isinstance(part, str):
            words.append(part)
        elif isinstance(part, GroundedObject) and not part.boxes:
            words.append(part.label or "")
    return any(character.isalnum() for character in "".join(words))


def _plain_text(parts: Sequence[Part], text: str) -> str:
    """Returns `text` if `parts` has no objects, and otherwise the texts and labels of `parts`."""
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

    Rows are identified by `Conversation.id`. A row that is passed to `update` twice counts once: a
    distributed sampler may repeat rows so that every rank has the same number of rows. `total`
    receives the rows of all ranks sorted by key, so the score does not depend on the batch size,
    the order of the rows or the number of ranks. Without any row the score is NaN, and a warning is
    logged; metrics with a title leave it to `warn_without_rows`. Warnings name the metric by
    `title`, and each is logged once.

    Args:
        where: accepted values by column name. Only rows whose `Conversation.columns` have an
            accepted value in each of these columns are counted. None counts all rows.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    needs: ClassVar[str]  # what a row must have to be scored; printed in the warning about others
    dtype_of_rows: ClassVar[torch.dtype] = torch.float64
    title: str = ""  # for warnings: SET/NAME as the score is logged; "" for the name of the class
    advice: str = ""  # ends the warning that no row has a score
    count: int = 0  # rows scored by the last `compute`, over all ranks
    selected: int = 0  # rows that satisfy `where`, likewise

    keys: list[torch.Tensor]
    sizes: list[torch.Tensor]  # count of numbers of each row; 0 for rows that are left out
    numbers: list[torch.Tensor]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not inspect.isabstract(cls) and not getattr(cls, "needs", ""):
            raise TypeError(
                f"{cls.__qualname__} has no `needs`: name what a row must have to be scored, "
                f'for example needs = "expected answer"'
            )

    def __init__(self, *, where: Where | None = None):
        super().__init__()
        self.where: dict[str, set[str]] = {}
        for column, accepted in (where or {}).items():
            self.where[column] = {accepted} if isinstance(accepted, str) else set(accepted)
        for name in ("keys", "sizes", "numbers"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    @property
    def name(self) -> str:
        return self.title or type(self).__name__

    @property
    def condition(self) -> str:
        """The rows that are counted, as text: "task=left or right"."""
        words = []
        for column, accepted in self.where.items():
            words.append(f"{column}={' or '.join(sorted(accepted))}")
        return " and ".join(words)

    @abstractmethod
    def measure(self, prediction: Prediction) -> Sequence[float] | None:
        """Returns the numbers of one row, at least one, or None to leave the row out."""

    @abstractmethod
    def total(self, rows: Sequence[torch.Tensor]) -> float:
        """Computes the score of a dataset, on the CPU, from the numbers of at least one row."""

    def row_scores(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Computes a score for each row, (rows,) float64. `total` is not always their mean."""
        return torch.tensor([self.total([row]) for row in rows], dtype=torch.float64)

    def selects(self, prediction: Prediction) -> bool:
        """Returns whether the row satisfies `where`."""
        columns = prediction.conversation.columns
        return all(columns.get(column) in accepted for column, accepted in self.where.items())

    def update(self, predictions: Sequence[Prediction]) -> None:
        keys, sizes, numbers = [], [], []
        for key, row in self._measure_selected(predictions):
            keys.append(key)
            sizes.append(len(row))
            numbers.extend(row)
        device = self.device
        self.keys.append(torch.tensor(keys, dtype=torch.int64, device=device))
        self.sizes.append(torch.tensor(sizes, dtype=torch.int64, device=device))
        self.numbers.append(torch.tensor(numbers, dtype=self.dtype_of_rows, device=device))

    def _measure_selected(
        self, predictions: Sequence[Prediction]
    ) -> list[tuple[int, Sequence[float]]]:
        """Returns key and numbers of each selected row. A row that is left out has no numbers."""
        measured = []
        for prediction in predictions:
            if self.selects(prediction):
                key = sample_key(prediction.conversation.id)
                measured.append((key, self.measure(prediction) or ()))
        return measured

    def sync(self, *args: Any, **kwargs: Any) -> None:
        # A rank without batches would send torchmetrics' empty state, which is float32. The other
        # ranks send int64, and the gather would fail.
        if len(self.keys) == 0:
            self.update([])
        super().sync(*args, **kwargs)

    def rows(self) -> dict[int, torch.Tensor]:
        """Returns the numbers of each row by `sample_key`, sorted by key.

        A row that was left out has an empty tensor. The result has the rows of this rank. Inside
        `compute`, when the state is synchronized, it has the rows of all ranks.
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
        self.selected = len(rows)
        self.count = sum(len(row) > 0 for row in rows.values())
        if not self.title:
            warn_without_rows([self])
        return torch.tensor(self._score(rows), dtype=torch.float64, device=self.device)

    def evaluate(self, predictions: Sequence[Prediction]) -> tuple[float, dict[int, float]]:
        """Scores `predictions` without using the state of the metric and without other ranks.

        Returns:
            The score that `compute` would return, and the scores of rows by `sample_key`. Rows that
            are left out have no score.
        """
        # If several rows have the same id, the last one counts.
        measured = dict(self._measure_selected(predictions))
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
        """Returns the score of all rows. Warns if rows are left out."""
        kept = [row for row in rows.values() if len(row)]
        left_out = len(rows) - len(kept)
        if left_out:
            advice = "" if kept else self.advice
            count = f"{left_out} of {counted(len(rows), 'row')} left out"
            _warn_once(f"{self.name}: {count}, they have no {self.needs}{advice}")
        if not kept:
            return math.nan
        return self.total(kept)


def warn_without_rows(metrics: Iterable[Metric]) -> None:
    """Warns, in one message, of all metrics whose last `compute` found no row."""
    empty = []
    for metric in metrics:
        if isinstance(metric, PerSampleMetric) and not metric.selected:
            empty.append(metric)
    if not empty:
        return
    if len(empty) == 1:
        [metric] = empty
        condition = f" with {metric.condition}" if metric.where else ""
        _warn_once(f"{metric.name} is nan: there is no row{condition}{metric.advice}")
        return
    names = [f"{metric.name} ({metric.condition or 'any row'})" for metric in empty[:SHOWN]]
    more = f" and {len(empty) - SHOWN} more" if len(empty) > SHOWN else ""
    _warn_once(f"scores without any row are nan: {', '.join(names)}{more}{empty[0].advice}")


@cache  # a run computes the same score at each validation
@rank_zero_only
def _warn_once(text: str) -> None:
    log.warning("%s", printable(text))
