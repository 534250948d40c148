"""Writes the files of a full model, shard by shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from qwenvl_lit.models.checkpoint_files import INDEX, WEIGHTS
from qwenvl_lit.models.stored_tensors import StoredTensor, open_shard
from qwenvl_lit.types import DataError

# A function that reads a tensor into host memory by its name.
Read = Callable[[str], torch.Tensor]

# Size of a written shard. With the published shards of 2 GB, which are mapped into memory to read
# them, a conversion takes less than 4 GB of memory.
SHARD_BYTES = 10**9


def stored_reader(tensors: Mapping[str, StoredTensor | torch.Tensor], dtype: torch.dtype) -> Read:
    """Returns a function that reads stored tensors by name.

    At most one file at a time is mapped into memory.
    """
    last_file: Path | None = None

    def read(name: str) -> torch.Tensor:
        nonlocal last_file
        stored = tensors[name]
        if isinstance(stored, StoredTensor) and stored.file != last_file:
            open_shard.cache_clear()
            last_file = stored.file
        return stored[...].to("cpu", dtype)

    return read


def check_disk(folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """Checks that the disk of `folder` has enough free space for tensors of `shapes`.

    Raises:
        DataError: the disk does not have enough free space.
    """
    size, free = total_bytes(shapes, dtype), shutil.disk_usage(folder).free
    if size > free:
        raise DataError(
            f"{folder.parent} has {free / 1e9:.1f} GB left, but the model takes {size / 1e9:.1f} GB"
        )


def write_shards(
    read: Read,
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
    *,
    dtype: torch.dtype,
    kind: Literal["safetensors", "bin"] = "safetensors",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the weights as shards with an index. At most one shard is in memory.

    Args:
        read: reads a tensor by its name in files.
        shapes: the shapes of the tensors by their names in files, in the order of writing.
        shard_bytes: the maximum size of a shard. A larger tensor has its own shard.
    """
    name = next(name for name in WEIGHTS if name.endswith(kind))
    shards = list(shards_of(shapes, shard_bytes, dtype.itemsize))
    weight_map: dict[str, str] = {}
    for number, tensor_names in enumerate(shards, 1):
        file = name.replace(".", f"-{number:05}-of-{len(shards):05}.")
        tensors: dict[str, torch.Tensor] = {}
        for tensor_name in tensor_names:
            tensor = read(tensor_name).to(dtype)
            tensors[tensor_name] = tensor.clone(memory_format=torch.contiguous_format)
            weight_map[tensor_name] = file
        if kind == "safetensors":
            try:
                save_file(tensors, folder / file, metadata={"format": "pt"})
            except SafetensorError as error:  # such as a full disk
                raise DataError(
                    f"{folder / file} cannot be written: {error}; free disk space, or choose "
                    f"another folder"
                ) from error
            (folder / file).chmod(0o644)  # safetensors creates it readable for its owner only
        else:
            torch.save(tensors, folder / file)
        del tensors
    metadata = {"total_size": total_bytes(shapes, dtype)}
    write_json(folder / INDEX.format(name), {"metadata": metadata, "weight_map": weight_map})


def total_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize


def shards_of(
    shapes: Mapping[str, tuple[int, ...]], limit: int, element_bytes: int
) -> Iterator[list[str]]:
    """Yields the tensor names of each shard.

    A shard has consecutive tensors of at most `limit` bytes, or a single larger tensor.
    """
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        tensor_bytes = torch.Size(shape).numel() * element_bytes
        if names and size + tensor_bytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor_bytes
    yield names


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
