"""Builds objects from a composed config.

Hydra stops here: the modules below take plain values.
"""

from __future__ import annotations

import logging
import os
import re
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
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from torchmetrics import Metric
from transformers.utils.logging import disable_progress_bar

from qwenvl_lit import checksums, extras
from qwenvl_lit.atomic import write_text
from qwenvl_lit.callbacks.peers import Peers
from qwenvl_lit.callbacks.throughput import DataWaitProfiler
from qwenvl_lit.callbacks.tracked_runs import RUN_ID, TrackedRuns, run_ids
from qwenvl_lit.callbacks.validation import ValidationSchedule
from qwenvl_lit.callbacks.vision_cache import VisionCache
from qwenvl_lit.cores import available_cores
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.data.features import CachedFeatures
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.models.protocols import FeatureSource, Processor
from qwenvl_lit.runs.composed_config import check_composed_config
from qwenvl_lit.runs.model_types import check_model_path
from qwenvl_lit.runs.run import Run
from qwenvl_lit.runs.versions import save_versions
from qwenvl_lit.settings import accumulated_batches, check_seed
from qwenvl_lit.stopping import signals
from qwenvl_lit.terminal import PrintableRecords, printable
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.training.precision import FLOAT16, Float16Precision
from qwenvl_lit.training.strategies import DeviceMapStrategy
from qwenvl_lit.types import DataError

LIBRARIES = ("lightning.", "torchmetrics.", "torch.")  # their messages do not name the key
# ModuleNotFoundError: an option needs an optional package; the message has the pip command.
REFUSALS = (MisconfigurationException, ModuleNotFoundError, ValueError, TypeError)
IGNORED_WARNINGS = (  # regular expressions
    ".*does not have many workers.*",
    ".*LeafSpec.*",
    "Total length of .* across ranks is zero.*",  # without validation
    ".*gradient_checkpointing.* is deprecated.*",  # peft uses a name that transformers renamed
    ".*sync_dist=True.*",  # our metrics are reduced across ranks by torchmetrics
    ".*Corrupt EXIF data.*",  # the pixels are sound
    ".*could be decompression bomb.*",  # `images.MAX_IMAGE_PIXELS` is the limit
    ".*smaller than the logging interval.*",  # `RunLog` says what follows
    ".*requested to overfit but enabled val.*",  # the order of validation rows does not matter
    ".*FSDP2-wrapped module .* returned a view.*",  # we change no output in place
)


def module(
    config: DictConfig,
    *,
    adapted: bool = True,
    trained_checkpoint: Path | None = None,
    load_device: torch.device | str = "cpu",
    features: FeatureSource | None = None,
) -> VisionLanguageModule:
    """Builds the LightningModule of `config`. Its weights are loaded by `configure_model`.

    Args:
        adapted: False for the published model, without adapter and starting checkpoint.
        trained_checkpoint, load_device, features: as for `VisionLanguageModule`.

    Raises:
        DataError: the config is for training, and its model can only answer; or the weights at
            `model.path` are damaged.
    """
    if "speed" in config and config.model.get("load_in_4bit"):
        raise DataError(
            "model.load_in_4bit quantizes a model that only answers; "
            "to train adapters on a 4-bit model: adapter=qlora"
        )
    if config.get("verify", True):
        checksums.verify(Path(str(config.model.get("path"))).expanduser())
    adapter, init = None, None
    if adapted:
        adapter = _instantiate(config.adapter) or None
        init = _instantiate(config.init) or None
    return VisionLanguageModule(
        family=_instantiate(config.model),
        adapter=adapter,
        generation=generation(config),
        metrics=metrics(config),
        optim=_instantiate(config.get("optim")),
        speed=_instantiate(config.get("speed")),
        init=init,
        trained_checkpoint=trained_checkpoint,
        load_device=load_device,
        config=OmegaConf.to_container(config),
        features=features,
    )


def trained_module(
    run: Run,
    changes: Mapping[str, Any],
    *,
    load_device: torch.device | str = "cpu",
    verify: bool = True,
) -> VisionLanguageModule:
    """Builds the module of a run, with the tensors that the run has trained, to answer.

    Args:
        changes: settings of the model that replace those of the run.
        verify: compare the base weights with their checksums, if they have any.

    Raises:
        DataError: `changes` name a base model of another kind.
    """
    config = {"init": None, **run.config, "metrics": {}, "verify": verify}
    config["model"] = {**config["model"], **changes}
    check_model_path(config["model"])
    for group in ("optim", "speed"):  # for training
        config.pop(group, None)
    return module(
        OmegaConf.create(config),
        adapted=run.checkpoint is not None,
        trained_checkpoint=run.checkpoint,
        load_device=load_device,
    )


