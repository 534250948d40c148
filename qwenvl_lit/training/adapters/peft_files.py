"""Adapter folders in peft's format: their configuration, their weights and the names of tensors.

The folders may be written by this package, peft, ms-swift or Qwen-VL's own finetune.py.
"""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from qwenvl_lit.models.components import network_of
from qwenvl_lit.stored_files import read_json_object, read_tensors
from qwenvl_lit.training.adapters.methods import PEFT_OPTIONS, LoRA
from qwenvl_lit.types import DataError
from qwenvl_lit.value_types import brief, matches, type_name

log = logging.getLogger(__name__)

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
# Settings that peft 0.9 knows, the oldest version that reads our folders. Until version 0.17, peft
# refuses a file with a setting that it does not know.
KNOWN_SINCE_0_9 = (
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
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
# Settings that choose layers by number or name. The tensors of a file say which layers are adapted:
# the targets that ms-swift writes match more.
CHOOSE_LAYERS = ("exclude_modules", "layers_pattern", "layers_to_transform")
ADAPTED_LAYER = re.compile(r"(?:base_model\.model\.)?(.+?)\.lora_")
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
    if "swift_type" in config:
        raise DataError(
            f"{file} is in the format of ms-swift's --tuner_backend swift; convert it: "
            f"swift export --ckpt_dir {folder.parent} --to_peft_format true"
        )
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

    Its targets are the layers that the weights file has tensors for.

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
    layers = adapted_layers(read_peft_file(weights_file(folder)))
    if layers and "target_parameters" not in options:
        node["targets"] = pattern_of(layers)
        options = {key: value for key, value in options.items() if key not in CHOOSE_LAYERS}
    return {**node, "options": options, "quantization": None}


def adapted_layers(names: Iterable[str]) -> set[str]:
    """Returns the module paths of the layers that tensors adapt, from peft's names in files."""
    layers = set()
    for name in names:
        if layer := ADAPTED_LAYER.match(name):
            layers.add(layer[1])
    return layers


def pattern_of(paths: Iterable[str]) -> str:
    r"""Returns a regular expression that matches exactly these module paths.

    >>> pattern_of(["h.0.c_attn", "h.1.c_attn", "h.1.mlp.w1", "kv_proj"])
    'h\\.(0|1)\\.(c_attn)|h\\.(1)\\.(mlp\\.w1)|kv_proj'
    """
    blocks: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    others = []
    for path in sorted(paths):
        block = re.fullmatch(r"(.*?)\.(\d+)\.(.*)", path)
        if block:
            blocks[block[1], block[3]].append(int(block[2]))
        else:
            others.append(re.escape(path))
    layers: defaultdict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for (before, after), numbers in sorted(blocks.items()):
        layers[before, tuple(sorted(numbers))].append(re.escape(after))
    patterns = []
    for (before, numbers), endings in layers.items():
        alternatives = "|".join(map(str, numbers)), "|".join(endings)
        patterns.append(rf"{re.escape(before)}\.({alternatives[0]})\.({alternatives[1]})")
    return "|".join(patterns + others)


def targets_without_tensors(folder: Path, adapted: nn.Module) -> list[str]:
    """Returns the layers that the targets of an adapter folder match, and that it does not adapt.

    Block numbers are replaced by N. Includes targets of a list that match nothing.

    Args:
        adapted: the network with the adapter of the folder.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = read_peft_config(folder)
    targets = config.get("target_modules")
    if not targets or targets == "all-linear":
        return []
    chosen = {key: config[key] for key in CHOOSE_LAYERS if config.get(key)}
    selected = LoraConfig(target_modules=targets, **chosen)
    without, layers = set(), []
    for path, module in network_of(adapted).named_modules():
        if hasattr(module, "lora_A"):
            layers.append(path)
        elif isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            if ".lora_" in path or path.endswith(".base_layer"):
                continue
            if check_target_module_exists(selected, path):
                without.add(re.sub(r"\.\d+\.", ".N.", path))
    if not isinstance(targets, str):
        for target in targets:
            if not any(f".{path}".endswith(f".{target}") for path in [*layers, *without]):
                without.add(target)
    return sorted(without)


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


def write_peft_folder(
    model: nn.Module, folder: Path, state: Mapping[str, torch.Tensor], *, base: str | None = None
) -> None:
    """Writes the adapter of a `PeftModel` as a folder that peft 0.9 and later versions read.

    Args:
        state: the trained tensors by their names in the state dict.
        base: the name or folder of the base model. A folder is written with its absolute path.

    Raises:
        OSError: the folder cannot be written.
    """
    try:
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    except SafetensorError as error:  # such as a full disk
        raise OSError(str(error)) from error
    (folder / "README.md").unlink(missing_ok=True)  # a template with nothing filled in
    file = folder / CONFIG
    settings = portable_config(read_json_object(file))
    text = json.dumps({**settings, "base_model_name_or_path": absolute_path(base)}, indent=2)
    file.write_text(text + "\n", encoding="utf-8")
    # safetensors creates files that only their owner can read.
    (folder / PEFT_FILES[0]).chmod(file.stat().st_mode)


def absolute_path(path: str | None) -> str | None:
    """Returns the absolute path of a folder, or a name on the hub unchanged."""
    if path and Path(path).expanduser().is_dir():
        return str(Path(path).expanduser().resolve())
    return path


def portable_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that peft writes without those that older versions do not know.

    Settings which they do not know stay if they differ from their default, because the adapter
    needs them.
    """
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    portable: dict[str, Any] = {}
    for key, value in settings.items():
        if key in KNOWN_SINCE_0_9 or value != defaults.get(key):
            portable[key] = value
    if isinstance(portable["target_modules"], list):  # a set in peft, of any order
        portable["target_modules"].sort()
    # An initialization has no effect on a trained adapter. Without a task type, peft writes the
    # name of a class of this package.
    return {**portable, "auto_mapping": None, "init_lora_weights": True, "task_type": "CAUSAL_LM"}


def newer_settings(folder: Path) -> list[str]:
    """Returns the settings of an adapter folder that peft 0.9 does not know."""
    return sorted(set(read_json_object(folder / CONFIG)) - set(KNOWN_SINCE_0_9))
