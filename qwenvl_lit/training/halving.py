"""Evaluates batches with fewer rows at a time after GPU memory has run out."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from qwenvl_lit.data.micro_batches import BatchLimit
from qwenvl_lit.training.memory import free_unused_memory
from qwenvl_lit.types import Batch, DataError

T = TypeVar("T")

log = logging.getLogger(__name__)


class Halving:
    """Applies a function to batches, and halves those that do not fit into GPU memory.

    Later batches have at most as many rows as have fit: `CutRows` follows `limit`.

    Args:
        free: frees what the function keeps on the GPU between batches.
    """

    def __init__(self, free: Callable[[], object]):
        self.free = free
        self.limit = BatchLimit()  # rows

    def __call__(
        self,
        work: Callable[[Batch], T],
        batches: Sequence[Batch],
        cut_again: Callable[[Batch], Sequence[Batch]],
    ) -> list[T]:
        """Returns the results of `work` for the parts of `batches`, in the order of their rows.

        Args:
            cut_again: encodes the rows of a batch again, and cuts them within the lowered limit.

        Raises:
            DataError: a single row does not fit.
        """
        waiting, results = deque(batches), []
        while waiting:
            batch = waiting.popleft()
            if len(batch.conversations) > self.limit.largest:
                waiting.extendleft(reversed(cut_again(batch)))
                continue
            try:
                results.append(work(batch))
                continue
            except torch.OutOfMemoryError as error:
                reason = str(error).partition("\n")[0]
            # Here the error is gone, and with it what its frames held on the GPU
            self._reduce(batch, reason)
            waiting.appendleft(batch)
        return results

    def _reduce(self, batch: Batch, reason: str) -> None:
        rows, tokens = len(batch.conversations), max(batch.lengths, default=0)
        if rows < 2:
            where = "".join(row.location for row in batch.conversations)
            raise DataError(
                f"{where}a row of {tokens} tokens does not fit into GPU memory ({reason}); shorten "
                "it, lower generation.max_new_tokens, or use 4-bit weights"
            )
        self.limit.lower(rows // 2)
        self.free()
        free_unused_memory()
        log.warning(
            "GPU memory is too small for %d rows of up to %d tokens: going on with %d at a time; "
            "data.eval_batch_size=%d begins so",
            rows,
            tokens,
            rows // 2,
            rows // 2,
        )
