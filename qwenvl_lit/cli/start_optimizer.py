"""The optimizer of training that starts from a run: the run's, or that of another adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import hydra
from hydra.errors import HydraException
from omegaconf import OmegaConf

from qwenvl_lit.cli.overrides import has_any, value_of
from qwenvl_lit.runs.config_folder import config_folder
from qwenvl_lit.runs.model_types import recipe_of
from qwenvl_lit.runs.run import Run, folders_of
from qwenvl_lit.runs.stored_config import read_config

HYDRA_CONFIG = ".hydra/hydra.yaml"  # of a run folder; names the choices of the run


class StartOptimizer(NamedTuple):
    """The file of conf/optim that a start uses, or `run`, and why."""

    choice: str
    reason: str


def optimizer_of_start(arguments: Sequence[str], run: Run) -> StartOptimizer | None:
    """Returns the optimizer of training that starts from `run`.

    With the adapter of the run, it is the run's. With another adapter, it is the one that training
    the run's model with this adapter has: that of the model's file, otherwise that of the adapter.

    None if the arguments choose the optimizer, or choose it through another model, an experiment or
    several adapters.
    """
    adapter = value_of(arguments, "adapter")
    chosen = has_any(arguments, "optim=", "experiment=")
    if chosen or value_of(arguments, "model") not in (None, "run") or "," in (adapter or ""):
        return None
    is_given = has_any(arguments, "optim.lr=")
    rate = "" if is_given else f" (optim.lr={run.config['optim'].get('lr')})"
    owner = f"the recipe of {run.recipe}" if run.recipe else "the run"
    of_run = StartOptimizer("run", f"the optimizer is that of {owner}{rate}")
    if adapter in (None, "run"):
        return of_run
    model = _model_of(run)
    try:
        composed = _compose(model or recipe_of(str(run.config["model"].get("path"))), adapter)
    except HydraException:  # Hydra reports it when it composes all arguments
        return None
    if OmegaConf.to_container(composed.adapter) == run.config["adapter"]:
        return of_run
    choice = composed.hydra.runtime.choices.optim
    now = "" if is_given else f" (optim.lr={composed.optim.lr})"
    trained = f"model={model} " if model else ""
    has_adapter_file = run.recipe and run.checkpoint
    adapted = "the folder" if has_adapter_file else owner
    reason = (
        f"{adapted} has another adapter, so the optimizer is optim={choice}{now}, as for "
        f"{trained}adapter={adapter}; to keep that of {owner}{rate}: optim=run"
    )
    return StartOptimizer(choice, reason)


def _compose(model: str, adapter: str) -> Any:
    choices = [f"model={model}", f"adapter={adapter}"]
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose("train", choices, return_hydra_config=True)


def _model_of(run: Run) -> str | None:
    """Returns the file of conf/model that a run was trained with; None if it is unknown.

    A run that started from a run has the model of that one.
    """
    for folder in folders_of(run):
        if not (folder / HYDRA_CONFIG).exists():
            return None
        stored = OmegaConf.create(read_config(folder / HYDRA_CONFIG))
        model = OmegaConf.select(stored, "hydra.runtime.choices.model")
        if model != "run":
            known = (config_folder() / "model" / f"{model}.yaml").is_file()
            return model if known else None
    return None
