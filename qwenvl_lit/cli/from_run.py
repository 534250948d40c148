"""`ckpt=`: config groups and arguments of a command that come from a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenvl_lit.cli.overrides import HELP_FLAGS, has_any, quote, value_of
from qwenvl_lit.cli.start_optimizer import optimizer_of_start
from qwenvl_lit.runs.predictions import config_beside, predictions_file
from qwenvl_lit.runs.run import (
    COMPOSED_CONFIG,
    MACHINE_KEYS,
    Run,
    check_base_model,
    find_run,
    init_from,
)
from qwenvl_lit.runs.stored_config import check_groups
from qwenvl_lit.types import DataError

# Groups that a command with `ckpt=` takes from the run unless the command line chooses them.
FROM_RUN = ("model", "adapter", "init", "data", "metrics", "generation")
# Which groups a model's file chooses, and so a run that training starts from. An adapter chooses
# its learning rates, so another adapter than the run's brings its own (`cli/start_optimizer.py`).
RECIPE = {
    "model": ("adapter", "trainer", "generation"),
    "adapter": ("optim",),
    "optim": (),
    "trainer": (),
    "generation": (),
}


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The arguments of a command as Hydra gets them.

    Attributes:
        run_groups: config nodes by group, to be offered to Hydra as the choice `GROUP=run`.
        notes: lines for the user.
    """

    arguments: list[str]
    run_groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: Sequence[str] = ()


def use_run(arguments: Sequence[str], *, command: str) -> CommandLine:
    """Offers the groups of the run that `ckpt=` names, or that wrote `predictions=`, as `run`.

    The defaults lists of test, predict, chat, serve and export choose `run` for these groups.

    Raises:
        DataError: neither a run nor a model is named, or the run cannot be read.
    """
    ckpt, predictions = value_of(arguments, "ckpt"), value_of(arguments, "predictions")
    if ckpt is not None:
        run = _find_run(arguments, ckpt)
        return CommandLine(
            arguments=_replace_ckpt(arguments, [_checkpoint_argument(run, ckpt)]),
            run_groups=_groups(_config_to_use(run), run.folder),
            notes=_notes(arguments, ckpt, run),
        )
    if predictions is not None:
        config = config_beside(predictions, trust=_trusts(arguments))
        if config is None:
            if not has_any(arguments, "model="):
                folder = predictions_file(predictions).parent
                raise DataError(
                    f"{folder} has no {COMPOSED_CONFIG}, which names model, data and metrics; give "
                    f"the folder that predict or test wrote, or model=, data= and metrics="
                )
            config = {}
        return CommandLine(arguments=list(arguments), run_groups=_groups(config))
    if not has_any(arguments, "model=", *HELP_FLAGS):
        raise DataError(
            f"ckpt is missing: python -m qwenvl_lit.{command} ckpt=RUN (a run folder such as "
            f"outputs/train/..., or ckpt=latest), or a published model, such as model=qwen_vl_chat"
        )
    return CommandLine(arguments=list(arguments), run_groups=_groups({}))


def start_from_run(arguments: Sequence[str]) -> CommandLine:
    """Lets training start from the run that `ckpt=` names: its weights, model and recipe.

    The run's trained weights become the choice `init=run`, its model and recipe `model=run`. Both
    are chosen unless the command line chooses another model. A note says which optimizer follows
    from the adapter.
    """
    ckpt = value_of(arguments, "ckpt")
    if ckpt is None:
        return CommandLine(arguments=list(arguments))
    run = _find_run(arguments, ckpt)
    check_groups(run.config, RECIPE, ckpt)
    groups: dict[str, dict[str, Any]] = {"init": {}}
    choices = ["model=run"]
    if run.checkpoint is not None:
        groups["init"] = init_from(run)
        choices.insert(0, "init=run")
    for group in RECIPE:
        groups[group] = _recipe_node(group, run.config[group])
    notes = _notes(arguments, ckpt, run)
    optimizer = optimizer_of_start(arguments, run)
    if optimizer is not None:
        notes.append(f"{ckpt}: {optimizer.reason}")
        override = {"override /optim@_global_.optim": optimizer.choice}
        groups["model"] |= {"defaults": [override, *groups["model"]["defaults"]]}
    new_choices = [choice for choice in choices if not has_any(arguments, choice[: -len("run")])]
    return CommandLine(
        arguments=_replace_ckpt(arguments, [_checkpoint_argument(run, ckpt), *new_choices]),
        run_groups=groups,
        notes=notes,
    )


def _find_run(arguments: Sequence[str], ckpt: str) -> Run:
    base_model = value_of(arguments, "model.path")
    run = find_run(
        ckpt, trust=_trusts(arguments), verify=_verifies(arguments), base_model=base_model
    )
    if not has_any(arguments, "model="):
        check_base_model(run, ckpt)
    return run


def _trusts(arguments: Sequence[str]) -> bool:
    return value_of(arguments, "trust") == "true"


def _verifies(arguments: Sequence[str]) -> bool:
    return (value_of(arguments, "verify") or "true").lower() != "false"


def _config_to_use(run: Run) -> Mapping[str, Any]:
    if run.checkpoint is None:  # a full model: its adapter is only a recipe for training
        return {**run.config, "adapter": {}}
    return run.config


def _groups(config: Mapping[str, Any], folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """The groups of `FROM_RUN`; files of the validation split are looked up in the run's folder."""
    groups = {group: deepcopy(dict(config.get(group) or {})) for group in FROM_RUN}
    for key in ("special_tokens", "boxes"):
        if str(groups["model"].get(key)).startswith("${"):
            # Stored as a reference to the run's data, which another command may replace.
            groups["model"][key] = groups["data"].get(key)
    if folder is not None:
        data = groups["data"]
        for dataset in (data, *(data.get("datasets") or {}).values()):
            if dataset.get("split_file"):
                dataset["split_file"] = str(folder / Path(dataset["split_file"]).name)
    return groups


def _recipe_node(group: str, node: Mapping[str, Any]) -> dict[str, Any]:
    recipe: dict[str, Any] = {}
    if RECIPE[group]:
        overrides = [{f"override /{other}@_global_.{other}": "run"} for other in RECIPE[group]]
        recipe["defaults"] = [*overrides, "_self_"]
    for key, value in node.items():
        if key not in MACHINE_KEYS:
            recipe[key] = value
    return recipe


def _replace_ckpt(arguments: Sequence[str], replacement: Sequence[str]) -> list[str]:
    replaced: list[str] = []
    for argument in arguments:
        replaced += replacement if argument.startswith("ckpt=") else [argument]
    return replaced


def _checkpoint_argument(run: Run, ckpt: str) -> str:
    """Names the file itself, so that `latest` keeps its meaning when another run is saved."""
    return f"ckpt={quote(str(run.checkpoint or ckpt))}"


def _notes(arguments: Sequence[str], ckpt: str, run: Run) -> list[str]:
    notes = []
    if ckpt == "latest":
        notes.append(f"latest is {run.folder}; runs in other folders: ckpt=FOLDER")
    if run.base_model:
        path = value_of(arguments, "model.path") or run.config["model"]["path"]
        note = f"{ckpt} is an adapter for {run.base_model}"
        if path != run.base_model:
            note += f"; the base model here is {path}"
        notes.append(note)
    return notes
