"""Messages for command lines that Hydra cannot compose: what is wrong and what was meant."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import hydra
from hydra.errors import (
    ConfigCompositionException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf

from qwenvl_lit.cli.choices import explain_choice, group_names
from qwenvl_lit.cli.other_names import OTHER_COMMANDS, combine, translate, value_from
from qwenvl_lit.cli.overrides import FLAGS
from qwenvl_lit.runs.run import config_folder
from qwenvl_lit.types import DataError


def explain(command: str, arguments: Sequence[str], error: Exception) -> str:
    """A composition error in a line, with the nearest key or the available choices."""
    try:
        return _explain(command, arguments, error)
    except DataError as not_read:  # the arguments name a model that is not read
        return str(not_read)


def _explain(command: str, arguments: Sequence[str], error: Exception) -> str:
    if isinstance(error, MissingConfigException):
        return explain_choice(command, error)
    text = str(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read; in single quotes, a value is taken as text"
    if isinstance(error, ConfigCompositionException):
        existing = re.search(r"Could not append to config. An item is already at '(.+?)'", text)
        if existing:
            return f"{existing[1]} is a key already; to change it, leave out the + before it"
        unknown_key = re.search(r"override '([^']+)'", text)
        if unknown_key:
            keys = dict.fromkeys([unknown_key[1], *_unknown_keys(command, arguments)])
            return "; ".join(_explain_key(command, arguments, key) for key in keys)
        several = re.search(r"Ambiguous value for argument '(.+)'", text)
        if several:
            key, _, values = several[1].partition("=")
            return (
                f"{several[1]} has several values: {key}=[{values}] is a list, and -m starts a "
                f"sweep over them"
            )
        repeated = re.search(r"Multiple values for (\S+)\.", text)
        if repeated:
            return f"{repeated[1]} has a choice already; to change it, leave out the + before it"
    return " ".join(text.split())


def _unknown_keys(command: str, arguments: Sequence[str]) -> Iterator[str]:
    """Yields the keys of `key=value` that the composed config does not have; Hydra names one."""
    known = {*_keys(_compose_for_hints(command, arguments)), *group_names()}
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        is_own = re.fullmatch(r"[\w.]+", key) and not key.startswith("hydra.")
        if equals and is_own and key not in known:
            yield key


def _explain_key(command: str, arguments: Sequence[str], key: str) -> str:
    meant = _translated(command, arguments, key)
    if meant and any(part.startswith(f"{key}=") for part in meant.split()):
        meant = None  # another choice of the group has this key
    hint = f"; here it is {meant}" if meant else _hint(command, arguments, key)
    return f"there is no key {key!r}{hint}"


def refuse_options(command: str, arguments: Sequence[str]) -> None:
    """Refuses options such as `--learning_rate 1e-4`, which argparse would only call unknown.

    Raises:
        DataError: names the arguments that stand for them.
    """
    message = _explain_options(command, arguments)
    if message:
        raise DataError(f"{message}; see python -m qwenvl_lit.{command} --help")


def explain_command(
    word: str, arguments: Sequence[str], *, program: str = "python -m qwenvl_lit."
) -> str | None:
    """Names the command here, with the options after it, for a command of another program.

    Args:
        program: what a command line begins with, up to the name of the command.
    """
    command = OTHER_COMMANDS.get(word)
    if command is None:
        return None
    try:
        options = _explain_options(command, arguments)
    except DataError as not_read:  # the options name a model that is not read
        options = str(not_read)
    hint = f"here it is {command}: {program}{command}"
    return f"{hint}; {options}" if options else f"{hint} --help"


def _explain_options(command: str, arguments: Sequence[str]) -> str | None:
    """Names the arguments that stand for options of other programs; None without such options."""
    options = _options(arguments)
    if not options:
        return None
    typed = " ".join(shlex.join([flag, *values]) for flag, values in options)
    named = [(flag.lstrip("-"), values, flag) for flag, values in options]
    meant, others = translate_options(command, named)
    message = f"arguments are written as key=value, without dashes: {typed}"
    if meant:
        message += f" is {meant} here"
    return message + others


def refuse_unread_keys(command: str, arguments: Sequence[str]) -> None:
    """Refuses `+lr=3`: Hydra adds the key to the config, and nothing reads it.

    A key that an argument or a config of the user refers to, as `${lr}`, is read. So are keys in a
    group or in a node with `_target_`.

    Raises:
        DataError: names the key that was meant.
    """
    for argument in arguments:
        added = re.match(r"\+\+?(\w+)((?:\.\w+)*)=", argument)
        if added is None or added[1] in {*group_names(), *_own_groups(arguments), "hydra"}:
            continue
        key = added[1] + added[2]
        known_keys = _keys(_compose_for_hints(command, arguments))
        if key not in known_keys and not _is_referred_to(added[1], arguments):
            raise DataError(_explain_key(command, arguments, key))


def _own_groups(arguments: Sequence[str]) -> set[str]:
    own_groups = set()
    for folder in _own_folders(arguments):
        own_groups |= {path.name for path in folder.iterdir() if path.is_dir()}
    return own_groups


def _own_folders(arguments: Sequence[str]) -> list[Path]:
    """The existing folders of --config-dir."""
    folders = []
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            folders.append(Path(value if equals else "".join(arguments[index + 1 : index + 2])))
    return [folder for folder in folders if folder.is_dir()]


def _is_referred_to(key: str, arguments: Sequence[str]) -> bool:
    texts = [argument for argument in arguments if not argument.lstrip("+").startswith(f"{key}=")]
    for folder in _own_folders(arguments):
        texts += [file.read_text(encoding="utf-8") for file in folder.rglob("*.yaml")]
    return any(f"${{{key}" in text for text in texts)


def translate_options(
    command: str, options: Iterable[tuple[str, Sequence[str], str]]
) -> tuple[str, str]:
    """Translates options of other programs.

    Args:
        options: name, values, and how the user wrote the name.

    Returns:
        The arguments here; and the end of a message, which names the options for which nothing is
        needed and those that have no counterpart.
    """
    meant, needless, unknown = [], [], []
    for name, values, written in options:
        argument = translate(command, name, values)
        if argument is None and is_key(name):
            argument = f"{name}={value_from(values)}"
        if argument is None:
            unknown.append(written)
        elif argument:
            meant.append(argument)
        else:
            needless.append(written)
    others = ""
    if needless:
        others += f"; nothing is needed for {', '.join(needless)}"
    if unknown:
        others += f"; nothing here stands for {', '.join(unknown)}"
    return " ".join(combine(meant)), others


def is_key(name: str) -> bool:
    """Whether a command has a key or a group of this name, or may have it below a group."""
    return "." in name or name in group_names() or bool(_files_with_key("", name))


def _options(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Flags that Hydra does not have, each with the values after it."""
    options: list[tuple[str, list[str]]] = []
    takes_values = False
    for argument in arguments:
        if re.match(r"--?[a-zA-Z]", argument):
            flag, equals, value = argument.partition("=")
            takes_values = not _is_hydras(flag)
            if takes_values:
                options.append((flag, [value] if equals else []))
        elif re.match(r"[\w.+~@/]+=", argument):
            takes_values = False
        elif takes_values:
            options[-1][1].append(argument)
    return options


