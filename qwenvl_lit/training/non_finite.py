"""What the host learns of a step one step later, so that it never waits for the device; and steps whose gradient is not finite, which the
optimizer leaves out before the run stops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from qwenvl_lit.models.host_copy import HostCopy
from qwenvl_lit.types import Batch, DataError


class NonFiniteGuard:
    """Remembers whether the last gradient was finite."""

    def __init__(self) -> None:
        self._finite: HostCopy | None = None

    def note(self, finite: torch.Tensor, *, step: int, batches: Sequence[Batch]) -> None:
        """`finite` (on the device) is the verdict on the gradient of `batches`, which would have made `step`."""
        self._finite = HostCopy(finite)
        self._step, self._batches = step, batches

    def check(self, folder: Path, rank: int) -> None:
        """Read what was noted last.

        Raises:
            DataError: that gradient was not finite; its batches are saved in `folder`.
        """
        noted, self._finite = self._finite, None
        if noted is None or noted.read():
            return
        rows = [
            conversation.where or conversation.id
            for batch in self._batches
            for conversation in batch.conversations
        ]
        file = folder / f"not_finite_step_{self._step}.rank{rank}.pt"
        folder.mkdir(parents=True, exist_ok=True)
        tensors = [
            {"input_ids": batch.input_ids, "labels": batch.labels, **batch.vision}
            for batch in self._batches
        ]
        torch.save(
            {
                "step": self._step,
                "rows": rows,
                "batches": [{k: v.cpu() for k, v in batch.items()} for batch in tensors],
            },
            file,
        )
        raise DataError(
            f"the gradient of step {self._step} is not finite and was not applied. Its rows on rank {rank}: {', '.join(rows)}; saved as "
            f"{file}. Look at these rows; then go on from the last checkpoint, with a smaller optim.lr if they are in order"
        )
