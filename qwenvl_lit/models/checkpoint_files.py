"""Files of a full model: finds its folder, fetches it from the hub, and lists its tensors.

A checkpoint is checked for completeness before any weights are read.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import GenerationConfig

from qwenvl_lit.models.gptq import join_packed
from qwenvl_lit.models.quantized_files import (
    CONFIG,
    GGUF,
    GPTQ_CONFIG,
    check_not_gguf,
    not_read,
    read_gptq,
)
from qwenvl_lit.models.stored_tensors import StoredTensor, open_shard
from qwenvl_lit.stored_files import errors_named, read_json_object
from qwenvl_lit.types import DataError
from qwenvl_lit.value_types import brief, matches, type_name

log = logging.getLogger(__name__)

# The first base class is the error of the HTTP client that huggingface_hub uses, httpx or httpx2.
NETWORK_ERRORS = (*HfHubHTTPError.__bases__, OSError)

GENERATION = "generation_config.json"
INDEX = "{}.index.json"
# Looked for in this order, each as one file or as shards that its INDEX lists.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Further names of weights, those of AutoGPTQ: gptq_model-4bit-128g.safetensors
GPTQ_WEIGHTS = re.compile(r"gptq_model-\d+bit-(-1|\d+)g\.(safetensors|bin)")
# The small files of a repository. An export copies some of them.
COMPANIONS = ("*.json", "*.tiktoken", "*.jinja", "*.py", "merges.txt", "LICENSE*", "NOTICE*")
GENERATION_TYPES: dict[str, Any] = {
    "chat_format": str,
    "max_window_size": int,
    "max_new_tokens": int | None,
    "do_sample": bool,
    "top_k": int | None,
    "top_p": float | None,
    "temperature": float | None,
    "repetition_penalty": float | None,
}
SHOWN_NAMES = 8  # of tensors, in an error message


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """The published checkpoints of a family.

    Args:
        vocabulary: the file of the vocabulary.
        example: the name of one of them on the hub.
        size: of their weights, for messages.
        check: raises a DataError unless the `config.json` of a folder is of this family.
    """

    vocabulary: str
    example: str
    size: str
    check: Callable[[Path], Any]

    @property
    def instead(self) -> str:
        """What to take in place of weights that are not read, for messages."""
        return f"such as {self.example}"


def find_checkpoint(
    path: str, published: Published, *, download: bool = True, vocabulary: str | None = None
) -> Path:
    """Returns the folder of a checkpoint.

    This is `path` itself, or the folder of a hub name in the hub's cache, which is completed first.
    Offline (`HF_HUB_OFFLINE=1`) or without `download` nothing is fetched. A broken connection is
    resumed, and after a failed download the files that have arrived are not fetched again.

    Args:
        vocabulary: a vocabulary from elsewhere, with which the checkpoint need not have its own.

    Raises:
        DataError: there is no such folder or name, it holds another model, files are missing, or
            the disk is too small.
    """
    check_not_gguf(path, published.instead)
    needed = [CONFIG] if vocabulary else [CONFIG, published.vocabulary]
    folder = Path(path).expanduser()
    if folder.is_dir():
        if (folder / CONFIG).exists():
            published.check(folder)
        if missing := missing_files(folder, needed):
            hint = f"; {_vocabulary_hint(published)}" if published.vocabulary in missing else ""
            raise DataError(
                f"the folder {path} lacks {', '.join(missing)}; expected config.json, "
                f"{published.vocabulary}, and weights as {' or '.join(WEIGHTS)}, or as shards with "
                f"an index{hint}"
            )
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise DataError(
            f"{path} is no folder, relative to {Path.cwd()}, and no hub name such as "
            f"{published.example}; name the model, or the base model of an adapter, with "
            f"model.path= (base_model= in Python)"
        )
    cached = _cached(path)
    missing = [*needed, "the weights"]
    if cached:
        missing = missing_files(cached, needed)
    if cached and not missing:
        return cached
    reason = None
    if not download:
        reason = "is not to be fetched (model.download=false)"
    elif constants.is_offline_mode():
        reason = "cannot be fetched: offline mode is on (HF_HUB_OFFLINE)"
    if reason:
        raise DataError(
            f"{path} is not complete in {constants.HF_HUB_CACHE}: it lacks {', '.join(missing)}, "
            f"and {reason}. The published checkpoints are {published.size}; fetch with:  "
            f"hf download {path}   (or name a folder that has it)"
        )
    return _download(path, published, needed)


def _vocabulary_hint(published: Published) -> str:
    return (
        f"a copy of the vocabulary from elsewhere, such as {published.example}, can be named with "
        f"model.vocabulary=FILE"
    )


def missing_files(folder: Path, needed: Iterable[str]) -> list[str]:
    """Returns the names of the files that a folder lacks to be a checkpoint.

    If its weights have an index, these include the shards that the index lists.

    Args:
        needed: files that it must have besides its weights.
    """
    missing = [name for name in needed if not (folder / name).exists()]
    kinds = _kinds(file.name for file in folder.iterdir())
    if any((folder / name).exists() for name in kinds):
        return missing
    for name in kinds:
        index = folder / INDEX.format(name)
        if index.exists():
            shards = sorted(set(_weight_map(index).values()))
            return missing + [shard for shard in shards if not (folder / shard).exists()]
    return [*missing, "the weights"]


def _kinds(files: Iterable[str]) -> list[str]:
    """Returns the names that the weights among `files` may have, as one file or as shards."""
    names = {file.removesuffix(INDEX.format("")) for file in files}
    return [*WEIGHTS, *sorted(filter(GPTQ_WEIGHTS.fullmatch, names), reverse=True)]


def _cached(name: str) -> Path | None:
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (FileNotFoundError, HFValidationError):  # LocalEntryNotFoundError is a FileNotFoundError
        return None


def _download(name: str, published: Published, needed: Collection[str]) -> Path:
    try:
        siblings = HfApi().model_info(name, files_metadata=True).siblings or ()
        sizes = {file.rfilename: file.size or 0 for file in siblings}
        weights = _weight_files(sizes)
        if not weights and (gguf := [file for file in sizes if file.endswith(".gguf")]):
            raise not_read(f"{name} on the hub ({gguf[0]})", GGUF, published.instead)
        if not weights or not sizes.keys() >= set(needed):
            hint = "" if not weights else f"; {_vocabulary_hint(published)}"
            raise DataError(
                f"{name} on the hub is no checkpoint with weights and {' and '.join(needed)}: it "
                f"has {', '.join(sorted(sizes))}{hint}"
            )
        # Another model is refused before its weights are fetched.
        configs = [hf_hub_download(name, file) for file in (GPTQ_CONFIG, CONFIG) if file in sizes]
        if CONFIG in sizes:
            published.check(Path(configs[-1]).parent)
        size = sum(sizes[file] for file in weights)
        cache = Path(constants.HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(cache).free) < size:
            raise DataError(
                f"{name} takes {size / 1e9:.1f} GB, and {cache} has {free / 1e9:.1f} GB left; "
                f"set HF_HOME to a larger disk"
            )
        if os.environ.get("LOCAL_RANK", "0") == "0":
            count = len(weights)
            log.warning("downloading %s: %.1f GB in %d files to %s", name, size / 1e9, count, cache)
        return Path(snapshot_download(name, allow_patterns=[*COMPANIONS, *weights]))
    except NETWORK_ERRORS as error:
        raise DataError(
            f"{name} is no folder, relative to {Path.cwd()}, and could not be fetched from "
            f"{constants.ENDPOINT}: {error}; check the name, or start again after an interrupted "
            f"download, whose files are kept"
        ) from error


def _weight_files(files: Iterable[str]) -> list[str]:
    """Returns the names of a repository's weights: one file, or the shards of one format."""
    names = list(files)
    for kind in _kinds(names):
        if kind in names or INDEX.format(kind) in names:
            pattern = re.escape(kind).replace(r"\.", r"(-\d+-of-\d+)?\.", 1)
            return [name for name in names if re.fullmatch(pattern, name)]
    return []


