"""Writes checkpoints in the format of the published checkpoints, shard by shard.

The original Qwen-VL code, and software that supports it, can load them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from qwenvl_lit.models.byte_pairs import read_ranks
from qwenvl_lit.models.checkpoint_files import (
    COMPANIONS,
    CONFIG,
    GPTQ_CONFIG,
    INDEX,
)
from qwenvl_lit.models.qwen_vl.checkpoint import VOCABULARY
from qwenvl_lit.models.qwen_vl.config import QwenVLConfig
from qwenvl_lit.models.stored_tensors import StoredTensor
from qwenvl_lit.models.weight_files import (
    SHARD_BYTES,
    Read,
    stored_reader,
    write_json,
    write_shards,
)
from qwenvl_lit.stored_files import read_json_object
from qwenvl_lit.types import DataError
from qwenvl_lit.value_types import brief, matches

# Settings of the published config.json that `QwenVLConfig` does not have.
PUBLISHED_CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "attn_dropout_prob": 0.0,
    "emb_dropout_prob": 0.0,
    "no_bias": True,
    "onnx_safe": None,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "softmax_in_fp32": False,
    "tokenizer_class": "QWenTokenizer",
    "transformers_version": "4.31.0",
    "use_flash_attn": False,
}
PUBLISHED_GENERATION = {
    "chat_format": "chatml",
    "do_sample": True,
    "max_new_tokens": 512,
    "max_window_size": 6144,
    "top_k": 0,
    "top_p": 0.3,
    "transformers_version": "4.31.0",
}
PUBLISHED_TOKENIZER = {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer"}
# Classes of the published Python files. A folder names them before it has the files, so that
# copying these into it is enough.
PUBLISHED_CODE = {
    "AutoConfig": "configuration_qwen.QWenConfig",
    "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
}
TOKENIZER_CODE = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
FLAGS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
FONT = "*.ttf"  # the original tokenizer draws boxes with this font
NOT_COPIED = ("config.json", "adapter_config.json", GPTQ_CONFIG)
# Names of the input projections of the resampler, which are a single tensor in files.
PROJECTION = re.compile(r"attn\.([qkv])_proj\.")


def file_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes that the network's tensors have in checkpoint files."""
    shapes = {}
    for name, tensor in model.state_dict().items():
        projection = PROJECTION.search(name)
        if projection is None:
            shapes[name] = tuple(tensor.shape)
        elif projection[1] == "q":
            shapes[name.replace("q_proj.", "in_proj_")] = (3 * tensor.shape[0], *tensor.shape[1:])
    if model.config.tie_word_embeddings:
        for name in model._tied_weights_keys:
            del shapes[name]
    return shapes


def reader(tensors: Mapping[str, StoredTensor | torch.Tensor], dtype: torch.dtype) -> Read:
    """Returns a function that reads stored tensors by their names in the network."""
    read_stored = stored_reader(tensors, dtype)

    def read(name: str) -> torch.Tensor:
        projection = PROJECTION.search(name)
        if projection is None:
            return read_stored(name)
        joined = read_stored(name.replace(f"{projection[1]}_proj.", "in_proj_"))
        return joined.chunk(3)["qkv".index(projection[1])]

    return read


def read_as_stored(read: Read, name: str) -> torch.Tensor:
    """Reads a tensor by its name in files. Joins the resampler's three input projections."""
    # `attn.in_proj.` of the vision tower does not match. It is a single tensor in the network.
    prefix, projections, kind = name.rpartition("attn.in_proj_")
    if not projections:
        return read(name)
    return torch.cat([read(f"{prefix}attn.{letter}_proj.{kind}") for letter in "qkv"])


