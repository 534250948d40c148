"""Run folders of training, and how `ckpt=` finds a run or a model that others trained.

outputs/train/2026-11-23_09-00-00/
    .hydra/config.yaml          the composed config with its interpolations, which other commands
                                start from
    and the files in `CONTENTS`
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from qwenvl_lit import checksums
from qwenvl_lit.runs.config_folder import config_folder
from qwenvl_lit.runs.model_types import (
    cached_folder,
    fetch_descriptions,
    published_name,
    recipe_of,
    recipe_settings,
    refuse_gguf,
)
from qwenvl_lit.runs.stored_config import (
    check_groups,
    check_stored_config,
    group_targets,
    read_config,
)
from qwenvl_lit.stored_files import check_file, read_checkpoint, read_json_object
from qwenvl_lit.terminal import wrapped
from qwenvl_lit.types import DataError
from qwenvl_lit.value_types import brief, is_unresolved

SUFFIX = ".ckpt"  # of checkpoints; a copy may have another
MAX_NAMED = 4  # runs in a message
TRAIN_FOLDER = Path("outputs/train")
COMPOSED_CONFIG = ".hydra/config.yaml"
CONTENTS = {  # of a run folder; the last five only if there is something to write
    "checkpoints/best.ckpt": "trained weights at the best validation",
    "checkpoints/best_adapter": "the same in peft's format",
    "checkpoints/last.ckpt": "trained weights at the end; resume=RUN continues from here",
    "checkpoints/last_adapter": "the same in peft's format",
    "metrics.json": "scores of the last and of the best validation",
    "logging.jsonl": "loss, learning rates and scores, one line per logged step and validation",
    "curves": "plots of these",
    "samples": "images of each validation, with answers and boxes",
    "config.yaml": "all settings",
    "trainable.json": "which parameters are trained",
    "versions.json": "libraries, git commit, machine and command",
    "split.json": "rows held out for validation (split_NAME.json: for a dataset of a mixture)",
    "findings.jsonl": "rows that were left out or repaired",
    "csv": "the logged values as a table",
    "train.log": "warnings",
}
# Groups of a stored config that other commands build objects from
NEEDED_GROUPS = ("model", "adapter", "generation")  # to answer
USED_GROUPS = (*NEEDED_GROUPS, "init", "data", "metrics", "optim", "trainer")
RECIPE_GROUPS = ("adapter", "optim", "trainer")  # of a config: how a model was trained
MACHINE_KEYS = ("accelerator", "devices", "num_nodes", "strategy")  # of `trainer`: not the recipe's
UNKNOWN_PATH = "???"  # to be given with model.path=
SETTINGS = "qwenvl_lit.json"  # in an exported folder: parts of the config of its run


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A trained model: its config and its checkpoint."""

    config: dict[str, Any]
    """Plain data, with interpolations."""
    checkpoint: Path | None
    """None for a full model, whose own weights are the trained ones."""
    folder: Path | None
    """None for a checkpoint outside its run folder, and for a model that others trained."""
    base_model: str | None = None
    """The base model that an adapter folder of others names."""
    recipe: str | None = None
    """The file of conf/model with the recipe for a model of others; None: the run's own recipe."""


def folders_of(run: Run) -> Iterator[Path]:
    """Yields the folders of a run and of the runs that it started from, which may be gone."""
    folder, init = run.folder, run.config.get("init")
    while folder is not None:
        yield folder
        if not init:
            return
        folder, init = Path(init["checkpoint"]).parent.parent, init.get("init")


def find_run(
    ckpt: str, *, trust: bool = False, verify: bool = True, base_model: str | None = None
) -> Run:
    """Finds what `ckpt=` names.

    That is "latest", a run folder (its best checkpoint, otherwise its last one), a checkpoint file,
    an adapter folder of peft, or the folder of a full model.

    Args:
        trust: accept a config that names classes which are not part of this package.
        verify: compare the weights with their checksums, if they have any.
        base_model: the base model of an adapter folder; None: the one that it names.

    Raises:
        DataError: there is no such run, it has no checkpoint, its config is not trusted, its
            weights are damaged, or it is of a model that is not read.
    """
    run = _find_run(ckpt, trust=trust, base_model=base_model)
    source = run.folder / COMPOSED_CONFIG if run.folder else run.checkpoint or ckpt
    used: Any = run.config
    if isinstance(run.config, Mapping):
        used = {group: run.config[group] for group in USED_GROUPS if group in run.config}
    check_stored_config(used, source, trust=trust)
    check_groups(run.config, NEEDED_GROUPS, source)
    if verify:
        checksums.verify(run.checkpoint or Path(ckpt).expanduser())
    return run


def check_base_model(run: Run, source: str) -> None:
    """Raises a DataError if `source` is an adapter folder without the name of its base model."""
    if run.recipe and run.config["model"].get("path") == UNKNOWN_PATH:
        raise DataError(
            f"{source} is an adapter whose adapter_config.json names no base model: give "
            f"model.path=FOLDER, or in Python base_model=FOLDER"
        )