def stored_tensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    published: Published,
    *,
    rename: Callable[[str], str] | None = None,
    optional: Collection[str] = (),
) -> dict[str, StoredTensor]:
    """Returns the tensors of a checkpoint by name, not read yet.

    Weights that GPTQ quantized are dequantized when they are read.

    Args:
        shapes: the tensors that the network expects.
        rename: converts the names in files to those in `shapes`.
        optional: names of further tensors that are not read.

    Raises:
        DataError: a file is broken, or tensors are missing, unexpected or of another shape. The
            message names them.
    """
    tensors: dict[str, StoredTensor] = {}
    for stored_name, tensor in _stored(folder, shapes, published, rename).items():
        name = rename(stored_name) if rename else stored_name
        if name in shapes or name not in optional:
            tensors[name] = tensor
    other_shape: list[str] = []
    for name, expected in shapes.items():
        if name in tensors and (shape := tensors[name].shape) != expected:
            other_shape.append(f"{name} {shape}, expected {expected}")
    faults = [
        _listed("missing", [name for name in shapes if name not in tensors]),
        _listed("unexpected", [name for name in tensors if name not in shapes]),
        _listed("of another shape", other_shape),
    ]
    if any(faults):
        raise DataError(
            f"{folder} does not hold this network's tensors. {'; '.join(filter(None, faults))}. "
            f"Is config.json that of these weights?"
        )
    return tensors


