"""Checks of a composed config that need no torch, so that their errors appear at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.extras import require
from qwenvl_lit.runs.model_types import check_model_path
from qwenvl_lit.settings import (
    CHECKS,
    EARLY_STOPPING,
    accumulated_batches,
    check_engine,
    check_rows_per_step,
    check_seed,
    check_settings,
)

READ_ROWS = f"{read_rows.__module__}.{read_rows.__name__}"
LOGGERS = {  # classes of Lightning that need an optional package
    "lightning.pytorch.loggers.CometLogger": "comet_ml",
    "lightning.pytorch.loggers.MLFlowLogger": "mlflow",
    "lightning.pytorch.loggers.WandbLogger": "wandb",
    "lightning.pytorch.loggers.TensorBoardLogger": "tensorboard",
}
FULL = "qwenvl_lit.training.adapters.methods.Full"
EARLY_STOPPING_CLASS = "lightning.pytorch.callbacks.EarlyStopping"


def check_values(config: DictConfig) -> None:
    """Checks the seed, the settings that `CHECKS` lists, and that `model.path` fits the model.

    Classes of the user may have other settings of the same names.

    Raises:
        ValueError: names the key, what it may be and what it is.
        DataError: `model.path` is of another model than the one chosen.
    """
    check_seed(config.seed)
    if "engine" in config:
        check_engine(config.engine)
    if config.get("model"):
        check_model_path(OmegaConf.to_container(config.model), _chosen_model())
    for group in CHECKS:
        _check_node(group, config.get(group))
    for name, callback in (config.get("callbacks") or {}).items():
        if OmegaConf.is_dict(callback) and callback.get("_target_") == EARLY_STOPPING_CLASS:
            _check_node(EARLY_STOPPING, callback, key=f"callbacks.{name}")
    if config.get("speed") and config.get("data"):  # for training
        _check_float8(config)
        accumulated_batches(config.trainer, config.data)
        if _is_given("trainer.rows_per_step"):  # not by a recipe, which data.batch_size overrides
            check_rows_per_step(config.trainer, config.data)


def _check_float8(config: DictConfig) -> None:
    adapter = config.get("adapter") or {}
    if not config.speed.get("float8"):
        return
    trains_all = adapter.get("_target_") == FULL and not adapter.get("freeze")
    if trains_all or adapter.get("quantization"):
        raise ValueError(
            "speed.float8=true, which speed=fp8 sets, is for frozen linear layers in 16 bits. With "
            "adapter=full all are trained, with adapter=qlora they are in 4 bits; use adapter=lora"
        )


def _is_given(key: str) -> bool:
    """Returns whether the command line sets `key`."""
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return any(argument.lstrip("+").startswith(f"{key}=") for argument in given)


def _chosen_model() -> str | None:
    """The file of conf/model that the command line or its defaults choose."""
    return HydraConfig.get().runtime.choices.get("model") if HydraConfig.initialized() else None


def _check_node(group: str, node: Any, *, key: str | None = None) -> None:
    if not OmegaConf.is_dict(node):
        return
    target = str(node.get("_target_", "qwenvl_lit."))
    if target.startswith(("qwenvl_lit.", "lightning.")):
        check_settings(group, OmegaConf.to_container(node, resolve=True), key=key)


def check_packages(config: DictConfig) -> None:
    """Checks that the optional packages that `config` needs are installed.

    Raises:
        ValueError: names the key, the package and the command that installs it.
    """
    for name, logger in (config.get("logger") or {}).items():
        package = LOGGERS.get(logger.get("_target_"))
        if package:
            require(package, f"logger={name}")
    if (config.get("adapter") or {}).get("quantization"):
        require("bitsandbytes", "adapter.quantization, which adapter=qlora sets,")
    if (config.get("model") or {}).get("load_in_4bit"):
        require("bitsandbytes", "model.load_in_4bit=true")


def check_files(config: DictConfig, splits: Sequence[str]) -> None:
    """Opens the files of the datasets, which checks each file and the layout of its first row.

    Indexes of large files stay in the cache. Files that a dataset writes or downloads are left out,
    and so are those of other readers.

    Args:
        splits: keys of a dataset that name the files, such as "train".

    Raises:
        DataError: as `read_rows`.
    """
    for dataset in datasets_of(config):
        if dataset.get("prepare") or (dataset.get("read") or {}).get("_target_") != READ_ROWS:
            continue
        root, cache = (_folder(dataset.get(key)) for key in ("root", "cache"))
        for split in splits:
            for source in sources(dataset.get(split)):
                options = ReadOptions(
                    root=root, cache=cache, download=dataset.get("download", True)
                )
                read_rows(source, options)


def datasets_of(config: DictConfig) -> Iterator[dict[str, Any]]:
    """Yields the config of each dataset of a command: that of `data`, or those of a mixture."""
    data = OmegaConf.to_container(config.data, resolve=True)
    yield from (data.get("datasets") or {"": data}).values()


def sources(files: Any) -> Iterator[str]:
    """Yields the files in the value of a split, which may also be a number of rows."""
    if isinstance(files, str):
        yield files
    elif isinstance(files, dict | list):
        for each in files.values() if isinstance(files, dict) else files:
            yield from sources(each)


def _folder(path: str | None) -> Path | None:
    return None if path is None else Path(path).expanduser()
