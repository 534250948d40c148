"""The static cache of the decoder: keys and values of all layers in one allocation."""

# B rows, H heads, S slots of a row, K head width

from __future__ import annotations

import torch

from qwenvl_lit.models.qwen_vl.config import QwenVLConfig


class KVCache:
    """Keys and values, allocated once and viewed for any number of rows.

    The allocation grows when needed and never shrinks. A CUDA graph refers to addresses, so that
    `allocate` makes all graphs invalid that were captured before.
    """

    def __init__(self, config: QwenVLConfig, device: torch.device):
        self.config = config
        self.device = device
        self.memory: torch.Tensor | None = None  # flat

    def fits(self, rows: int, slots: int, dtype: torch.dtype) -> bool:
        """Returns whether the allocation has `slots` for each of `rows` rows."""
        return self.capacity(rows) >= slots and self.memory.dtype == dtype

    def allocate(self, rows: int, slots: int, dtype: torch.dtype) -> None:
        """Replaces the allocation by one with at least `slots` for each of `rows` rows."""
        self.memory = None  # frees the old one first
        elements = self._elements_per_slot(rows) * _round_up(rows, slots)
        # Zeros, because masked slots are multiplied by 0, and 0 * NaN is NaN.
        self.memory = torch.zeros(elements, dtype=dtype, device=self.device)

    def capacity(self, rows: int) -> int:
        """Slots for each of `rows` rows, a multiple of 8, which attention kernels prefer."""
        if self.memory is None:
            return 0
        return self.memory.numel() // self._elements_per_slot(rows) // 8 * 8

    def slots_to_read(self, rows: int, filled: int) -> int:
        """Slots that a decoding step reads when `filled` of them are in use.

        Rounded up, because a graph for each count would be too many; more coarsely for few rows,
        whose cache is small.
        """
        return min(_round_up(rows, filled), self.capacity(rows))

    def view(self, rows: int) -> torch.Tensor:
        """The cache of `rows` rows as (layers, 2, B, H, S, K): keys, then values."""
        config, slots = self.config, self.capacity(rows)
        heads, head_dim = config.num_attention_heads, config.kv_channels
        flat = self.memory[: self._elements_per_slot(rows) * slots]
        return flat.view(config.num_hidden_layers, 2, rows, heads, slots, head_dim)

    def _elements_per_slot(self, rows: int) -> int:
        config = self.config
        return config.num_hidden_layers * 2 * rows * config.num_attention_heads * config.kv_channels


def _round_up(rows: int, slots: int) -> int:
    step = 512
    if rows > 32:
        step = 64
    elif rows > 4:
        step = 128
    return -(-slots // step) * step