def _stored(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    published: Published,
    rename: Callable[[str], str] | None,
) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by their names in files."""
    stored = {name: StoredTensor(file, name) for name, file in _files(folder).items()}
    settings = read_gptq(folder, published.instead)
    if settings:
        return join_packed(stored, settings, lambda name: (rename or str)(name) in shapes)
    packed = next((name for name in stored if name.endswith(".qweight")), None)
    if packed:
        raise not_read(
            stored[packed].file,
            f"quantized ({packed}) by GPTQ or AWQ, but neither {CONFIG} nor {GPTQ_CONFIG} says how",
            published.instead,
        )
    return stored


def _listed(fault: str, names: list[str]) -> str:
    if not names:
        return ""
    more = ", ..." if len(names) > SHOWN_NAMES else ""
    return f"{fault} {len(names)}: {', '.join(names[:SHOWN_NAMES])}{more}"


def settings_of_types(
    file: Path, settings: Mapping[str, Any], types: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the settings of `file` that are in `types`.

    Raises:
        DataError: one of them has a value of another type.
    """
    known: dict[str, Any] = {}
    for name, expected in types.items():
        if name not in settings:
            continue
        if not matches(settings[name], expected):
            raise DataError(
                f"{file}: {name} is {brief(settings[name])}, expected {type_name(expected)}; "
                f"is the file damaged?"
            )
        known[name] = settings[name]
    return known


def read_generation_config(folder: Path) -> GenerationConfig:
    """Reads `generation_config.json` of a checkpoint; transformers' defaults without the file.

    Raises:
        DataError: the file is damaged.
    """
    file = folder / GENERATION
    if not file.exists():
        return GenerationConfig()
    settings = read_json_object(file)
    settings_of_types(file, settings, GENERATION_TYPES)
    with errors_named(file):
        return GenerationConfig.from_dict(settings)


def _files(folder: Path) -> dict[str, Path]:
    for name in _kinds(file.name for file in folder.iterdir()):
        if (folder / name).exists():
            return dict.fromkeys(open_shard(folder / name), folder / name)
        if (index := folder / INDEX.format(name)).exists():
            return {tensor: folder / file for tensor, file in _weight_map(index).items()}
    raise DataError(f"{folder} holds no weights")


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor; files are in the folder of the index."""
    weight_map = read_json_object(index).get("weight_map")
    if not matches(weight_map, dict[str, str]):
        raise DataError(f"{index} is no index of shards: it has no weight_map; fetch it again")
    for file in weight_map.values():
        if file != os.path.basename(file):
            raise DataError(f"{index} names {brief(file)}, which is not a file beside it")
    return weight_map