def metrics(config: DictConfig) -> dict[str, Metric]:
    """Builds the metrics of answers, by name."""
    return _instantiate(config.metrics) or {}


def generation(config: DictConfig) -> Generation:
    """Builds the settings of generation."""
    return _instantiate(config.generation)


def processor(config: DictConfig) -> Processor:
    """Builds the processor of the config's model; no weights are loaded."""
    return _instantiate(config.model).processor()


def cached_features(config: DictConfig) -> CachedFeatures | None:
    """Returns the feature source that `module` and `trainer` share; None without vision cache."""
    return CachedFeatures() if config.speed.vision_cache else None


def data(
    config: DictConfig,
    processor: Processor,
    answered: Mapping[str, Mapping[int, str]] | None = None,
) -> DataModule:
    """Builds the DataModule of `config`.

    Its node is a `_partial_`, since objects that are already built must not pass through
    `instantiate`.

    Args:
        answered: rows that `predict` leaves out, see `DataModule`.

    Raises:
        DataError: no data was chosen, and there is no run to take it from; or the data has special
            tokens that the processor does not let through, or boxes in another form than it writes.
    """
    if not config.data:
        raise DataError(
            "data is missing: choose data=..., for example data=jsonl data.test=my.jsonl"
        )
    if "datasets" in config.data and not config.data.datasets:
        raise DataError(
            "data.datasets is missing: name the datasets and how many rows an epoch takes of each, "
            "for example data.datasets={coco_en_mini:2000,refcoco:0.5}"
        )
    node = config.data.copy()  # it keeps its place in `config`, for interpolations
    OmegaConf.set_struct(node, False)
    special_tokens = node.pop("special_tokens", None) or ()
    missing = [name for name in special_tokens if name not in processor.special_tokens]
    if missing:
        raise DataError(
            f"data.special_tokens: the model was trained without {', '.join(missing)}, and a run "
            f"keeps its special tokens; leave them out"
        )
    boxes = node.pop("boxes", None)
    if boxes is not None and boxes != processor.boxes:
        raise DataError(
            f"data.boxes={boxes}: the model writes boxes as {processor.boxes or 'null'}, and keeps "
            f"that; leave it out, or set model.boxes"
        )
    return _instantiate(node)(processor=processor, answered=answered)


def trainer(
    config: DictConfig,
    *,
    callbacks: Mapping[str, Any] | None = None,
    features: CachedFeatures | None = None,
) -> lightning.Trainer:
    """Builds Lightning's trainer, which writes into the run folder.

    Args:
        callbacks: config nodes that replace the callbacks of the config.
        features: filled by the vision cache before the first step; see `cached_features`.

    Raises:
        DataError: a GPU is asked for and there is none.
        ValueError: names the key whose value Lightning refuses.
    """
    nodes = dict(config.callbacks if callbacks is None else callbacks)
    if not sys.stdout.isatty():
        nodes.pop("progress", None)  # a progress bar needs a terminal; `RunLog` prints lines
    built: list[lightning.Callback] = [Peers()]
    for name, node in nodes.items():
        built.append(_instantiate(node, f"callbacks.{name}"))
    if features is not None:
        folder = Path(config.paths.cache, "vision")
        built.append(VisionCache(features, folder, limit_gb=config.speed.vision_cache_gb))
    if config.trainer.accelerator == "gpu" and not torch.accelerator.is_available():
        raise DataError(
            "there is no GPU: strategy=auto uses what there is; "
            "strategy=ddp_cpu and strategy=fsdp_cpu run distributed code on the CPU"
        )
    validation = ValidationSchedule(
        config.trainer.validate_every, batches=config.trainer.val_check_interval
    )
    built.append(validation)
    settings = dict(config.trainer)
    for name in ("validate_every", "rows_per_step"):  # ours
        settings.pop(name, None)
    if config.get("data"):
        settings["accumulate_grad_batches"] = accumulated_batches(config.trainer, config.data)
    make_trainer = _instantiate(OmegaConf.create(settings))
    options = validation.trainer_options
    if config.model.get("device_map"):
        options["strategy"] = DeviceMapStrategy()
    if str(config.trainer.precision) in FLOAT16:
        options |= {"precision": None, "plugins": Float16Precision("cuda")}
    if not config.trainer.get("profiler"):
        options["profiler"] = DataWaitProfiler()  # `Throughput` reads it
    built_loggers = loggers(config)
    options["logger"] = list(built_loggers.values()) or False
    trackers = {name: each for name, each in built_loggers.items() if _run_id_key(config, name)}
    if trackers:
        built.append(TrackedRuns(trackers))
    try:
        built_trainer = make_trainer(
            default_root_dir=config.paths.run,
            enable_progress_bar="progress" in nodes,
            # If it is enabled without such a callback, Lightning adds its own.
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in built),
            callbacks=built,
            **options,
        )
    except REFUSALS as error:
        raise ValueError(f"{_refused_keys(config.trainer, error)}: {_first_line(error)}") from error
    if built_trainer.world_size > 1:
        signals.hold_back()  # Lightning starts the other ranks
    return built_trainer


