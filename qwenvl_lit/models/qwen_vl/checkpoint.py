"""The checkpoints of Qwen and Qwen-VL: finds them, and reads the sizes of their network."""

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
from qwenvl_lit.models.qwen_vl.config import FIXED_SETTINGS, MAX_LAYERS, QwenVLConfig
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
# Names in the first files of Qwen-7B, of August 2023
OLD_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "ffn_hidden_size": "intermediate_size",
}
TAKE_QWEN_VL = "take Qwen/Qwen-VL, Qwen/Qwen-VL-Chat or a model that was trained from them"


def stored_tensors(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], published: Published
) -> dict[str, StoredTensor]:
    """Returns the tensors of a checkpoint; see `checkpoint_files.stored_tensors`.

    The first files of Qwen-7B have a constant in each block, which is not read.
    """
    constants = [f"transformer.h.{index}.attn.masked_bias" for index in range(MAX_LAYERS)]
    return checkpoint_files.stored_tensors(folder, shapes, published, optional=constants)


def read_network_config(folder: Path, published: Published | None = None) -> QwenVLConfig:
    """Reads the sizes of the network from the `config.json` of a checkpoint.

    Its other settings are for transformers' own loaders, which would fetch code that they name.

    Args:
        published: `QWEN`, or by default `QWEN_VL`.

    Raises:
        DataError: the file is damaged, describes another network, or weights of a quantization
            that is not read.
    """
    file = folder / CONFIG
    settings = (published or QWEN_VL).check(folder)
    for old, new in OLD_NAMES.items():
        if old in settings:
            settings.setdefault(new, settings[old])
    sizes = settings_of_types(file, settings, CONFIG_TYPES)
    try:
        return QwenVLConfig(**sizes)
    except ValueError as error:
        raise DataError(f"{file}: {error}") from error


def _check_qwen_vl(folder: Path) -> dict[str, Any]:
    """Returns `config.json`, if it describes a Qwen-VL network whose weights are read."""
    settings = _check_family(folder, QWEN_VL)
    if settings.get("visual") is None:
        raise DataError(
            f"{folder / CONFIG} has no `visual`: it is of Qwen, a model without vision tower, "
            f"which model=qwen_7b_chat reads; for images {TAKE_QWEN_VL}"
        )
    return settings


def _check_qwen(folder: Path) -> dict[str, Any]:
    """Returns `config.json`, if it describes a Qwen network whose weights are read."""
    settings = _check_family(folder, QWEN)
    if settings.get("visual") is not None:
        raise DataError(
            f"{folder / CONFIG} has `visual`: it is of Qwen-VL, which model=qwen_vl_chat reads"
        )
    return settings


def _check_family(folder: Path, published: Published) -> dict[str, Any]:
    file = folder / CONFIG
    settings = read_json_object(file)
    found = settings.get("model_type", QwenVLConfig.model_type)
    if found != QwenVLConfig.model_type:
        raise DataError(
            f"{file} is of another model, {brief(found)}; the model_type of Qwen-VL is "
            f"{QwenVLConfig.model_type!r}: {TAKE_QWEN_VL}"
        )
    if "audio" in settings:
        raise DataError(
            f"{file} has `audio`: it is of Qwen-Audio, whose audio tower is not read; take "
            f"{published.example}"
        )
    read_gptq(folder, published.instead, settings)
    return settings


# Qwen-VL and Qwen-VL-Chat have 9.657 B parameters of two bytes.
QWEN_VL = Published(
    vocabulary=VOCABULARY, example="Qwen/Qwen-VL-Chat", size="19.3 GB", check=_check_qwen_vl
)
# Qwen-7B has 7.721 B parameters.
QWEN = Published(
    vocabulary=VOCABULARY, example="Qwen/Qwen-7B-Chat", size="15.4 GB (7B)", check=_check_qwen
)
