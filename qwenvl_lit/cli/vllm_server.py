"""What `serve` checks and passes on before it starts vLLM's server with a config."""

from __future__ import annotations

import re
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from qwenvl_lit.models.chatml import DEFAULT_SYSTEM
from qwenvl_lit.runs.model_types import QWEN_VL, READ, model_arguments, model_name
from qwenvl_lit.types import DataError

# Settings of `model` that only our own engine has
OWN_LOADING = ("load_in_4bit", "device_map", "max_memory")
# Those that vLLM's server takes besides a folder; all others are in the folder
SERVED_SETTINGS = ("system", "dtype")
ADAPTERS = "adapters='{NAME: FOLDER, OTHER: FOLDER}'"


def check_for_vllm(config: DictConfig, arguments: Sequence[str], *, is_exported: bool) -> None:
    """Checks that vLLM serves the model, with the settings of the command line.

    Args:
        arguments: of the command line.
        is_exported: what `ckpt` names is exported first, with other settings of `model` if need be.

    Raises:
        DataError: names the key, and what to do.
    """
    if config.device is not None:
        raise DataError(
            f"device={config.device} is for engine=own; for engine=vllm the variable "
            f"CUDA_VISIBLE_DEVICES chooses GPUs, and vllm.tensor_parallel_size how many are used"
        )
    _check_family(config, is_exported=is_exported)
    path = config.model.get("path")
    if not config.ckpt and (path is None or config.model.get("weights") == "random"):
        raise DataError(
            "engine=vllm needs stored weights, and this model has random ones: ckpt=RUN, or "
            "model.path=FOLDER"
        )
    for name in OWN_LOADING:
        if config.model.get(name):
            raise DataError(f"model.{name} is for engine=own; leave it out")
    changeable = SERVED_SETTINGS if config.ckpt else ("path", "download", *SERVED_SETTINGS)
    for key in map(key_of, arguments):
        group, _, name = key.partition(".")
        if group == "model" and name and name not in changeable and not is_exported:
            raise DataError(
                f"engine=vllm reads {key} in the model's folder: leave it out, or export with it, "
                f"python -m qwenvl_lit.export {model_arguments(path)} {key}=... out=FOLDER, and "
                f"take ckpt=FOLDER"
            )
        if key in ("generation.stop_words_ids", "generation.seed"):
            raise DataError(f"engine=vllm has no {key}: leave it out; requests have stop and seed")


def _check_family(config: DictConfig, *, is_exported: bool) -> None:
    kind = model_name(OmegaConf.to_container(config.model, resolve=True))
    if kind == READ[QWEN_VL]:
        return
    if kind not in READ.values():
        raise DataError(f"engine=vllm is for Qwen-VL, and this is {kind}; take engine=own")
    folder, export = config.model.path, ""
    if is_exported:
        folder, export = "FOLDER", f"python -m qwenvl_lit.export ckpt={config.ckpt} out=FOLDER, "
    raise DataError(
        f"engine=vllm is for Qwen-VL, and this is {kind}, which vLLM serves without this package: "
        f"{export}vllm serve {folder} (docs/serving_vllm.md has its arguments); or take engine=own"
    )


def export_arguments(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments of a command line that change what is exported for vLLM."""
    kept = []
    for argument in arguments:
        key = key_of(argument)
        if key.partition(".")[0] in ("model", "adapter", "init") and key != "model.system":
            kept.append(argument)
    return kept


def chosen_system(config: DictConfig, arguments: Sequence[str]) -> str | None:
    """Returns the system message of the command line; None: that of the model."""
    if "model.system" not in map(key_of, arguments):
        return None
    return DEFAULT_SYSTEM if config.model.system is None else config.model.system


def adapters_of(config: DictConfig) -> dict[str, str]:
    """Returns the folders of `adapters` by name.

    Raises:
        DataError: it is not a mapping of names to folders.
    """
    adapters = config.adapters or {}
    if adapters and not OmegaConf.is_dict(adapters):
        raise DataError(f"adapters={config.adapters} is no mapping; write {ADAPTERS}")
    for name, folder in adapters.items():
        if not isinstance(folder, str) or not re.fullmatch(r"[\w.-]+", str(name)):
            raise DataError(f"adapters: {name}: {folder} is not NAME: FOLDER; write {ADAPTERS}")
    return {str(name): folder for name, folder in adapters.items()}


def refuse_vllm_settings(config: DictConfig, arguments: Sequence[str]) -> None:
    """Checks that settings of vLLM are not set for our own engine.

    Args:
        arguments: of the command line.

    Raises:
        DataError: names the key.
    """
    if config.adapters:
        raise DataError(
            "adapters is for engine=vllm; engine=own serves one model: ckpt=FOLDER, of an adapter, "
            "too"
        )
    for key in map(key_of, arguments):
        if key.startswith("vllm."):
            raise DataError(f"{key} is for engine=vllm; leave it out, or add engine=vllm")


def key_of(argument: str) -> str:
    """Returns the key of an argument, `model.path` of `++model.path=FOLDER`."""
    return argument.lstrip("+~").partition("=")[0]
