"""`data.datasets`: the names of a mixture become the full description of each dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig, OmegaConf

from qwenvl_lit.atomic import write_text
from qwenvl_lit.cli.hints import explain
from qwenvl_lit.types import DataError


def keep_expanded_datasets(config: DictConfig) -> None:
    """Expands the mixture of a config, and of the copy that Hydra wrote, which `ckpt=` reads."""
    if not (config.get("data") and config.data.get("datasets")):
        return
    expand_datasets(config)
    job = HydraConfig.get()
    if job.output_subdir is not None:
        file = Path(job.runtime.output_dir, job.output_subdir, "config.yaml")
        write_text(file, OmegaConf.to_yaml(config))


def expand_datasets(config: DictConfig) -> None:
    """Replaces each name in `data.datasets` by what conf/data has under it.

    Afterwards the config describes its data without conf/.

    Raises:
        DataError: conf/data has no such file, or a dataset has no such key.
    """
    for name, value in config.data.datasets.items():
        if OmegaConf.is_dict(value):
            if "_target_" in value:
                continue  # expanded before
            changes = OmegaConf.to_container(value, resolve=False)
        else:
            changes = {"rows": value}
        node = _dataset_node(name, changes)
        OmegaConf.update(config, f"data.datasets.{name}", node, merge=False, force_add=True)


def _dataset_node(name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    from qwenvl_lit.data.mixture import DatasetSpec

    changes = dict(changes)
    file = changes.pop("use", name)
    known_keys = [field.name for field in fields(DatasetSpec)]
    unknown_keys = sorted(set(changes) - set(known_keys))
    try:
        composed = hydra.compose("train", overrides=[f"data={file}"]).data
    except (MissingConfigException, ConfigCompositionException) as error:
        raise DataError(f"data.datasets.{name}: {explain('train', (), error)}") from error
    if unknown_keys:
        raise DataError(
            f"data.datasets.{name} has no key {', '.join(unknown_keys)}; "
            f"its keys are use, {', '.join(known_keys)}"
        )
    node: dict[str, Any] = {
        "_target_": f"{DatasetSpec.__module__}.{DatasetSpec.__name__}",
        "rows": None,
    }
    for key, value in OmegaConf.to_container(composed, resolve=False).items():
        if key in known_keys:
            node[key] = value
    if "split_file" in node:
        node["split_file"] = f"${{paths.run}}/split_{name}.json"
    return {**node, **changes}
