"""Detects non-finite gradients without synchronizing.

The optimizer skips the step on the device; the host finds out one step later and stops the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from qwenvl_lit.models.host_copy import HostCopy
from qwenvl_lit.types import Batch, DataError


class NonFiniteGuard:
    """Remembers whether the last gradient was finite, and the batches that it came from."""

    def __init__(self) -> None:
        self._finite: HostCopy | None = None
        self._step = 0
        self._batches: Sequence[Batch] = ()

    def note(self, finite: torch.Tensor, *, step: int, batches: Sequence[Batch]) -> None:
        """Queues the verdict on a gradient, to be read by the next `check`.

        Args:
            finite: () on the device; true if the gradient of `batches` is finite.
            step: the optimizer step that this gradient is for.
        """
        self._finite = HostCopy(finite)
        self._step, self._batches = step, batches

    def check(self, folder: Path, rank: int) -> None:
        """Reads the verdict that was noted last.

        Raises:
            DataError: that gradient was not finite; its batches are saved in `folder`.
        """
        noted, self._finite = self._finite, None
        if noted is None or noted.read():
            return
        rows = []
        for batch in self._batches:
            for conversation in batch.conversations:
                rows.append(conversation.where or conversation.id)
        file = folder / f"not_finite_step_{self._step}.rank{rank}.pt"
        folder.mkdir(parents=True, exist_ok=True)
        batches = [_tensors_on_cpu(batch) for batch in self._batches]
        torch.save({"step": self._step, "rows": rows, "batches": batches}, file)
        raise DataError(
            f"the gradient of step {self._step} is not finite and was not applied. Its rows on "
            f"rank {rank}: {', '.join(rows)}; saved as {file}. Check these rows, then resume from "
            "the last checkpoint, with a smaller optim.lr if the rows are correct"
        )


def _tensors_on_cpu(batch: Batch) -> dict[str, torch.Tensor]:
    tensors = {"input_ids": batch.input_ids, "labels": batch.labels, **batch.vision}
    return {name: tensor.cpu() for name, tensor in tensors.items()}
