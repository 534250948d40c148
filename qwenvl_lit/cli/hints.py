"""Messages for command lines that Hydra cannot compose: what is wrong and what was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

import hydra
from hydra.errors import (
    ConfigCompositionException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf

from qwenvl_lit.extras import missing
from qwenvl_lit.runs.run import config_folder

PLUGINS = {  # choices that an optional package brings
    "hydra/launcher/submitit_local": "hydra-submitit-launcher",
    "hydra/launcher/submitit_slurm": "hydra-submitit-launcher",
    "hydra/sweeper/optuna": "hydra-optuna-sweeper",
}


def explain(command: str, arguments: Sequence[str], error: Exception) -> str:
    """A composition error in a line or two, with the nearest key or the available choices."""
    if isinstance(error, MissingConfigException):
        package = PLUGINS.get(error.missing_cfg_file)
        if package:
            group, _, choice = error.missing_cfg_file.rpartition("/")
            return missing(package, f"{group}={choice}")
        return _list_choices(str(error))
    if isinstance(error, ConfigCompositionException):
        unknown_key = re.search(r"override '([^']+)'", str(error))
        if unknown_key:
            key = unknown_key[1]
            return f"there is no key {key!r}{_hint(command, arguments, key)}"
    return str(error).strip()


def _list_choices(message: str) -> str:
    """Hydra's message on a missing choice, on two lines."""
    choices = message.split("\nConfig search path")[0].strip()
    return choices.replace("\n\n", "\n").replace(":\n\t", ": ").replace("\n\t", ", ")


def _hint(command: str, arguments: Sequence[str], key: str) -> str:
    """What to write instead of a key that the composed config does not have."""
    group, _, inner_key = key.partition(".")
    choices = _files_with_key(group, inner_key) if inner_key else []
    if choices:
        verb = "has" if len(choices) == 1 else "have"
        named = ", ".join(f"{group}={choice}" for choice in choices)
        return f" with the choices made here; {named} {verb} it"
    commands = _files_with_key("", key)
    if commands:
        return f"; it is a key of {', '.join(commands)}"
    known_keys = _keys(_compose_for_hints(command, arguments))
    if key in known_keys:
        return (
            " with the choices made here; in a mixture, write it under the dataset's name in "
            "data.datasets"
        )
    nearest = difflib.get_close_matches(key, known_keys, n=3, cutoff=0.75)
    if nearest:
        return f"; did you mean {' or '.join(nearest)}?"
    return f"; see python -m qwenvl_lit.{command} --help"


def _files_with_key(group: str, key: str) -> list[str]:
    """Names of the config files directly in `group` that set `key` at their top level."""
    line = re.compile(rf"^{re.escape(key)}:", re.MULTILINE)
    files = sorted((config_folder() / group).glob("*.yaml"))
    return [file.stem for file in files if line.search(file.read_text(encoding="utf-8"))]


def _compose_for_hints(command: str, arguments: Sequence[str]) -> DictConfig:
    """The config with the group choices of the command line, or without if those are wrong too."""
    groups = {path.name for path in config_folder().iterdir() if path.is_dir()}
    choices = [argument for argument in arguments if argument.partition("=")[0] in groups]
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        try:
            return hydra.compose(command, choices)
        except (ConfigCompositionException, MissingConfigException, OverrideParseException):
            return hydra.compose(command)


def _keys(config: DictConfig) -> list[str]:
    """Dotted names of all keys, `_target_` and the like left out."""
    keys: list[str] = []
    pending = [("", OmegaConf.to_container(config, resolve=False))]
    while pending:
        prefix, node = pending.pop()
        for name, value in node.items():
            if str(name).startswith("_"):
                continue
            keys.append(f"{prefix}{name}")
            if isinstance(value, dict):
                pending.append((f"{prefix}{name}.", value))
    return keys
