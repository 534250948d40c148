"""Detects non-finite gradients without synchronizing.

The optimizer skips the step on the device. One step later, the host reads the result and stops the
run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qwenvl_lit.atomic import atomic_file
from qwenvl_lit.models.host_copy import HostCopy
from qwenvl_lit.types import Batch, DataError


class NonFiniteGuard:
    """Records whether the last gradient was finite, and from which batches it was computed."""

    def __init__(self) -> None:
        self._finite: HostCopy | None = None
        self._step = 0
        self._batches: Sequence[Batch] = ()

    def note(self, finite: torch.Tensor, *, step: int, batches: Sequence[Batch]) -> None:
        """Records whether a gradient is finite. The next call of `check` reads the result.

        Args:
            finite: a scalar on the device, true if the gradient is finite.
            step: the optimizer step of the gradient.
            batches: the micro-batches that the gradient was computed from.
        """
        self._finite = HostCopy(finite)
        self._step, self._batches = step, batches

    def check(self, folder: Path, rank: int) -> None:
        """Checks that the gradient of the last call of `note` is finite.

        Raises:
            DataError: the gradient is not finite. Its batches were saved in `folder`.
        """
        finite, self._finite = self._finite, None
        if finite is None or finite.read():
            return
        rows = []
        for batch in self._batches:
            for conversation in batch.conversations:
                rows.append(conversation.where or conversation.id)
        file = folder / f"not_finite_step_{self._step}.rank{rank}.pt"
        folder.mkdir(parents=True, exist_ok=True)
        batches = [_tensors_on_cpu(batch) for batch in self._batches]
        with atomic_file(file) as unfinished:
            torch.save({"step": self._step, "rows": rows, "batches": batches}, unfinished)
        raise DataError(
            f"the gradient of step {self._step} is not finite and was not applied. Its rows on "
            f"rank {rank} are {', '.join(rows)}; their tensors are saved in {file}. Check these "
            "rows. Then resume from the last checkpoint, with a smaller optim.lr if the rows are "
            "correct"
        )


def _tensors_on_cpu(batch: Batch) -> dict[str, Any]:
    batch = batch.to("cpu", non_blocking=False)
    return {"input_ids": batch.input_ids, "labels": batch.labels, **batch.vision}
