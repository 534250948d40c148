"""The adapters that vLLM serves beside their base model: folders, checks and arguments."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenvl_lit import checksums
from qwenvl_lit.runs.model_types import published_name
from qwenvl_lit.runs.run import COMPOSED_CONFIG, SETTINGS, stored_settings
from qwenvl_lit.runs.stored_config import read_config
from qwenvl_lit.types import DataError

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can reserve memory for
# Settings of a model that determine prompts
PROMPTING = ("template", "system", "special_tokens", "boxes")

log = logging.getLogger(__name__)


def adapter_folder(path: str | Path, *, verify: bool = True) -> Path:
    """Returns an adapter folder of peft: `path` itself, or that of a run or of its checkpoint.

    Args:
        verify: compare the weights with their checksums, if they have any.

    Raises:
        DataError: there is none, it is damaged, or vLLM cannot serve it beside its base model.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        raise DataError(f"adapters: {path} does not exist; expected a run or an adapter folder")
    for run in (folder, folder.resolve().parent.parent):
        if started_from := (_config_of_run(run).get("init") or {}).get("checkpoint"):
            reason = f"its run started from {started_from}, whose changes are not in the base model"
            raise DataError(_refusal(folder, reason))
    beside = folder.with_name(f"{folder.stem}_adapter")  # of a checkpoint
    for candidate in (folder, *_adapters_of_run(folder), beside):
        if (candidate / "adapter_config.json").exists():
            _check_adapter(candidate)
            if verify:
                checksums.verify(candidate)
            return candidate.resolve()
    raise DataError(
        f"{path} is no adapter: expected a folder with adapter_config.json, or a run that trained "
        f"an adapter"
    )


def _adapters_of_run(folder: Path) -> list[Path]:
    return [folder / "checkpoints" / name for name in ("best_adapter", "last_adapter")]


def _check_adapter(folder: Path) -> None:
    from qwenvl_lit.training.adapters.peft_files import (
        adapted_layers,
        read_peft_config,
        read_peft_file,
        weights_file,
    )

    config = read_peft_config(folder)
    layers = adapted_layers(read_peft_file(weights_file(folder)))
    beyond = sorted(layer for layer in layers if not layer.startswith("transformer.h."))
    reason = ""
    if beyond:
        reason = f"it adapts {beyond[0]}, and vLLM adapts only layers of the language model"
    elif config.get("use_dora"):
        reason = "it is a DoRA, which vLLM does not know"
    elif config.get("modules_to_save"):
        reason = f"it has whole tensors of {', '.join(config['modules_to_save'])}"
    elif max_rank(config) > LORA_RANKS[-1]:
        reason = f"its rank is above {LORA_RANKS[-1]}"
    if reason:
        raise DataError(_refusal(folder, reason))


def _refusal(folder: Path, reason: str) -> str:
    return (
        f"{folder} cannot be served beside its base model: {reason}; serve it alone, "
        f"merged: ckpt={folder}"
    )


def _config_of_run(run: Path) -> Mapping[str, Any]:
    """Returns the resolved config of a run folder; {} for other folders."""
    if not (run / COMPOSED_CONFIG).exists() or not (run / "config.yaml").exists():
        return {}
    return read_config(run / "config.yaml")


def max_rank(config: Mapping[str, Any]) -> int:
    """Returns the largest rank of the layers of an adapter, by its adapter_config.json."""
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def adapter_arguments(folders: Mapping[str, Path]) -> list[str]:
    from qwenvl_lit.training.adapters.peft_files import read_peft_config

    rank = max(max_rank(read_peft_config(folder)) for folder in folders.values())
    slots = next(known for known in LORA_RANKS if known >= rank)
    arguments = ["--enable-lora", "--max-lora-rank", str(slots)]
    # With as many as are used, vLLM's CPU kernels (0.32) apply the last adapter to requests without
    # one, if they share a step.
    arguments += ["--max-loras", str(len(folders) + 1)]
    arguments += ["--lora-modules", *(f"{name}={path}" for name, path in folders.items())]
    return arguments


def model_settings(folder: Path) -> Mapping[str, Any]:
    """Returns how a full model or an adapter is prompted, as its run or its export has stored it.

    {} for folders that others wrote.
    """
    if (folder / SETTINGS).exists():
        return stored_settings(folder).get("model", {})
    return _config_of_run(folder.resolve().parent.parent).get("model") or {}


def common_system(
    model: Mapping[str, Any], folders: Mapping[str, Path], system: str | None = None
) -> str | None:
    """Returns the system message that the model and its adapters were trained with.

    Args:
        model: how the model is prompted, see `model_settings`.
        folders: of the adapters, by name.
        system: the message that is used in its place, if any.

    Raises:
        DataError: they differ, also in another setting of prompts. vLLM has one for all of them.
    """
    found: dict[str, dict[str, Any]] = {}
    adapters = {name: model_settings(folder) for name, folder in folders.items()}
    for name, settings in {"the model": model, **adapters}.items():
        if settings:
            found[name] = {key: settings.get(key) for key in PROMPTING}
    if not found:
        return system
    first, *others = found
    for other in others:
        for key in PROMPTING:
            differ = found[first][key] != found[other][key]
            if differ and (key != "system" or system is None):
                raise DataError(
                    f"{first} was trained with {key}={found[first][key]!r}, and {other} with "
                    f"{found[other][key]!r}; a server has one for all: serve them apart"
                )
    return found[first]["system"] if system is None else system


def warn_of_other_bases(model: str | Path, folders: Mapping[str, Path]) -> None:
    """Logs a warning for each adapter that names another base model than the one served."""
    from qwenvl_lit.training.adapters.peft_files import read_peft_config

    for name, folder in folders.items():
        base = read_peft_config(folder).get("base_model_name_or_path")
        base = base or model_settings(folder).get("path")
        if base and _identity(base) != _identity(model):
            log.warning(
                "adapter %s was trained on %s, and %s is served: its answers are right only if "
                "both have the same weights",
                *(name, base, model),
            )


def _identity(model: str | Path) -> str:
    """Returns what copies of a model have in common: its published name, or else its folder."""
    path = Path(model).expanduser()
    return published_name(str(model)) or (str(path.resolve()) if path.exists() else str(model))
