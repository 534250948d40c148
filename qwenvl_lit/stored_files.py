"""Reads the files of checkpoints, runs and adapters, which others may have written.

A file that is damaged, or is something else than its name says, is a `DataError` of one line that
names the file. No file is executed: pickles hold tensors and plain values only.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    import torch

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MAX_TEXT_BYTES = 64_000_000  # of a file that is read whole: the largest have some megabytes
MAX_RECORD_BYTES = 1_000_000_000  # of a checkpoint without its tensors
MAX_REASON = 200  # characters of a library's message
REFUSED_NAME = re.compile(r"GLOBAL ([\w.]+)")  # in torch's message on a pickle that it refuses


def check_file(file: Path) -> None:
    """Raises a DataError unless `file` is a file with content of its own."""
    try:
        status = file.stat()
        if stat.S_ISREG(status.st_mode):
            with file.open("rb") as stream:
                start = stream.read(len(LFS_POINTER))
    except OSError as error:
        raise unreadable(file, error.strerror or str(error)) from error
    if stat.S_ISDIR(status.st_mode):
        raise unreadable(file, "it is a folder")
    if not stat.S_ISREG(status.st_mode):
        raise unreadable(file, "it is not a regular file")
    if not status.st_size:
        raise unreadable(file, "it is empty")
    if start == LFS_POINTER:
        raise lfs_pointer(file)


def lfs_pointer(file: Path) -> DataError:
    """Returns the error for a git-lfs pointer, whose content was not fetched."""
    return DataError(
        f"{file} cannot be read: it is a git-lfs pointer, not the file itself; fetch it with "
        f"git lfs pull in {file.parent}"
    )


def unreadable(file: Path, reason: str) -> DataError:
    """Returns the error for a damaged file."""
    return DataError(f"{file} cannot be read: {reason}; is it complete? Fetch or write it again")


def read_bytes(file: Path, *, limit: int = MAX_TEXT_BYTES) -> bytes:
    """Reads a file that is not larger than `limit`."""
    check_file(file)
    size = file.stat().st_size
    if size > limit:
        raise unreadable(file, f"it has {size:,} bytes, and at most {limit:,} make sense")
    with errors_named(file):
        return file.read_bytes()


def read_text(file: Path, *, limit: int = MAX_TEXT_BYTES) -> str:
    """Reads a UTF-8 file that is not larger than `limit`."""
    with errors_named(file):
        return read_bytes(file, limit=limit).decode("utf-8")


def read_json_object(file: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object."""
    text = read_text(file)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise unreadable(file, f"it is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise unreadable(file, f"it holds {_kind(content)}, expected a JSON object")
    return content


def read_torch_file(file: Path) -> Any:
    """Reads a file of `torch.save` that holds tensors and plain values, mapped into memory.

    The pickle inside cannot name code: torch would refuse it, and here it is an error.
    """
    import torch

    check_file(file)
    is_zip = zipfile.is_zipfile(file)  # older files are not, and cannot be mapped
    with errors_named(file):
        if is_zip:
            _check_records(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Reads a file of tensors by name, in safetensors' or in torch's format as its name says."""
    if file.suffix != ".safetensors":
        return _tensors_by_name(read_torch_file(file), file)
    from safetensors.torch import load_file

    check_file(file)
    with errors_named(file):
        return load_file(file)


def check_finite(source: Path, name: str, tensor: torch.Tensor) -> None:
    """Raises a DataError if a weight is NaN or infinite.

    The check reads the tensor once, at the speed of memory, and copies nothing.

    Args:
        source: the file or folder that the tensor was read from.
    """
    import torch

    if not tensor.numel() or tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return
    if torch.stack(tensor.detach().aminmax()).isfinite().all():
        return
    raise DataError(
        f"{source}: {name} is not finite (NaN or infinite); the training that wrote it diverged, "
        f"or a conversion to float16 overflowed: take an earlier checkpoint, or convert it again"
    )


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Reads a checkpoint of a run; its `state_dict` holds tensors by name."""
    stored = read_torch_file(file)
    if not isinstance(stored, dict) or "state_dict" not in stored:
        raise DataError(
            f"{file} cannot be read as a checkpoint of this package: it has no state_dict"
        )
    return {**stored, "state_dict": _tensors_by_name(stored["state_dict"], file)}


@contextmanager
def errors_named(file: Path) -> Iterator[None]:
    """Turns what readers raise in the block for a damaged file into a DataError of one line."""
    try:
        yield
    except DataError:
        raise
    except pickle.UnpicklingError as error:
        # Torch's message advises to execute the file.
        name = REFUSED_NAME.search(str(error))
        named = f" ({name[1]})" if name else ""
        raise unreadable(
            file, f"its pickle names code{named} or is damaged, and nothing of it was executed"
        ) from None
    except Exception as error:
        # Unpickling damaged bytes can raise whatever a constructor raises, so that no list of
        # exceptions is complete.
        reason = " ".join(str(error).split())[:MAX_REASON]
        if "weights_only" in reason:  # torch's advice to execute the file
            reason = "it is not a file of torch.save"
        elif " " not in reason:  # a KeyError, for instance, says no more than the key
            reason = f"it makes no sense, {type(error).__name__} {reason}"
        raise unreadable(file, reason) from None


def _check_records(file: Path) -> None:
    """Verifies the checksums of all records but the tensors; torch does not."""
    with zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            folder, name = os.path.split(record.filename)
            if os.path.basename(folder) == "data" and name.isdigit():
                continue
            if record.compress_type != zipfile.ZIP_STORED or record.file_size > MAX_RECORD_BYTES:
                raise unreadable(file, f"its record {record.filename} is not one of torch.save")
            archive.read(record)


def _tensors_by_name(stored: Any, file: Path) -> dict[str, torch.Tensor]:
    import torch

    if not isinstance(stored, Mapping):
        raise unreadable(file, f"it holds {_kind(stored)}, expected tensors by name")
    for name, tensor in stored.items():
        is_dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        if not isinstance(name, str) or not is_dense:
            raise unreadable(file, f"its entry {name!r:.100} is {_kind(tensor)}, expected a tensor")
    return dict(stored)


def _kind(value: Any) -> str:
    return f"a value of type {type(value).__name__}"