def find_model_on_hub(
    name: str, *, download: bool, trust: bool = False, verify: bool = True
) -> Run:
    """Finds a full model by its name on the hub. Its weights are not fetched yet.

    Args:
        download: whether files that describe the model may be fetched, if the hub's cache has none.
        trust, verify: as for `find_run`.

    Raises:
        DataError: the model is not one of those that are read, or its files are damaged.
    """
    folder = cached_folder(name) or (fetch_descriptions(name, [SETTINGS]) if download else None)
    stored = {}
    if folder is not None:
        stored = stored_settings(folder, trust=trust)
        if verify:
            checksums.verify(folder)
    config = _recipe(name, {**stored, "model": {**stored.get("model", {}), "path": name}})
    return Run(config=config, checkpoint=None, folder=None, recipe=_recipe_file(name, stored))


def _find_run(ckpt: str, *, trust: bool, base_model: str | None) -> Run:
    path = latest_run() if ckpt == "latest" else Path(ckpt).expanduser()
    if path is None:
        raise DataError(
            f"latest: there is no run with a checkpoint in {TRAIN_FOLDER.resolve()}; a run that "
            f"hydra.run.dir= put elsewhere, or a job of a sweep, is given by its folder, "
            f"ckpt=FOLDER; to train one: python -m qwenvl_lit.train"
        )
    if not path.exists():
        raise DataError(f"{ckpt} does not exist; {_known_runs()}")
    refuse_gguf(str(path))
    if path.name.startswith("adapter_model.") and path.is_file():
        path = path.parent
    if path.is_file():
        folder = path.parent.parent
        if (folder / COMPOSED_CONFIG).exists():
            config = _composed_config(folder)
            return Run(config=config, checkpoint=path, folder=folder)
        if path.suffix != SUFFIX and not zipfile.is_zipfile(path):  # torch writes zip files
            raise DataError(
                f"{ckpt} is not a checkpoint of a run, expected a file such as best.ckpt; give a "
                f"run folder, a checkpoint in it, an adapter folder or a folder with a full model"
            )
        return Run(config=_config_in(path), checkpoint=path, folder=None)
    if (path / "adapter_config.json").exists():
        return _find_adapter(path, trust=trust, given_base=base_model)
    if (path / "config.json").exists():
        return _find_full_model(path, trust=trust)
    if not (path / COMPOSED_CONFIG).exists():
        meant = run_near(path)
        adapters = [file.parent for file in path.glob("*/adapter_config.json")]
        if adapters and not meant:
            newest = max(adapters, key=lambda folder: folder.stat().st_mtime)
            raise DataError(
                f"{ckpt} has adapters in folders of their own; choose one: ckpt={newest}"
            )
        raise DataError(
            f"{ckpt} is not a run folder (it has no {COMPOSED_CONFIG}); {meant or _known_runs()}"
        )
    for name in ("best.ckpt", "last.ckpt"):
        checkpoint = path / "checkpoints" / name
        if checkpoint.exists():
            check_file(checkpoint)
            config = _composed_config(path)
            return Run(config=config, checkpoint=checkpoint, folder=path)
    raise DataError(
        f"{ckpt} has no checkpoints/best.ckpt or last.ckpt: the run was stopped before it saved one"
    )


def _composed_config(folder: Path) -> Any:
    """Reads the config of a run folder.

    Raises:
        DataError: the file is damaged. One that was cut off within the model, which would be
            another model, lacks `data`: Hydra writes it behind the model.
    """
    file = folder / COMPOSED_CONFIG
    config = read_config(file)
    if isinstance(config, Mapping) and "data" not in config:
        raise DataError(f"{file}: the stored config lacks data; is the file damaged?")
    return config


def init_from(run: Run) -> dict[str, Any]:
    """Returns the config node `init` for a run that starts from the checkpoint of `run`.

    It includes the checkpoints that `run` itself had started from.
    """
    from qwenvl_lit.training.adapters.merging import StartingCheckpoint, fingerprint

    assert run.checkpoint is not None  # a full model is given as model.path
    return {
        "_target_": f"{StartingCheckpoint.__module__}.{StartingCheckpoint.__name__}",
        "checkpoint": str(run.checkpoint.resolve()),
        "sha256": fingerprint(run.checkpoint),
        "adapter": run.config["adapter"],
        "init": run.config.get("init") or {},
    }


def latest_run() -> Path | None:
    """Returns the newest folder in `outputs/train` that has a checkpoint."""
    saved = [folder for folder in TRAIN_FOLDER.glob("*") if any(folder.glob("checkpoints/*.ckpt"))]
    return max(saved, key=lambda folder: folder.stat().st_mtime, default=None)


def run_near(path: Path) -> str:
    """Returns a clause that names the runs of which `path` is a part, or a sweep; "" if none."""
    if (path.parent / COMPOSED_CONFIG).exists():
        return f"the run is {path.parent}"
    jobs = [folder for folder in path.glob("*") if (folder / COMPOSED_CONFIG).exists()]
    if not jobs:
        return ""
    jobs.sort(key=lambda folder: (len(folder.name), folder.name))
    names = ", ".join(map(str, jobs[:MAX_NAMED]))
    more = f" and {len(jobs) - MAX_NAMED} more" if len(jobs) > MAX_NAMED else ""
    return f"it holds the runs {names}{more}: give one of them"