def write_weights(
    read: Read,
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
    *,
    dtype: torch.dtype,
    kind: Literal["safetensors", "bin"] = "safetensors",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the weights as shards with an index; see `write_shards`.

    Args:
        read: reads a tensor by its name in the network.
    """

    def stored(name: str) -> torch.Tensor:
        return read_as_stored(read, name)

    write_shards(stored, shapes, folder, dtype=dtype, kind=kind, shard_bytes=shard_bytes)


def write_companions(
    folder: Path,
    config: QwenVLConfig,
    *,
    dtype: str,
    vocabulary: Path,
    base: Path | None,
    template: str,
) -> None:
    """Writes all files of a published checkpoint other than the weights.

    These are the configs and the vocabulary, and the code and license if `base` has them.

    Args:
        base: the folder of the base checkpoint, if any.
        template: the prompt format with which the weights were trained.
    """
    if base is not None:
        _copy_companions(base, folder)
    shutil.copyfile(vocabulary, folder / VOCABULARY)
    stored: dict[str, Any] = {}
    if base is not None:
        stored = read_json_object(base / CONFIG)
    auto_map = stored.pop("auto_map", {})
    if not matches(auto_map, dict[str, str | list[str | None]]):
        raise DataError(f"{base}/{CONFIG}: auto_map is {brief(auto_map)}, expected classes by name")
    code = {**PUBLISHED_CODE, **runnable(auto_map, folder)}
    settings = published_config(config, stored, dtype=dtype)
    write_json(folder / CONFIG, {**settings, "auto_map": code})
    end_of_text = len(read_ranks(vocabulary))  # `<|endoftext|>` is the first token after the ranks
    _write_generation(folder / "generation_config.json", end_of_text, template)
    _write_tokenizer(folder / "tokenizer_config.json")


def _copy_companions(base: Path, folder: Path) -> None:
    for pattern in (*COMPANIONS, FONT):
        for file in base.glob(pattern):
            is_index = file.name.endswith(INDEX.format(""))
            if not is_index and file.name not in NOT_COPIED:
                shutil.copyfile(file, folder / file.name)


def _write_generation(file: Path, end_of_text: int, template: str) -> None:
    """Writes the published generation settings with `template`.

    If the file was copied from the base checkpoint, only its template is changed.
    """
    if not file.exists():
        ids = dict.fromkeys(("eos_token_id", "pad_token_id"), end_of_text)
        write_json(file, {**PUBLISHED_GENERATION, "chat_format": template, **ids})
    stored = read_json_object(file)
    if stored.get("chat_format") != template:
        write_json(file, {**stored, "chat_format": template})


def _write_tokenizer(file: Path) -> None:
    """Writes the published tokenizer settings, or adds the classes to those of the base."""
    stored = read_json_object(file) if file.exists() else {}
    if not stored.get("auto_map"):
        write_json(file, {**PUBLISHED_TOKENIZER, **stored, "auto_map": TOKENIZER_CODE})


def published_config(
    config: QwenVLConfig, stored: Mapping[str, Any], *, dtype: str
) -> dict[str, Any]:
    """Returns the content of `config.json` for the original Qwen-VL code, without `auto_map`.

    Args:
        stored: the `config.json` of the base checkpoint, whose additional settings are kept.
    """
    settings = {**PUBLISHED_CONFIG, **stored}
    for key in ("auto_map", "dtype", "_name_or_path", "quantization_config"):
        settings.pop(key, None)
    for key, value in config.to_dict().items():
        if key in QwenVLConfig.__annotations__ and value is not None:
            settings[key] = value
    settings |= {flag: name == dtype for flag, name in FLAGS.items()}
    fixed = {
        "architectures": PUBLISHED_CONFIG["architectures"],
        "model_type": config.model_type,
        "torch_dtype": dtype,
    }
    return {**settings, **fixed}


def runnable(auto_map: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the entries of `auto_map` whose Python files are in `folder`.

    Repository names are removed, so that the classes are loaded from the folder.
    """
    available: dict[str, Any] = {}
    for name, classes in auto_map.items():
        references = classes if isinstance(classes, list) else [classes]
        local = [reference and reference.rpartition("--")[2] for reference in references]
        if all(_has_code(folder, reference) for reference in local):
            available[name] = local if isinstance(classes, list) else local[0]
    return available


def _has_code(folder: Path, reference: str | None) -> bool:
    """Returns whether `folder` has the module of "module.Class". None refers to no class."""
    return reference is None or (folder / f"{reference.rpartition('.')[0]}.py").exists()
