"""Makes the vision tensors of a batch from those of its samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.utils.data import get_worker_info

from qwenvl_lit.types import Sample


def concatenate_vision(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Concatenates the vision tensors of samples along dimension 0.

    Tensors of length 0, of samples without images, may lack the other dimensions.
    """
    vision = {}
    for name in samples[0].vision:
        vision[name] = concatenate([sample.vision[name] for sample in samples])
    return vision


def concatenate(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.cat` along dimension 0, in a data worker into shared memory.

    Tensors of length 0 are left out.
    """
    filled = [tensor for tensor in tensors if len(tensor)] or tensors[:1]
    if get_worker_info() is not None:
        return _concatenate_in_shared_memory(filled)
    return torch.cat(filled) if len(filled) > 1 else filled[0]


def _concatenate_in_shared_memory(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.cat` in a data worker, directly into the memory shared with the trainer process.

    Torch's own `default_collate` does the same with the same private methods. It saves the copy
    into shared memory that sending an ordinary tensor makes.
    """
    first = tensors[0]
    shape = (sum(map(len, tensors)), *first.shape[1:])
    storage = first._typed_storage()._new_shared(math.prod(shape), device=first.device)
    return torch.cat(list(tensors), out=first.new(storage).resize_(shape))