def contents(folder: Path) -> str:
    """Lists the files of a run folder, one line each."""
    lines = []
    for name, description in CONTENTS.items():
        if (folder / name).exists():
            lines.append(wrapped(f"  {name:24} {description}", indent=27))
    return "\n".join(lines)


def stored_settings(folder: Path, *, trust: bool = False) -> dict[str, dict[str, Any]]:
    """Reads the groups that an exported folder stores, with `_target_`.

    These are `model`, `generation` and, if a run was exported, its recipe. Empty for folders that
    others wrote.

    Raises:
        DataError: the file is damaged, or has settings that these groups do not know.
    """
    file = folder / SETTINGS
    if not file.exists():
        return {}
    settings = read_json_object(file)
    known = ("model", "generation", *RECIPE_GROUPS)
    for group, node in settings.items():
        if group not in known:
            raise DataError(f"{file}: {group} is unknown; expected {', '.join(known)}")
        if not isinstance(node, dict):
            raise DataError(f"{file}: {group} is {brief(node)}, expected a JSON object")
        if group == "model":  # of an older folder: config.json says whose settings these are
            target = recipe_settings(recipe_of(str(folder)))["_target_"]
        else:
            target, *others = group_targets(group)
            if others and "_target_" not in node:
                raise DataError(f"{file}: {group} has no _target_")
        settings[group] = {"_target_": target, **node}
    check_stored_config(settings, file, trust=trust)
    if is_unresolved(settings):
        raise DataError(f"{file} has an interpolation or ???; exported settings have neither")
    return settings


def _known_runs() -> str:
    newest = latest_run()
    if newest is None:
        return (
            f"there is no run in {TRAIN_FOLDER.resolve()} either; "
            f"train one first: python -m qwenvl_lit.train"
        )
    return f"the newest run here is {newest}"


def _config_in(checkpoint: Path) -> dict[str, Any]:
    """Reads the config that is stored in a checkpoint."""
    config = read_checkpoint(checkpoint).get("config")
    if config is None:
        raise DataError(f"{checkpoint} has no config: it was not written by this package")
    return config


def _find_adapter(folder: Path, *, trust: bool, given_base: str | None) -> Run:
    """An adapter folder of peft, written by a run of this package or by others."""
    from qwenvl_lit.training.adapters.peft_files import adapter_node, read_peft_config, weights_file

    run_folder = folder.resolve().parent.parent
    in_checkpoints = folder.resolve().parent.name == "checkpoints"
    if in_checkpoints and (run_folder / COMPOSED_CONFIG).exists():
        config = _composed_config(run_folder)
        return Run(config=config, checkpoint=weights_file(folder), folder=run_folder)
    base_model = read_peft_config(folder).get("base_model_name_or_path") or None
    path = given_base or _base_model_path(base_model)
    stored = stored_settings(folder, trust=trust)
    config = _recipe(path, stored or {"model": {"path": path}})
    return Run(
        config={**config, "adapter": adapter_node(folder)},
        checkpoint=weights_file(folder),
        folder=None,
        base_model=base_model,
        recipe=_recipe_file(path, stored),
    )


def _find_full_model(folder: Path, *, trust: bool) -> Run:
    """A full model, written by `export` or by another program."""
    stored = stored_settings(folder, trust=trust)
    model = {**stored.get("model", {}), "path": str(folder)}
    config = _recipe(str(folder), {**stored, "model": model})
    recipe = _recipe_file(str(folder), stored)
    return Run(config=config, checkpoint=None, folder=None, recipe=recipe)


def _base_model_path(name: str | None) -> str:
    """The `model.path` for the base model that an adapter folder names.

    ms-swift writes folders of its own cache, of which only the last part is meaningful elsewhere.
    """
    if name is None:
        return UNKNOWN_PATH
    if Path(name).expanduser().is_dir():
        return name
    return published_name(name) or name


def _recipe_file(path: str, stored: Mapping[str, Any]) -> str | None:
    """The file of conf/model with the recipe; None if the folder of the model stores one."""
    return None if "optim" in stored else recipe_of(path)


def _recipe(path: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The config for training the model at `path`, updated with `settings`; no data."""
    config = deepcopy(_composed_for(recipe_of(path)))
    model = settings["model"]
    if "_target_" not in model:
        model = {**config["model"], **model}
    trainer = {**config["trainer"], **settings.get("trainer", {})}
    empty: dict[str, Any] = {"init": {}, "data": {}, "metrics": {}}
    return {**config, **settings, "model": model, "trainer": trainer, **empty}


@cache
def _composed_for(model: str) -> dict[str, Any]:
    """The config of `train model=...`."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    # A running command has initialized Hydra already.
    initialized: AbstractContextManager[Any] = nullcontext()
    if not GlobalHydra.instance().is_initialized():
        initialized = hydra.initialize_config_dir(str(config_folder()), version_base="1.3")
    with initialized:
        config = hydra.compose("train", [f"model={model}"])
        return cast("dict[str, Any]", OmegaConf.to_container(config))
