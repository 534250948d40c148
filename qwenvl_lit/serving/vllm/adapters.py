"""The adapters that vLLM serves beside their base model: folders, checks and arguments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenvl_lit.runs.run import SETTINGS, stored_settings
from qwenvl_lit.types import DataError

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can reserve memory for
# Settings of an adapter's qwenvl_lit.json that determine prompts
PROMPTING = ("template", "system", "special_tokens", "boxes")


def adapter_folder(path: str | Path) -> Path:
    """Returns an adapter folder of peft: `path` itself, or that of a run's best checkpoint.

    Raises:
        DataError: there is none, or vLLM cannot serve it beside its base model.
    """
    folder = Path(path).expanduser()
    for candidate in (folder, *_adapters_of_run(folder)):
        if (candidate / "adapter_config.json").exists():
            _check_adapter(candidate)
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
        raise DataError(
            f"{folder} cannot be served beside its base model: {reason}; serve it alone, "
            f"merged: ckpt={folder}"
        )


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


def common_system(
    model: Path, folders: Mapping[str, Path], system: str | None = None
) -> str | None:
    """Returns the system message that the model and its adapters were trained with.

    Raises:
        DataError: they differ, also in another setting of prompts. vLLM has one for all of them.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, folder in {"the model": model, **folders}.items():
        if (folder / SETTINGS).exists():
            stored = stored_settings(folder).get("model", {})
            found[name] = {key: stored.get(key) for key in PROMPTING}
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
