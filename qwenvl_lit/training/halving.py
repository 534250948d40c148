"""Evaluates batches with fewer rows at a time after GPU memory has run out."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import torch

from qwenvl_lit.data.batch_parts import split_batch
from qwenvl_lit.training.memory import free_unused_memory
from qwenvl_lit.types import Batch, DataError

T = TypeVar("T")

log = logging.getLogger(__name__)


class Halving:
    """Applies a function to batches, and halves those that do not fit into GPU memory.

    Later batches have at most as many rows at a time as have fit.

    Args:
        free: frees what the function keeps on the GPU between batches.
    """

    def __init__(self, free: Callable[[], object]):
        self.free = free
        self.rows: int | None = None  # at a time; None: no limit yet

    def __call__(self, work: Callable[[Batch], T], batch: Batch) -> list[T]:
        """Returns the results of `work` for the parts of `batch`, in the order of its rows.

        Raises:
            DataError: a single row does not fit.
        """
        waiting, results = deque(self._parts(batch)), []
        while waiting:
            part = waiting.popleft()
            try:
                results.append(work(part))
                continue
            except torch.OutOfMemoryError as error:
                reason = str(error).partition("\n")[0]
            # Here the error is gone, and with it what its frames held on the GPU
            self._reduce(part, reason)
            waiting = deque(piece for old in (part, *waiting) for piece in self._parts(old))
        return results

    def _parts(self, batch: Batch) -> list[Batch]:
        return [batch] if self.rows is None else split_batch(batch, self.rows)

    def _reduce(self, part: Batch, reason: str) -> None:
        rows, tokens = len(part.conversations), max(part.lengths, default=0)
        if rows < 2:
            where = "".join(row.location for row in part.conversations)
            raise DataError(
                f"{where}a row of {tokens} tokens does not fit into GPU memory ({reason}); shorten "
                "it, lower generation.max_new_tokens, or use 4-bit weights"
            )
        self.rows = rows // 2
        self.free()
        free_unused_memory()
        log.warning(
            "GPU memory is too small for %d rows of up to %d tokens: going on with %d at a time; "
            "data.eval_batch_size=%d begins so",
            rows,
            tokens,
            self.rows,
            self.rows,
        )
