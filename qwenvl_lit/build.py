"""Objects from a composed config. Hydra stops here: everything below takes plain values."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torchmetrics import Metric
from transformers.utils.logging import disable_progress_bar

from qwenvl_lit.callbacks.vision_cache import VisionCache
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.models.protocols import Processor
from qwenvl_lit.runs.run import Run, save_versions
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.training.strategies import DeviceMapStrategy
from qwenvl_lit.types import DataError


def module(config: DictConfig, *, adapted: bool = True) -> VisionLanguageModule:
    """The task of `config`, without weights yet: `configure_model` loads them. Not `adapted`, it is the model as published.

    Raises:
        DataError: it is to train, and its model is for answers only.
    """
    if "speed" in config and config.model.get("load_in_4bit"):
        raise DataError(
            "model.load_in_4bit holds a model in 4 bits to answer; to train adapters over 4 bits: adapter=qlora"
        )
    return VisionLanguageModule(
        speed=_object(config.speed) if "speed" in config else None,  # first what is refused at once
        generation=generation(config),
        family=_object(config.model),
        adapter=(_object(config.adapter) or None) if adapted else None,
        metrics=metrics(config),
        optim=_object(config.optim) if "optim" in config else None,
        init=(_object(config.init) or None) if adapted else None,
        config=OmegaConf.to_container(config),
    )


def trained(run: Run, changes: Mapping[str, Any]) -> VisionLanguageModule:
    """The task of a run, to use what it has learned (`run.checkpoint`); `changes` are fields of its model."""
    config = {name: value for name, value in run.config.items() if name not in ("optim", "speed")}
    whole = {"init": None, **config, "model": {**config["model"], **changes}, "metrics": {}}
    return module(OmegaConf.create(whole), adapted=run.checkpoint is not None)


def metrics(config: DictConfig) -> dict[str, Metric]:
    """How answers are scored, by name."""
    return _object(config.metrics) or {}


def generation(config: DictConfig) -> Generation:
    """How answers are decoded."""
    return _object(config.generation)


def processor(config: DictConfig) -> Processor:
    """How the model of `config` reads rows; no weights are loaded."""
    return _object(config.model).processor()


def data(config: DictConfig, processor: Processor) -> DataModule:
    """The datamodule of `config`; its yaml is a `_partial_`, since built objects must not pass through `instantiate`.

    Raises:
        DataError: there is no run to take the data from, and none was chosen.
    """
    if not config.data:
        raise DataError(
            "data is missing: choose data=..., for example data=jsonl data.test=my.jsonl"
        )
    if "datasets" in config.data and not config.data.datasets:
        raise DataError(
            "data.datasets is missing: which, and how much of each, for example data.datasets={coco_en_mini:2000,refcoco:0.5}"
        )
    return _object(config.data)(processor=processor)


def trainer(config: DictConfig, *, callbacks: Mapping[str, Any] | None = None) -> lightning.Trainer:
    """Lightning's trainer, writing into the run folder; `callbacks` replaces those of the config."""
    chosen = dict(config.callbacks if callbacks is None else callbacks)
    if not sys.stdout.isatty():
        chosen.pop("progress", None)  # a bar needs a terminal; elsewhere `RunLog` prints lines
    built = [_object(node) for node in chosen.values()]
    if config.get("speed") and config.speed.vision_cache:
        built.append(
            VisionCache(Path(config.paths.cache, "vision"), limit_gb=config.speed.vision_cache_gb)
        )
    spread = {"strategy": DeviceMapStrategy()} if config.model.get("device_map") else {}
    if config.trainer.accelerator == "gpu" and not torch.accelerator.is_available():
        raise DataError(
            "there is no GPU: strategy=auto takes what there is; strategy=ddp_cpu and fsdp_cpu try distributed code without"
        )
    make = _object(config.trainer)
    for name in ("max_steps", "max_epochs"):
        if not isinstance(value := config.trainer[name], int | None):
            raise DataError(f"trainer.{name} is a whole number, got {value!r}")
    return make(
        default_root_dir=config.paths.run,
        enable_progress_bar="progress" in chosen,
        enable_checkpointing=any(
            isinstance(callback, Checkpoint) for callback in built
        ),  # else Lightning adds one of its own
        callbacks=built,
        logger=list(_object(config.logger).values()) if config.get("logger") else False,
        **spread,
    )


def start(config: DictConfig) -> None:
    """Seed every generator, and silence what libraries say that no user can act on."""
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    if not sys.stderr.isatty():
        disable_progress_bar()  # of weights that are loaded
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(
        logging.ERROR
    )  # blocks should change nothing in place: ours do not
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings(
        "ignore", message="Total length of .* across ranks is zero.*"
    )  # no validation was asked for
    warnings.filterwarnings(
        "ignore", message=".*gradient_checkpointing.* is deprecated.*"
    )  # peft asks by the name that is old in 5.2x
    warnings.filterwarnings(
        "ignore", message=".*sync_dist=True.*"
    )  # metrics join the ranks themselves
    warnings.filterwarnings(
        "ignore", message=".*FSDP2-wrapped module .* returned a view.*"
    )  # nothing of ours changes it in place


@rank_zero_only
def save_config(config: DictConfig) -> None:
    """Write the resolved config, and versions, into the run folder, for people to read; one process does."""
    OmegaConf.save(config, Path(config.paths.run) / "config.yaml", resolve=True)
    save_versions(Path(config.paths.run))


def shown(path: str) -> str:
    """A path as a person would type it: relative to here, if it is below."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _object(node: DictConfig) -> Any:
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        if not isinstance(error.__cause__, ValueError):
            raise
        raise error.__cause__ from None  # a refused value, in the words of what refused it
