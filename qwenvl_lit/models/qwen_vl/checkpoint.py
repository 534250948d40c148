"""The checkpoints of Qwen-VL: finds them, and reads the sizes of their network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenvl_lit.models import checkpoint_files
from qwenvl_lit.models.checkpoint_files import (
    CONFIG,
    Published,
    settings_of_types,
)
from qwenvl_lit.models.quantized_files import read_gptq
from qwenvl_lit.models.qwen_vl.config import FIXED_SETTINGS, QwenVLConfig
from qwenvl_lit.models.stored_tensors import StoredTensor
from qwenvl_lit.stored_files import read_json_object
from qwenvl_lit.types import DataError
from qwenvl_lit.value_types import brief

VOCABULARY = "qwen.tiktoken"
# What is read of `config.json`: the fields of `QwenVLConfig`, and settings with one possible value
CONFIG_TYPES: dict[str, Any] = {
    **dict.fromkeys(FIXED_SETTINGS, int | float | bool),
    **dict.fromkeys(("use_dynamic_ntk", "use_logn_attn", "use_cache", "tie_word_embeddings"), bool),
    **dict.fromkeys(("rotary_emb_base", "layer_norm_epsilon", "initializer_range"), float),
    **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), int),
    **dict.fromkeys(("kv_channels", "intermediate_size", "seq_length"), int),
    "max_position_embeddings": int,
    "visual": dict[str, float | None],
}
TAKE_QWEN_VL = "take Qwen/Qwen-VL, Qwen/Qwen-VL-Chat or a model that was trained from them"


def find_checkpoint(path: str, *, download: bool = True) -> Path:
    """Returns the folder of a checkpoint; see `checkpoint_files.find_checkpoint`."""
    return checkpoint_files.find_checkpoint(path, QWEN_VL, download=download)


def missing_files(folder: Path) -> list[str]:
    """Returns the names of the files that a folder lacks to be a checkpoint."""
    return checkpoint_files.missing_files(folder, VOCABULARY)


def stored_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, StoredTensor]:
    """Returns the tensors of a checkpoint; see `checkpoint_files.stored_tensors`."""
    return checkpoint_files.stored_tensors(folder, shapes, QWEN_VL)


def read_network_config(folder: Path) -> QwenVLConfig:
    """Reads the sizes of the network from the `config.json` of a checkpoint.

    Its other settings are for transformers' own loaders, which would fetch code that they name.

    Raises:
        DataError: the file is damaged, describes another network, or weights of a quantization
            that is not read.
    """
    file = folder / CONFIG
    settings = _check_family(folder)
    sizes = settings_of_types(file, settings, CONFIG_TYPES)
    try:
        return QwenVLConfig(**sizes)
    except ValueError as error:
        raise DataError(f"{file}: {error}") from error


def _check_family(folder: Path) -> dict[str, Any]:
    """Returns `config.json`, if it describes a Qwen-VL network whose weights are read."""
    file = folder / CONFIG
    settings = read_json_object(file)
    found = settings.get("model_type", QwenVLConfig.model_type)
    if found != QwenVLConfig.model_type:
        raise DataError(
            f"{file} is of another model, {brief(found)}; the model_type of Qwen-VL is "
            f"{QwenVLConfig.model_type!r}: {TAKE_QWEN_VL}"
        )
    if "visual" not in settings:
        raise DataError(
            f"{file} has no `visual`: it is of Qwen, a model without vision tower; {TAKE_QWEN_VL}"
        )
    read_gptq(folder, QWEN_VL.instead, settings)
    return settings


# Qwen-VL and Qwen-VL-Chat have 9.657 B parameters of two bytes.
QWEN_VL = Published(
    vocabulary=VOCABULARY, example="Qwen/Qwen-VL-Chat", size="19.3 GB", check=_check_family
)
