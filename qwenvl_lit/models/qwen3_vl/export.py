"""Writes checkpoints in the format of the published checkpoints, which plain transformers loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from qwenvl_lit.models.checkpoint_files import COMPANIONS, CONFIG, GPTQ_CONFIG, INDEX
from qwenvl_lit.models.checkpoint_files import GENERATION as GENERATION_CONFIG
from qwenvl_lit.models.qwen3_vl.checkpoint import (
    PREPROCESSOR,
    PROCESSOR,
    TEMPLATES,
    TOKENIZER_CONFIG,
    network_name,
    network_shapes,
    published_name,
)
from qwenvl_lit.models.qwen3_vl.config import ARCHITECTURES, GENERATION, chat_template
from qwenvl_lit.models.qwen3_vl.images import FRAMES
from qwenvl_lit.models.qwen3_vl.processor import Qwen3VLProcessor
from qwenvl_lit.models.qwen3_vl.tokenizer import TOKENIZER, Qwen2Tokenizer, tokenizer_json
from qwenvl_lit.models.weight_files import Read, check_disk, write_json, write_shards
from qwenvl_lit.stored_files import read_json_object

NOT_COPIED = ("config.json", "adapter_config.json", GPTQ_CONFIG)
NOT_WRITTEN = (
    "_name_or_path",
    "_attn_implementation",
    "auto_map",
    "quantization_config",
    "transformers_version",
)


def write_weights(read: Read, model: PreTrainedModel, folder: Path, *, dtype: torch.dtype) -> None:
    """Writes the weights as shards under their published names.

    Args:
        read: reads a tensor by its name in the network.
        model: the network on the meta device.

    Raises:
        DataError: the disk does not have enough free space.
    """
    shapes = {}
    for name, shape in network_shapes(model).items():
        shapes[published_name(name, model.config.model_type)] = shape
    check_disk(folder, shapes, dtype)
    write_shards(lambda stored: read(network_name(stored)), shapes, folder, dtype=dtype)


def write_companions(
    folder: Path,
    config: PreTrainedConfig,
    processor: Qwen3VLProcessor,
    *,
    dtype: torch.dtype,
    base: Path | None,
) -> None:
    """Writes all files of a published checkpoint other than the weights.

    Args:
        processor: with the vocabulary and the settings of images that the weights were trained
            with.
        base: the folder of the base checkpoint, if any. Its files are copied.
    """
    stored: dict[str, Any] = {}
    if base is not None:
        _copy_companions(base, folder)
        stored = read_json_object(base / CONFIG)
    write_json(folder / CONFIG, _config(config, stored, str(dtype).removeprefix("torch.")))
    _write_tokenizer(folder, processor, base)
    if not (folder / GENERATION_CONFIG).exists():
        ids = {"bos_token_id": processor.pad_id, "pad_token_id": processor.pad_id}
        ids["eos_token_id"] = list(processor.stop_ids)
        write_json(folder / GENERATION_CONFIG, {**GENERATION[config.model_type], **ids})
    if not any((folder / name).exists() for name in TEMPLATES[:2]) and base is None:
        template = chat_template(config.model_type, thinks=processor.thinks)
        (folder / TEMPLATES[0]).write_text(template, encoding="utf-8")
    _write_image_settings(folder, processor)


def _copy_companions(base: Path, folder: Path) -> None:
    for pattern in COMPANIONS:
        for file in base.glob(pattern):
            is_index = file.name.endswith(INDEX.format(""))
            if not is_index and file.name not in NOT_COPIED:
                shutil.copyfile(file, folder / file.name)


def _config(config: PreTrainedConfig, stored: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Returns the content of `config.json`: that of the base, or else the settings of `config`."""
    settings = stored or config.to_dict()
    settings = {key: value for key, value in settings.items() if key not in NOT_WRITTEN}
    for name in ("text_config", "vision_config"):
        if isinstance(settings.get(name), dict):
            part = {key: value for key, value in settings[name].items() if key not in NOT_WRITTEN}
            settings[name] = {**part, **({"dtype": dtype} if "dtype" in part else {})}
    settings.pop("torch_dtype", None)
    return {**settings, "architectures": [ARCHITECTURES[config.model_type]], "dtype": dtype}


def _write_tokenizer(folder: Path, processor: Qwen3VLProcessor, base: Path | None) -> None:
    tokenizer: Qwen2Tokenizer = processor.tokenizer
    if base is None or tokenizer.path != base / TOKENIZER:
        write_json(folder / TOKENIZER, tokenizer_json(tokenizer.vocabulary))
    if not (folder / TOKENIZER_CONFIG).exists():
        settings = {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "additional_special_tokens": [*tokenizer.special],
        }
        write_json(folder / TOKENIZER_CONFIG, settings)


def _write_image_settings(folder: Path, processor: Qwen3VLProcessor) -> None:
    """Writes the limits of pixels with which the weights were trained."""
    images = processor.images
    limits: dict[str, Any] = {"min_pixels": images.min_pixels, "max_pixels": images.max_pixels}
    limits["size"] = {"shortest_edge": images.min_pixels, "longest_edge": images.max_pixels}
    nested = folder / PROCESSOR
    if nested.exists():
        stored = read_json_object(nested)
        if isinstance(stored.get("image_processor"), dict):
            changed = {**stored["image_processor"], **limits}
            write_json(nested, {**stored, "image_processor": changed})
    settings: dict[str, Any] = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": images.patch_size,
        "merge_size": images.merge_size,
        "temporal_patch_size": FRAMES,
        "image_mean": list(images.mean),
        "image_std": list(images.std),
    }
    file = folder / PREPROCESSOR
    if file.exists():
        settings |= read_json_object(file)
    write_json(file, {**settings, **limits})