def _is_hydras(flag: str) -> bool:
    """Whether a flag is one of Hydra's. argparse lets long flags be shortened."""
    long_flags = [known for known in FLAGS if known.startswith("--")]
    return flag in FLAGS or any(known.startswith(flag) for known in long_flags)


def _translated(command: str, arguments: Sequence[str], unknown_key: str) -> str | None:
    """The arguments that were meant by `lr=1e-4 epochs=3`, where the first key is unknown."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.lstrip("+") == unknown_key:
            return translate(command, unknown_key.rpartition(".")[2], [value])
    return None


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
    config = _compose_for_hints(command, arguments)
    known_keys = _keys(config)
    if key in known_keys:
        return (
            " with the choices made here; in a mixture, write it under the dataset's name in "
            "data.datasets"
        )
    parent, _, name = key.rpartition(".")
    if parent in known_keys:
        return _hint_in(config, parent, name)
    nearest = [known for known in known_keys if known.rpartition(".")[2] == key]
    nearest = nearest or difflib.get_close_matches(key, known_keys, n=3, cutoff=0.75)
    if nearest:
        return f"; did you mean {' or '.join(nearest)}?"
    return f"; see python -m qwenvl_lit.{command} --help"


def _hint_in(config: DictConfig, parent: str, name: str) -> str:
    """The nearest key of the node `parent`, or all of them."""
    node = OmegaConf.select(config, parent)
    if not OmegaConf.is_dict(node):
        return f"; {parent} is a value and has no keys"
    names = [str(key) for key in node if not str(key).startswith("_")]
    nearest = difflib.get_close_matches(name, names, n=2)
    if nearest:
        return f"; did you mean {' or '.join(f'{parent}.{key}' for key in nearest)}?"
    hint = f"; {parent} has {', '.join(names) or 'no keys'}"
    if "_target_" in node:
        hint += f"; +{parent}.{name}=... passes a further argument to {node['_target_']}"
    return hint


def _files_with_key(group: str, key: str) -> list[str]:
    """Names of the config files directly in `group` that set `key`, or whose defaults there do."""
    folder = config_folder() / group
    files = sorted(folder.glob("*.yaml"))
    return [file.stem for file in files if _sets_key(folder, file.stem, key)]


def _sets_key(folder: Path, name: str, key: str) -> bool:
    node = OmegaConf.load(folder / f"{name}.yaml")
    if key in node:
        return True
    for default in node.get("defaults") or ():
        is_here = isinstance(default, str) and (folder / f"{default}.yaml").exists()
        if is_here and folder != config_folder() and _sets_key(folder, default, key):
            return True
    return False


def _compose_for_hints(command: str, arguments: Sequence[str]) -> DictConfig:
    """The config with the group choices of the command line, or without if those are wrong too."""
    groups = group_names()
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
