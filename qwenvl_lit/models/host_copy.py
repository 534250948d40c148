"""Copies from the device to the host that do not synchronize."""

from __future__ import annotations

import torch


class HostCopy:
    """An asynchronous copy of a tensor to host memory.

    The copy is queued at once and read later, when the device has finished it, so that the host
    does not block on kernels that were queued before. A tensor on a CPU is copied immediately.
    """

    def __init__(self, tensor: torch.Tensor):
        on_gpu = tensor.is_cuda
        self._arrived = torch.cuda.Event() if on_gpu else None
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        self._copy.copy_(tensor, non_blocking=True)
        if self._arrived:
            self._arrived.record()

    def read(self) -> torch.Tensor:
        """Returns the tensor in host memory; blocks only if the copy has not arrived yet."""
        if self._arrived:
            self._arrived.synchronize()
        return self._copy
