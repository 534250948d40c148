"""Messages for choices of config groups that do not exist: `model=qwen-vl`, `data=a.jsonl`."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from hydra.errors import MissingConfigException

from qwenvl_lit.extras import missing
from qwenvl_lit.runs.config_folder import config_folder
from qwenvl_lit.runs.model_types import model_arguments
from qwenvl_lit.runs.run import COMPOSED_CONFIG
from qwenvl_lit.types import DataError

PLUGINS = {  # choices that an optional package brings
    "hydra/launcher/submitit_local": "hydra-submitit-launcher",
    "hydra/launcher/submitit_slurm": "hydra-submitit-launcher",
    "hydra/sweeper/optuna": "hydra-optuna-sweeper",
}
DATA_FILES = re.compile(r"\.(?:jsonl?|csv|tsv|parquet)\b|^hf://", re.IGNORECASE)
PATH_START = ("/", "~", "./", "../")


def group_names() -> set[str]:
    """Returns the names of the config groups."""
    return {path.name for path in config_folder().iterdir() if path.is_dir()}


def refuse_paths_as_choices(command: str, arguments: Sequence[str]) -> None:
    """Refuses `GROUP=null`, and paths where the name of a config is expected.

    Hydra reports the first as a defect, and its grammar cannot read some of the paths.

    Raises:
        DataError: names the arguments that were meant.
    """
    groups = group_names()
    for argument in arguments:
        group, equals, value = argument.partition("=")
        if not equals or group not in groups:
            continue
        if value == "null" and group != "experiment":
            raise DataError(f"{group}=null is no choice; {_list_choices(group)}")
        if value.startswith(PATH_START) or (group == "data" and DATA_FILES.search(value)):
            meant = _meant_path(command, group, value)
            if meant:
                raise DataError(
                    f"{argument}: {group} takes the name of a file in conf/{group}; "
                    f"a path is given as {meant}"
                )


def _meant_path(command: str, group: str, value: str) -> str | None:
    """Returns the arguments that name the path `value`; None for groups without paths."""
    path = Path(value).expanduser()
    if group == "data":
        split = "train" if command in ("train", "check") else "test"
        return f"data=jsonl data.{split}={value}"
    if group == "adapter" or (group == "model" and (path / COMPOSED_CONFIG).exists()):
        return f"ckpt={value}"
    if group == "model":
        return model_arguments(value)
    return None


def explain_choice(command: str, error: MissingConfigException) -> str:
    """Returns a line that names the nearest choice and all choices of the group."""
    name = error.missing_cfg_file or ""
    if package := PLUGINS.get(name):
        group, _, choice = name.rpartition("/")
        return missing(package, f"{group}={choice}")
    group, slash, choice = name.partition("/")
    if group == "hydra":
        group, slash, choice = name.rpartition("/")
    if not slash:
        return " ".join(str(error).partition("\nConfig search path")[0].split())
    choices = list(error.options or _choices_of(group))
    nearest = _nearest(choice, choices)
    meant = f"did you mean {group}={nearest}? " if nearest else ""
    if "/" in choice or os.path.exists(choice):
        path = _meant_path(command, group, choice)
        meant = f"a path is given as {path}; " if path else meant
    return f"there is no {group}={choice}; {meant}{_list_choices(group, choices)}"


def _nearest(choice: str, choices: Sequence[str]) -> str | None:
    name = choice.rpartition("/")[2].lower().replace("-", "_")
    matches = [known for known in choices if name and known.startswith(name)]
    matches = matches or difflib.get_close_matches(name, choices, n=1)
    return matches[0] if matches else None


def _choices_of(group: str) -> list[str]:
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


def _list_choices(group: str, choices: Sequence[str] | None = None) -> str:
    return f"the choices are {', '.join(choices or _choices_of(group))}"
