"""The checkpoints of Qwen2.5-VL and Qwen3-VL: finds them, and reads their settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from qwenvl_lit.models import checkpoint_files
from qwenvl_lit.models.checkpoint_files import (
    CONFIG,
    Published,
    settings_of_types,
)
from qwenvl_lit.models.quantized_files import read_gptq
from qwenvl_lit.models.qwen3_vl.config import CONFIGS, IMAGES
from qwenvl_lit.models.qwen3_vl.images import FRAMES, ImageProcessor
from qwenvl_lit.models.qwen3_vl.tokenizer import TOKENIZER
from qwenvl_lit.models.stored_tensors import StoredTensor
from qwenvl_lit.stored_files import errors_named, read_json_object, read_text
from qwenvl_lit.types import DataError
from qwenvl_lit.value_types import brief

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"  # newer transformers write the image processor into it
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATES = ("chat_template.jinja", "chat_template.json", TOKENIZER_CONFIG)
PREPROCESSOR_TYPES: dict[str, Any] = {
    **dict.fromkeys(("min_pixels", "max_pixels"), int | None),
    **dict.fromkeys(("patch_size", "merge_size", "temporal_patch_size", "resample"), int),
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), bool),
    **dict.fromkeys(("image_mean", "image_std"), list[float]),
    "size": dict[str, int | None],
}
# Settings of the published files for which the image processor supports one value only
FIXED = {
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True),
    "temporal_patch_size": FRAMES,
    "resample": 3,  # bicubic
}
OPENS_THOUGHTS = re.compile(r"assistant(?:\\n|\n)<think>")


def find_checkpoint(path: str, *, download: bool = True, vocabulary: str | None = None) -> Path:
    """Returns the folder of a checkpoint; see `checkpoint_files.find_checkpoint`."""
    options: Any = {"download": download, "vocabulary": vocabulary}
    return checkpoint_files.find_checkpoint(path, QWEN3_VL, **options)


def stored_tensors(folder: Path, model: PreTrainedModel) -> dict[str, StoredTensor]:
    """Returns the tensors of a checkpoint by their names in the network, not read yet.

    Raises:
        DataError: see `checkpoint_files.stored_tensors`.
    """
    return checkpoint_files.stored_tensors(
        folder,
        network_shapes(model),
        QWEN3_VL,
        rename=network_name,
        optional=model.all_tied_weights_keys,
    )


def network_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the network's tensors by name, without tensors that are tied."""
    shapes = {}
    for name, tensor in model.state_dict().items():
        if name not in model.all_tied_weights_keys:
            shapes[name] = tuple(tensor.shape)
    return shapes


def network_name(stored: str) -> str:
    """Returns the name in the network of a tensor in a file.

    The published files of Qwen2.5-VL have the names of an older version of transformers.

    >>> network_name("model.norm.weight")
    'model.language_model.norm.weight'
    """
    if stored.startswith("visual."):
        return f"model.{stored}"
    if stored.startswith("model.") and not stored.startswith(("model.language", "model.visual.")):
        return stored.replace("model.", "model.language_model.", 1)
    return stored


def published_name(name: str, model_type: str) -> str:
    """Returns the name in published files of a tensor of the network."""
    if model_type != "qwen2_5_vl":
        return name
    name = re.sub(r"^model\.visual\.", "visual.", name)
    return re.sub(r"^model\.language_model\.", "model.", name)


def read_network_config(folder: Path) -> PreTrainedConfig:
    """Reads the `config.json` of a checkpoint.

    Raises:
        DataError: the file is damaged, describes another network, or weights of a quantization
            that is not read.
    """
    settings = _check_family(folder)
    settings.pop("quantization_config", None)  # transformers would quantize the network
    with errors_named(folder / CONFIG):
        return CONFIGS[settings["model_type"]].from_dict(settings)


def read_image_processor(
    folder: Path | None,
    config: PreTrainedConfig,
    *,
    min_pixels: int | None,
    max_pixels: int | None,
) -> ImageProcessor:
    """Returns the image processor of a checkpoint.

    Args:
        folder: of the checkpoint; without it or its file, the published settings are taken.
        config: of the network.
        min_pixels, max_pixels: in place of those of the checkpoint.

    Raises:
        DataError: the file is damaged, or has a setting that is not supported.
    """
    settings = dict(IMAGES[config.model_type])
    if folder is not None:
        settings |= _stored_image_settings(folder, config)
    return ImageProcessor(
        patch_size=config.vision_config.patch_size,
        merge_size=config.vision_config.spatial_merge_size,
        min_pixels=min_pixels or settings["min_pixels"],
        max_pixels=max_pixels or settings["max_pixels"],
        mean=tuple(settings["image_mean"]),
        std=tuple(settings["image_std"]),
    )


def _stored_image_settings(folder: Path, config: PreTrainedConfig) -> dict[str, Any]:
    file, stored = folder / PREPROCESSOR, {}
    if file.exists():
        stored = read_json_object(file)
    elif (folder / PROCESSOR).exists():
        file = folder / PROCESSOR
        stored = read_json_object(file).get("image_processor", {})
    if not isinstance(stored, Mapping):
        raise DataError(f"{file}: image_processor is {brief(stored)}, expected settings by name")
    settings = settings_of_types(file, stored, PREPROCESSOR_TYPES)
    required = {**FIXED, "patch_size": config.vision_config.patch_size}
    required["merge_size"] = config.vision_config.spatial_merge_size
    for name, value in required.items():
        if settings.get(name, value) != value:
            raise DataError(f"{file}: {name}={settings[name]} is not supported, expected {value}")
    size = settings.get("size", {})
    for name, other in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        value = settings.get(name) or size.get(other)
        if value:
            settings[name] = value
        else:
            settings.pop(name, None)
    for name in ("image_mean", "image_std"):
        if len(settings.get(name, (0, 0, 0))) != 3:
            raise DataError(f"{file}: {name} is {settings[name]}, expected a number per channel")
    return settings


def opens_thoughts(folder: Path) -> bool:
    """Returns whether the chat template of a checkpoint opens `<think>`, as that of Thinking."""
    for name in TEMPLATES:
        file = folder / name
        if not file.exists():
            continue
        text = read_text(file)
        if file.suffix == ".json":
            text = str(read_json_object(file).get("chat_template", ""))
        if OPENS_THOUGHTS.search(text):
            return True
    return False


def _check_family(folder: Path) -> dict[str, Any]:
    """Returns `config.json`, if it describes a network of this family whose weights are read."""
    file = folder / CONFIG
    settings = read_json_object(file)
    found = settings.get("model_type")
    if found not in CONFIGS:
        raise DataError(
            f"{file} is of another model, {brief(found)}; the model_type of Qwen2.5-VL is "
            f"'qwen2_5_vl', and that of Qwen3-VL is 'qwen3_vl': take Qwen/Qwen3-VL-8B-Instruct, "
            f"for example, or a model that was trained from it"
        )
    read_gptq(folder, QWEN3_VL.instead, settings)
    return settings


QWEN3_VL = Published(
    vocabulary=TOKENIZER,
    example="Qwen/Qwen3-VL-8B-Instruct",
    size="4 to 18 GB",
    check=_check_family,
)
