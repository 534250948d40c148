"""Checkpoints in the published layout: found in a folder, in the hub's cache or on the hub; checked before a byte of weights is read."""

from __future__ import annotations

import inspect
import json
import logging
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from qwenvl_lit.types import DataError

log = logging.getLogger(__name__)
NETWORK_ERRORS = (
    *HfHubHTTPError.__bases__,
    OSError,
)  # the first is of the HTTP client that huggingface_hub uses, httpx or httpx2

VOCABULARY = "qwen.tiktoken"
WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
)  # in this order; each also as INDEX that names shards
INDEX = "{}.index.json"
COMPANIONS = (
    "*.json",
    "*.tiktoken",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)  # small files of a repository; some are needed to export it again
PUBLISHED_GB = 19.3  # of Qwen-VL and Qwen-VL-Chat: 9.657 B parameters of two bytes


def find_checkpoint(path: str, *, download: bool = True) -> Path:
    """The folder of a checkpoint: `path` itself, or a hub name's folder in the hub's cache, filled first if it is not complete there.

    Offline (`HF_HUB_OFFLINE=1`) and with `download` False, nothing is fetched. A connection that breaks is taken up again; after
    a download that failed, the files that had arrived are not fetched again.

    Raises:
        DataError: no such folder or name, files are missing, or the disk is too small.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if missing := missing_files(folder):
            raise DataError(
                f"the folder {path} lacks {', '.join(missing)}; expected config.json, {VOCABULARY}, and weights as "
                f"{' or '.join(WEIGHTS)}, or as shards with an index"
            )
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise DataError(
            f"{path} is no folder, seen from {Path.cwd()}, and no hub name such as Qwen/Qwen-VL-Chat"
        )
    cached = _cached(path)
    missing = missing_files(cached) if cached else ["config.json", VOCABULARY, "the weights"]
    if cached and not missing:
        return cached
    if not download or constants.is_offline_mode():
        why = (
            "is not to be fetched (download=false)"
            if not download
            else "cannot be fetched: offline mode is on (HF_HUB_OFFLINE)"
        )
        raise DataError(
            f"{path} is not complete in {constants.HF_HUB_CACHE}: it lacks {', '.join(missing)}, and {why}. The published checkpoints are "
            f"{PUBLISHED_GB} GB; fetch with:  hf download {path}   (or name a folder that has it)"
        )
    return _downloaded(path)


def missing_files(folder: Path) -> list[str]:
    """Names of what a folder lacks to be a checkpoint; of weights, the shards that its index lists."""
    missing = [name for name in ("config.json", VOCABULARY) if not (folder / name).exists()]
    index = next(
        (folder / INDEX.format(name) for name in WEIGHTS if (folder / INDEX.format(name)).exists()),
        None,
    )
    if any((folder / name).exists() for name in WEIGHTS):
        return missing
    if index is None:
        return [*missing, "the weights"]
    return missing + [
        name for name in sorted(set(_weight_map(index).values())) if not (folder / name).exists()
    ]


def _cached(name: str) -> Path | None:
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (FileNotFoundError, HFValidationError):  # LocalEntryNotFoundError is a FileNotFoundError
        return None


def _downloaded(name: str) -> Path:
    try:
        files = {
            file.rfilename: file.size or 0
            for file in HfApi().model_info(name, files_metadata=True).siblings or ()
        }
        kind = next(
            (kind for kind in WEIGHTS if kind in files or INDEX.format(kind) in files), None
        )
        if kind is None or VOCABULARY not in files:
            raise DataError(
                f"{name} on the hub is no Qwen-VL checkpoint: it has {', '.join(sorted(files))}"
            )
        weights = [
            file
            for file in files
            if re.fullmatch(re.escape(kind).replace(r"\.", r"(-\d+-of-\d+)?\.", 1), file)
        ]
        size = sum(files[file] for file in weights)
        target = Path(constants.HF_HUB_CACHE)
        target.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(target).free) < size:
            raise DataError(
                f"{name} takes {size / 1e9:.1f} GB, and {target} has {free / 1e9:.1f} GB left; set HF_HOME to a larger disk"
            )
        if os.environ.get("LOCAL_RANK", "0") == "0":
            log.warning(
                "downloading %s: %.1f GB in %d files to %s", name, size / 1e9, len(weights), target
            )
        return Path(snapshot_download(name, allow_patterns=[*COMPANIONS, *weights]))
    except NETWORK_ERRORS as error:
        raise DataError(
            f"{name} could not be fetched from {constants.ENDPOINT}: {error}\nFiles that have arrived are kept; start again."
        ) from error


def stored_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name, not read yet.

    Args:
        shapes: what the network expects, by name.

    Raises:
        DataError: a file is broken, or tensors are missing, unexpected or of another shape; all are named.
    """
    tensors = {name: StoredTensor(file, name) for name, file in _files(folder).items()}
    missing = [name for name in shapes if name not in tensors]
    unexpected = [name for name in tensors if name not in shapes]
    found = {name: tensors[name].shape for name in shapes if name in tensors}
    misshapen = [
        f"{name} {found[name]}, expected {shapes[name]}"
        for name in found
        if found[name] != shapes[name]
    ]
    faults = [
        f"{what} {len(names)}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]
    if faults:
        raise DataError(
            f"{folder} does not hold this network's tensors. {'; '.join(faults)}. Is config.json that of these weights?"
        )
    return tensors


class StoredTensor:
    """A tensor in a file. Indexing reads it, which is how transformers reads the slices of safetensors, one after the other."""

    def __init__(self, file: Path, name: str):
        self.file = file
        self.name = name

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor()[index]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._tensor().shape)

    def _tensor(self) -> torch.Tensor:
        tensors = open_shard(self.file)
        if self.name not in tensors:
            raise DataError(
                f"{self.file} lacks {self.name}, which the index promises there; fetch the file again"
            )
        return tensors[self.name]


NF4: Mapping[str, Any] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}


def bnb_config(
    settings: Mapping[str, Any], *, dtype: torch.dtype, but: Sequence[str]
) -> BitsAndBytesConfig:
    """How transformers holds linear layers in few bits, all `but` the named ones, and computes in `dtype`.

    Raises:
        ValueError: bitsandbytes is not installed, or does not know a setting.
    """
    known = inspect.signature(BitsAndBytesConfig).parameters
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(
            f"quantization: BitsAndBytesConfig has no {', '.join(unknown)}, but {', '.join(known)}"
        )
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "holding weights in few bits needs bitsandbytes: pip install -c constraints.txt -e '.[quant]'"
        ) from error
    return BitsAndBytesConfig(
        **{"bnb_4bit_compute_dtype": dtype, "llm_int8_skip_modules": list(but), **settings}
    )


@lru_cache(
    maxsize=2
)  # neighbouring tensors share a shard; more open ones would count as memory in use
def open_shard(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, mapped into memory: a page is read when it is touched, and shared by all processes.

    Raises:
        DataError: the file is incomplete, or not what its name says.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(
            f"{file} cannot be read: {error}; is it complete? Fetch it again"
        ) from error


def _files(folder: Path) -> dict[str, Path]:
    for name in WEIGHTS:
        if (folder / name).exists():
            return dict.fromkeys(open_shard(folder / name), folder / name)
        if (index := folder / INDEX.format(name)).exists():
            return {tensor: folder / file for tensor, file in _weight_map(index).items()}
    raise DataError(f"{folder} holds no weights")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{index} is no index of shards: {error!r}; fetch it again") from error
