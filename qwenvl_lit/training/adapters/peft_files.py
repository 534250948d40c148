"""Adapter folders in peft's format: their configuration, their weights and the names of tensors.

The folders may be written by this package, peft, ms-swift or Qwen-VL's own finetune.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwenvl_lit.stored_files import read_json_object, read_tensors
from qwenvl_lit.training.adapters.methods import PEFT_OPTIONS, LoRA
from qwenvl_lit.types import DataError
from qwenvl_lit.value_types import brief, matches, type_name

# Names of the weights file, in the order in which they are looked for
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
CONFIG = "adapter_config.json"
# peft's name of a setting -> the argument of `LoRA`
ARGUMENTS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
}
# Settings that do not change what the adapter computes; the last three are written by ms-swift
IGNORED = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
    "lora_dtype",
    "lorap_emb_lr",
    "lorap_lr_ratio",
)
# Types of the settings, where peft's own are looser or name classes
FIELDS: Mapping[str, Any] = {
    "r": int,
    "lora_alpha": float,
    "lora_dropout": float,
    "target_modules": str | list[str],
    "base_model_name_or_path": str,
    "init_lora_weights": bool | str,
    **PEFT_OPTIONS,
}
# Initializations that subtract the initial adapter from the base weights
CHANGES_BASE_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Tensors of peft's adapter on a `torch.nn.MultiheadAttention`
ADAPTER_ON_ATTENTION = "attn_pool.attn.lora_"


def read_peft_config(folder: Path) -> dict[str, Any]:
    """Reads the configuration of an adapter folder.

    Raises:
        DataError: the file is damaged, or describes another method than LoRA.
    """
    file = folder / CONFIG
    config = read_json_object(file)
    method = config.get("peft_type")
    if method != "LORA":
        raise DataError(
            f"{file} has peft_type {method!s:.100}; only LORA and its variants, such as DoRA, can "
            f"be used"
        )
    for key, value in config.items():
        expected = FIELDS.get(key)
        if expected is not None and value is not None and not matches(value, expected):
            raise DataError(
                f"{file}: {key} is {brief(value)}, expected {type_name(expected)}; "
                f"is the file damaged?"
            )
    return config


def adapter_node(folder: Path) -> dict[str, Any]:
    """Returns the config node, with `_target_`, that builds the adapter of a folder.

    Raises:
        DataError: the adapter cannot be used here.
    """
    from peft import LoraConfig

    config, file = read_peft_config(folder), folder / CONFIG
    if not config.get("target_modules"):
        raise DataError(f"{file} lacks target_modules: which layers does it adapt?")
    initialization = config.get("init_lora_weights")
    if str(initialization).lower().startswith(CHANGES_BASE_WEIGHTS):
        raise DataError(
            f"{file}: init_lora_weights={initialization} has changed the base weights too; "
            f"convert the adapter first (peft's save_pretrained with "
            f"path_initial_model_for_weight_conversion)"
        )
    defaults = {}
    for field in fields(LoraConfig):
        has_factory = field.default_factory is not MISSING
        defaults[field.name] = field.default_factory() if has_factory else field.default
    options = {}
    for key, value in config.items():
        known_elsewhere = key in ARGUMENTS or key in IGNORED
        if not known_elsewhere and value and value != defaults.get(key):
            options[key] = value
    for key, value in options.items():
        if key in PEFT_OPTIONS:
            continue
        reason = "is not used here"
        if key not in defaults:
            reason = "the installed peft does not know; a newer one may: pip install -U peft"
        raise DataError(f"{file} has {key}={brief(value)}, which {reason}")
    node: dict[str, Any] = {"_target_": f"{LoRA.__module__}.{LoRA.__name__}"}
    for key, argument in ARGUMENTS.items():
        node[argument] = config.get(key, defaults[key])
    return {**node, "options": options, "quantization": None}


def weights_file(folder: Path) -> Path:
    """Returns the weights file of an adapter folder.

    Raises:
        DataError: the file is missing or broken, or adapts a layer that the network does not have.
    """
    file = next((folder / name for name in PEFT_FILES if (folder / name).exists()), None)
    if file is None:
        raise DataError(f"{folder} has {CONFIG}, but no {' or '.join(PEFT_FILES)}")
    for name in read_peft_file(file):
        if ADAPTER_ON_ATTENTION in name:
            raise DataError(
                f"{file} adapts the resampler's attention as one module ({name}); here its "
                f"projections are separate linear layers. Adapters on out_proj and kv_proj of the "
                f"resampler, and on every layer elsewhere, can be used"
            )
    return file


def read_peft_file(file: Path) -> dict[str, torch.Tensor]:
    """Reads the weights file of an adapter folder; returns tensors by peft's names.

    Raises:
        DataError: the file is incomplete or not in the format that its name promises.
    """
    tensors = read_tensors(file)
    # peft leaves the adapter's name, "default", out; scripts that save a state dict keep it.
    return {name.replace(".default.", "."): tensor for name, tensor in tensors.items()}


def peft_names(adapted: nn.Module) -> dict[str, str]:
    """Returns peft's name in files -> the name in the state dict, for the tensors of an adapter.

    Empty for a model without peft's adapters.
    """
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(adapted, PeftModel):
        return {}
    state = adapted.state_dict()
    name_of_tensor = {id(tensor): name for name, tensor in state.items()}
    saved = get_peft_model_state_dict(adapted, state_dict=state, save_embedding_layers=False)
    return {name: name_of_tensor[id(tensor)] for name, tensor in saved.items()}
