"""Copies between host and device that do not synchronize."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class HostCopy:
    """An asynchronous copy of a tensor to host memory.

    The constructor enqueues the copy without blocking. `read` is called later, when the device has
    usually finished the copy and all kernels before it. A CPU tensor is copied immediately.
    """

    def __init__(self, tensor: torch.Tensor):
        on_gpu = tensor.is_cuda
        self._arrived = torch.cuda.Event() if on_gpu else None
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        self._copy.copy_(tensor, non_blocking=True)
        if self._arrived:
            self._arrived.record()

    def read(self) -> torch.Tensor:
        """Returns the tensor in host memory. Blocks only if the copy is not finished yet."""
        if self._arrived:
            self._arrived.synchronize()
        return self._copy


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a tensor of host memory as a tensor on `device`, without blocking."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def upload(
    values: Sequence[float], device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Returns numbers as a tensor on `device`, without blocking."""
    return send(torch.tensor(values, dtype=dtype), device)
