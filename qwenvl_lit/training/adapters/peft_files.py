"""Adapter folders of peft, whoever wrote them: ms-swift, Qwen-VL's own finetune.py, peft itself, or this package."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from qwenvl_lit.training.adapters.methods import LoRA
from qwenvl_lit.types import DataError

PEFT_FILES = (
    "adapter_model.safetensors",
    "adapter_model.bin",
)  # the weights of peft's folders, the better one first
CONFIG = "adapter_config.json"
SIZES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
}  # peft's words and ours
# What says nothing about how the adapter computes
ABOUT = (
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "inference_mode",
    "revision",
    "auto_mapping",
    "peft_version",
)
ABOUT += (
    "init_lora_weights",
    "runtime_config",
    "lorap_lr_ratio",
    "lorap_emb_lr",
    "lora_dtype",
)  # the last three are of ms-swift
CHANGES_BASE = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
)  # ways to begin that take from the weights what they give the adapter
WHOLE_ATTENTION = "attn_pool.attn.lora_"  # peft's adapter on a `MultiheadAttention`


def read_config(folder: Path) -> dict[str, Any]:
    """
    Raises:
        DataError: the file is broken, or of something else than LoRA.
    """
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is no JSON: {error}; is it complete?") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise DataError(
            f"{file} is of an adapter of the kind {kind}; only LORA (with its variants, as DoRA) can be used"
        )
    return config


def adapter_node(folder: Path) -> dict[str, Any]:
    """The adapter of a folder, as configs have it.

    Raises:
        DataError: it is of a kind that cannot be used.
    """
    from dataclasses import MISSING, fields

    from peft import LoraConfig

    config, file = read_config(folder), folder / CONFIG
    if not config.get("target_modules"):
        raise DataError(f"{file} lacks target_modules: which layers does it adapt?")
    if str(config.get("init_lora_weights")).lower().startswith(CHANGES_BASE):
        raise DataError(
            f"{file}: init_lora_weights={config['init_lora_weights']} has changed the base too; convert the adapter first (peft's "
            f"save_pretrained with path_initial_model_for_weight_conversion)"
        )
    defaults = {
        field.name: field.default_factory()
        if field.default_factory is not MISSING
        else field.default
        for field in fields(LoraConfig)
    }
    others = {key: value for key, value in config.items() if key not in SIZES and key not in ABOUT}
    options = {key: value for key, value in others.items() if value and value != defaults.get(key)}
    if unknown := sorted(set(options) - set(defaults)):
        settings = ", ".join(f"{key}={options[key]}" for key in unknown)
        raise DataError(
            f"{file} says {settings}, which the peft installed here does not know; a newer one may: pip install -U peft"
        )
    sizes = {ours: config.get(theirs, defaults[theirs]) for theirs, ours in SIZES.items()}
    return {
        "_target_": f"{LoRA.__module__}.{LoRA.__name__}",
        **sizes,
        "options": options,
        "quantization": None,
    }


def weights_file(folder: Path) -> Path:
    """Where the weights of an adapter are.

    Raises:
        DataError: they are missing, broken or of a layer that the network does not have.
    """
    file = next((folder / name for name in PEFT_FILES if (folder / name).exists()), None)
    if file is None:
        raise DataError(f"{folder} has {CONFIG}, but no {' or '.join(PEFT_FILES)}")
    if whole := next((name for name in read_peft_file(file) if WHOLE_ATTENTION in name), None):
        raise DataError(
            f"{file} adapts the resampler's attention as a whole ({whole}); here its projections are separate linear layers. Adapters on "
            f"out_proj and kv_proj of the resampler, and on every layer elsewhere, can be used"
        )
    return file


def read_peft_file(file: Path) -> dict[str, torch.Tensor]:
    """The tensors that peft wrote, by their names there.

    Raises:
        DataError: the file is incomplete, or not what its name says.
    """
    try:
        safe = file.suffix == ".safetensors"
        tensors = (
            load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
        )
    except (
        SafetensorError,
        OSError,
        RuntimeError,
        EOFError,
        KeyError,
        pickle.UnpicklingError,
    ) as error:
        raise DataError(f"{file} cannot be read: {error}; is it complete?") from error
    return {
        name.replace(".default.", "."): tensor for name, tensor in tensors.items()
    }  # scripts of their own keep the adapter's name


def peft_names(adapted: nn.Module) -> dict[str, str]:
    """The names that peft's files have for the tensors of a `PeftModel`, and those that they have in it; none for other models."""
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(adapted, PeftModel):
        return {}
    state = adapted.state_dict()
    inside = {id(tensor): name for name, tensor in state.items()}
    written = get_peft_model_state_dict(adapted, state_dict=state, save_embedding_layers=False)
    return {name: inside[id(tensor)] for name, tensor in written.items()}
