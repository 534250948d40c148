"""The static KV cache of a decoder: keys and values of all layers in a single allocation."""

# B rows, G heads of keys and values, S slots of a row, each for one token or its padding,
# K head width

from __future__ import annotations

import torch


class KVCache:
    """Keys and values in one allocation, of which `view` makes a tensor for any number of rows.

    The allocation grows when necessary and never shrinks. CUDA graphs refer to its addresses, so
    `allocate` invalidates all graphs that were captured before.
    """

    def __init__(self, *, layers: int, heads: int, head_dim: int, device: torch.device):
        self.layers = layers
        self.heads = heads
        self.head_dim = head_dim
        self.device = device
        self.memory: torch.Tensor | None = None  # one-dimensional

    def like(self) -> KVCache:
        """Returns another cache of the same network, without memory."""
        return KVCache(
            layers=self.layers, heads=self.heads, head_dim=self.head_dim, device=self.device
        )

    def empty(self, rows: int, slots: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns memory of its own, not initialized, in the shape of `view`."""
        shape = (self.layers, 2, rows, self.heads, slots, self.head_dim)
        return torch.empty(shape, dtype=dtype, device=self.device)

    def fits(self, rows: int, slots: int, dtype: torch.dtype) -> bool:
        """Returns whether the allocation has at least `slots` slots for each of `rows` rows."""
        return self.capacity(rows) >= slots and self.memory.dtype == dtype

    def allocate(self, rows: int, slots: int, dtype: torch.dtype) -> None:
        """Replaces the allocation by one with at least `slots` slots for each of `rows` rows."""
        self.memory = None  # frees the old allocation first
        elements = self._elements_per_slot(rows) * round_up(rows, slots)
        # Initialized, because attention multiplies the values of masked slots by 0: 0 * NaN is NaN.
        self.memory = torch.zeros(elements, dtype=dtype, device=self.device)

    def capacity(self, rows: int) -> int:
        """Returns the number of slots per row if there are `rows` rows.

        The number is a multiple of 8, with which attention kernels are faster.
        """
        if self.memory is None:
            return 0
        return self.memory.numel() // self._elements_per_slot(rows) // 8 * 8

    def slots_to_read(self, rows: int, filled: int) -> int:
        """Returns how many slots a decoding step reads if `filled` slots are in use.

        The number is rounded up, because each number needs its own CUDA graph. With few rows, it is
        rounded more coarsely, because reading unused slots of a small cache is cheap.
        """
        return min(round_up(rows, filled), self.capacity(rows))

    def view(self, rows: int) -> torch.Tensor:
        """Returns the cache of `rows` rows as (layers, 2, B, G, S, K), keys before values."""
        slots = self.capacity(rows)
        flat = self.memory[: self._elements_per_slot(rows) * slots]
        return flat.view(self.layers, 2, rows, self.heads, slots, self.head_dim)

    def _elements_per_slot(self, rows: int) -> int:
        return self.layers * 2 * rows * self.heads * self.head_dim


def round_up(rows: int, slots: int) -> int:
    """Returns how many slots per row are allocated, or read, for `slots` slots in use."""
    step = 512
    if rows > 32:
        step = 64
    elif rows > 4:
        step = 128
    return -(-slots // step) * step
