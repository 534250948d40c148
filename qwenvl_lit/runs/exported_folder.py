"""Writes the folders that `export` makes: a full model, or an adapter, with its settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qwenvl_lit.models.protocols import Family
from qwenvl_lit.runs.model_types import published_name
from qwenvl_lit.runs.run import MACHINE_KEYS, RECIPE_GROUPS, SETTINGS
from qwenvl_lit.runs.stored_config import check_stored_config
from qwenvl_lit.training.adapters.merging import MergedWeights, apply_trained
from qwenvl_lit.training.adapters.methods import Adapter, Full
from qwenvl_lit.training.adapters.peft_files import (
    PEFT_FILES,
    absolute_path,
    newer_settings,
    read_peft_file,
    weights_file,
    write_peft_folder,
)
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.types import DataError
from qwenvl_lit.value_types import is_unresolved

WHOLE_WEIGHTS = (
    "there is no adapter: this run trained whole weights, as adapter=full does; export with "
    "merge=true"
)
NOTHING_TRAINED = "there is no adapter: this is a full model; export with merge=true"


def write_model(module: VisionLanguageModule, folder: Path, dtype: torch.dtype) -> None:
    """Writes a full model, with all that was trained merged into its weights.

    Raises:
        DataError: the disk is too small, or a checkpoint is missing or belongs to another model.
    """
    read = module.family.base_reader(module.load_device)
    checkpoints = _trained_checkpoints(module)
    for number, (adapter, checkpoint) in enumerate(checkpoints, 1):
        # A run merges earlier checkpoints in the precision of the weights; so does the export. The
        # last one is rounded once, to `dtype`.
        last = number == len(checkpoints)
        read = MergedWeights(
            read,
            family=module.family,
            adapter=adapter,
            checkpoint=checkpoint,
            dtype=torch.float32 if last else None,
        )
    module.family.export(read, folder, dtype=dtype)


def _trained_checkpoints(module: VisionLanguageModule) -> list[tuple[Adapter, Path]]:
    """Returns what was trained on top of the base weights, the oldest first."""
    newest_first: list[tuple[Adapter, Path]] = []
    if module.adapter:
        newest_first.append((module.adapter, module.trained_checkpoint))
    init = module.init
    while init:
        init.check()
        newest_first.append((init.adapter, init.checkpoint))
        init = init.init
    return newest_first[::-1]


def check_adapter(module: VisionLanguageModule) -> None:
    """Checks, without reading weights, that what was trained is an adapter.

    Raises:
        DataError: there is no adapter, or it belongs to weights that another run has changed.
    """
    if module.init:
        start = module.init.checkpoint
        kind = "an adapter folder" if start.name in PEFT_FILES else "the checkpoint of another run"
        raise DataError(
            f"the run started from {kind} ({start}), and its adapter is useless without it: "
            f"export with merge=true"
        )
    if module.adapter is None:
        raise DataError(NOTHING_TRAINED)
    if isinstance(module.adapter, Full):
        raise DataError(WHOLE_WEIGHTS)


def write_adapter(module: VisionLanguageModule, folder: Path, base: str | None) -> None:
    """Writes the adapter in peft's format.

    Args:
        base: the name or folder of the base model, for `adapter_config.json`.

    Raises:
        DataError: as `check_adapter`.
    """
    check_adapter(module)
    outline = module.family.meta_model()
    checkpoint = module.trained_checkpoint
    model = apply_trained(module.adapter, outline, module.family, checkpoint, assign=True)
    if not hasattr(model, "peft_config"):
        raise DataError(WHOLE_WEIGHTS)
    # Base weights are on the meta device.
    trained = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    write_peft_folder(model, folder, trained, base=base)


def adapter_caveats(folder: Path, family: Family) -> list[str]:
    """Returns what limits the use of an exported adapter elsewhere."""
    caveats = family.adapter_caveats(read_peft_file(weights_file(folder)))
    if newer := newer_settings(folder):
        caveats.append(f"versions of peft that do not know {', '.join(newer)} refuse the adapter")
    return caveats


def portable_settings(model: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Returns the settings of a model without those that depend on the machine."""
    return {key: value for key, value in model.items() if key not in family.machine_settings}


def portable_recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how a run was trained, without what depends on the machine.

    Args:
        config: the resolved config of the run. A group that names other code than the package's is
            left out, since reading it would need trust=true.
    """
    recipe: dict[str, Any] = {}
    for group in RECIPE_GROUPS:
        node = dict(config.get(group) or {})
        for key in MACHINE_KEYS:
            node.pop(key, None)
        try:
            check_stored_config({group: node}, SETTINGS)
        except DataError:
            continue
        if "_target_" in node and not is_unresolved(node):
            recipe[group] = node
    return recipe


def write_settings(
    folder: Path, settings: Mapping[str, Any], family: Family, *, merged: bool, dtype: str
) -> None:
    """Writes how the model is prompted, how it generates and how it was trained.

    Neither peft nor the published checkpoint has a file for this.

    Args:
        settings: the groups `model` and `generation` of the config, and `portable_recipe`.
    """
    model = dict(settings["model"])
    if merged:
        for key in family.base_settings:
            model.pop(key, None)
        model["dtype"] = dtype
    else:
        model["path"] = absolute_path(model["path"])
    text = json.dumps({**settings, "model": model}, indent=2, ensure_ascii=False)
    (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")


def shared_base(path: str | None) -> str | None:
    """Returns how other machines name a base model: by its name on the hub.

    A folder that is not named like a published model keeps its path.
    """
    if path and Path(path).expanduser().is_dir():
        return published_name(path) or path
    return path