def loggers(config: DictConfig) -> dict[str, Logger]:
    """Builds the loggers by name. A resumed run continues as the same run of its trackers.

    Raises:
        ValueError: names the key of the logger that cannot start, with the reason.
    """
    ids = run_ids(Path(config.paths.run))
    built = {}
    for name, node in (config.get("logger") or {}).items():
        key = _run_id_key(config, name)
        if key and name in ids:
            node = node.copy()  # it keeps its place in `config`, for interpolations
            OmegaConf.set_struct(node, False)
            node[key] = ids[name]
        built[name] = _instantiate(node, f"logger.{name}")
    return built


def _run_id_key(config: DictConfig, name: str) -> str | None:
    """The argument of a logger that names an earlier run; None if there is none."""
    return RUN_ID.get(str(config.logger[name].get("_target_")))


def _refused_keys(settings: DictConfig, error: Exception) -> str:
    """Names the keys that the message of a refused setting is about."""
    words = set(re.findall(r"[\w./-]+", str(error)))
    keys = []
    for name, value in settings.items():
        is_plain = isinstance(value, str | float) or (type(value) is int and value not in (0, 1))
        if name in words or (is_plain and str(value) in words):
            keys.append(f"trainer.{name}={value}")
    return " ".join(keys) or "trainer"


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def start(config: DictConfig) -> None:
    """Checks the config, seeds all random generators, and silences needless warnings.

    Other warnings are logged, each as one line.

    Raises:
        ValueError: a value is of a type that its class does not take, or the seed is none.
    """
    check_composed_config(config)
    check_seed(config.seed)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), available_cores()))
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    if config.trainer.get("deterministic"):
        # cuBLAS reads it when it is first used; torch refuses to be deterministic without it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # torch reads it when it first compiles: the next run finds the kernels of this one
    kernels = Path(config.paths.cache).expanduser().absolute() / "kernels"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kernels))
    for handler in logging.getLogger().handlers:
        handler.addFilter(PrintableRecords())
    if not sys.stderr.isatty():
        disable_progress_bar()  # transformers' bar of loaded weights
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Says that checkpointed blocks must not have side effects; ours have none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    warnings.showwarning = _log_warning
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def _log_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object
) -> None:
    """Logs a warning of Python as one line, without the source line that caused it."""
    text = " ".join(str(message).split())
    logging.getLogger(category.__name__).warning("%s (%s:%d)", text, Path(filename).name, lineno)


@rank_zero_only
def save_config(config: DictConfig) -> None:
    """Writes the resolved config and the versions of libraries into the run folder (rank 0)."""
    folder = Path(config.paths.run)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    save_versions(folder)


def shown(path: str) -> str:
    """Returns `path` to be printed: relative to the current folder if it is inside."""
    here = Path.cwd()
    inside = Path(path).is_relative_to(here)
    return printable(str(Path(path).relative_to(here)) if inside else path)


def _instantiate(node: DictConfig | None, key: str = "") -> Any:
    """Builds what a config node describes; plain values become dicts and lists, None stays None.

    Args:
        key: of the node, for messages about classes of Lightning and torchmetrics.

    Raises:
        ValueError: a constructor refused a value, or a class cannot be imported. Hydra's wrapper
            around this error is removed.
    """
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if cause is not None and isinstance(cause.__cause__, ModuleNotFoundError):
            raise ValueError(extras.not_importable(str(error), cause.__cause__)) from None
        if isinstance(cause, TypeError) and "unexpected keyword argument" in str(cause):
            raise ValueError(f"{_first_line(cause)}; leave out this key") from None
        target = str(node.get("_target_", "")) if isinstance(node, DictConfig) else ""
        refused = isinstance(cause, REFUSALS) or key.startswith("logger.")
        if key and target.startswith(LIBRARIES) and refused:
            raise ValueError(f"{key}: {_first_line(cause)}") from None
        if not isinstance(cause, ValueError):
            raise
        raise cause from None
