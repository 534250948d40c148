"""Tensors in the files of a full model, mapped into memory and read when they are needed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from qwenvl_lit.stored_files import check_finite, read_tensors
from qwenvl_lit.types import DataError


class StoredTensor:
    """A tensor in a file, read when it is indexed.

    transformers reads the slices of safetensors files in this way, one after the other.

    Raises:
        DataError: when it is read, the tensor is missing in the file or not finite.
    """

    def __init__(self, file: Path, name: str):
        self.file = file
        self.name = name

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self._tensor()
        check_finite(self.file, self.name, tensor)
        return tensor[index]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._tensor().shape)

    @property
    def dtype(self) -> torch.dtype:
        return self._tensor().dtype

    def _tensor(self) -> torch.Tensor:
        tensors = open_shard(self.file)
        if self.name not in tensors:
            raise DataError(
                f"{self.file} lacks {self.name}, which the index says is there; "
                f"fetch the file again"
            )
        return tensors[self.name]


# Consecutive tensors share a shard. More open shards would count as memory in use.
@lru_cache(maxsize=2)
def open_shard(file: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a file by name, mapped into memory.

    A page is read when it is first used, and shared by all processes.

    Raises:
        DataError: the file is incomplete or of another format than its name says.
    """
    return read_tensors(file)
