"""Stored configs are data: what an untrusted checkpoint or folder may ask to be built.

The config of a run comes from files that others may have written: a checkpoint, a run folder, an
exported folder. Hydra would call whatever it names. Here a config may name only what conf/ names,
with arguments of the types that it takes.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qwenvl_lit.runs.config_folder import config_folder
from qwenvl_lit.stored_files import errors_named, read_text, unreadable
from qwenvl_lit.types import DataError
from qwenvl_lit.value_types import brief, matches, parameter_types, type_name

# Named by stored configs, and written by this package instead of conf/
OWN_TARGETS = (
    "qwenvl_lit.data.mixture.DatasetSpec",
    "qwenvl_lit.training.adapters.merging.StartingCheckpoint",
)
# A target whose further arguments go to another one
PASSES_ON = {"qwenvl_lit.data.datamodule.DataModule": OWN_TARGETS[0]}
TARGET = re.compile(r"^\s*(?:-\s*)?_target_:\s*([\w.]+)", re.MULTILINE)
GROUP_TARGET = re.compile(r"^_target_:\s*([\w.]+)", re.MULTILINE)  # what a file builds itself
RESOLVER = re.compile(r"\$\{\s*[\w.]+\s*:")  # an interpolation that calls a function
# Groups that are objects: what a file of conf/GROUP builds, or nothing
OBJECT_GROUPS = ("model", "adapter", "init", "data", "generation", "optim", "trainer", "speed")
GROUPS = (*OBJECT_GROUPS, "metrics", "callbacks", "paths")
# Keys beside `_target_` that mean something to Hydra; conf/ uses no others
HYDRA_KEYS = {"_partial_": bool, "_convert_": str}
# Keys of conf/ that `build` uses itself instead of passing them to the target
OWN_KEYS: Mapping[str, Mapping[str, Any]] = {
    "lightning.Trainer": {
        "validate_every": int | float | None,
        "rows_per_step": int | None,
        "accumulate_grad_batches": int | None,  # None: see `settings.accumulated_batches`
    }
}
MAX_BYTES = 1_000_000  # of a config
MAX_VALUES, MAX_DEPTH = 100_000, 50  # references of a pickle can make it endless


def read_config(file: Path) -> Any:
    """Reads a YAML file that this package or Hydra wrote; its interpolations stay.

    Raises:
        DataError: the file is damaged, or has references, which may stand for very many values.
    """
    import yaml

    text = read_text(file, limit=MAX_BYTES)
    with errors_named(file):
        depth = 0
        for number, event in enumerate(yaml.parse(text)):
            if isinstance(event, yaml.AliasEvent):
                raise unreadable(file, f"it has a YAML reference, *{event.anchor}")
            if isinstance(event, yaml.ScalarEvent) and not depth:
                raise unreadable(file, "it holds a single value")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH or number > MAX_VALUES:
                raise unreadable(file, "it is nested too deeply, or endless")
        return OmegaConf.to_container(OmegaConf.create(text))


def check_stored_config(
    config: Mapping[str, Any], source: str | Path, *, trust: bool = False
) -> None:
    """Refuses a stored config that names other code than conf/ does, anywhere in it.

    So are interpolations that call a resolver, such as `${oc.env:HOME}`, unless conf/ has the same
    one, and arguments that a target does not take.

    Args:
        source: the file, for messages.
        trust: accept everything, for configs with a metric, callback or dataset of the user.

    Raises:
        DataError: names the key and what to do.
    """
    if not isinstance(config, Mapping):
        raise DataError(f"{source}: the stored config is not a mapping; is the file damaged?")
    for group in GROUPS:
        if not isinstance(config.get(group), Mapping | None):
            raise DataError(
                f"{source}: {group} is {brief(config[group])}, expected a mapping; "
                f"is the file damaged?"
            )
    if trust:
        return
    nodes: list[tuple[tuple[str, ...], Mapping[str, Any]]] = []
    for number, (key, value) in enumerate(walk(config, ())):
        if number > MAX_VALUES or len(key) > MAX_DEPTH:
            raise DataError(f"{source}: the stored config is endless; is the file damaged?")
        _check_value(key, value, source)
        if isinstance(value, Mapping) and "_target_" in value:
            nodes.append((key, value))
    for group in OBJECT_GROUPS:
        target = (config.get(group) or {}).get("_target_")
        if target is not None and target not in group_targets(group):
            raise DataError(
                f"{source}: {group}._target_ names {brief(target)}, which is no {group}; "
                f"is the file damaged?"
            )
    for key, node in nodes:
        check_arguments(node, node["_target_"], key, source)
    with errors_named(Path(source)):
        OmegaConf.create(dict(config))  # refuses what no YAML file could hold


def trust_argument(config: Mapping[str, Any], groups: Iterable[str] | None = None) -> str:
    """Returns ` trust=true` if a stored config is accepted only with it, otherwise nothing.

    Args:
        groups: those of the config that are read; None: all.
    """
    read = set(config if groups is None else groups)
    try:
        check_stored_config({group: config[group] for group in config if group in read}, "")
    except DataError:
        return " trust=true"
    return ""


def check_groups(config: Mapping[str, Any], groups: Iterable[str], source: str | Path) -> None:
    """Raises a DataError if a stored config lacks one of the groups, or what a model is."""
    missing = [group for group in groups if group not in config]
    for group in ("model", "generation"):
        if group not in missing and "_target_" not in config[group]:
            missing.append(f"{group}._target_")
    if missing:
        raise DataError(
            f"{source}: the stored config lacks {', '.join(missing)}; is the file damaged?"
        )


def _check_value(key: tuple[str, ...], value: Any, source: str | Path) -> None:
    name = ".".join(key)
    is_target = key[-1:] == ("_target_",)
    if is_target and (not isinstance(value, str) or value not in allowed_targets()):
        raise DataError(
            f"{source}: {name} names {brief(value)}, which is not part of this package; "
            f"trust=true builds it all the same, if the file is your own"
        )
    if "defaults" in key:
        raise DataError(
            f"{source}: {name} asks Hydra for other configs, which no stored config does; "
            f"is the file damaged?"
        )
    if isinstance(value, str) and RESOLVER.search(value) and value not in _own_values():
        raise DataError(
            f"{source}: {name} has the interpolation {brief(value)}, which is not one of this "
            f"package; trust=true resolves it all the same, if the file is your own"
        )


def check_arguments(
    node: Mapping[str, Any], target: str, key: tuple[str, ...], source: str | Path
) -> None:
    """Refuses arguments that a target does not take, of another type, or missing.

    Args:
        target: a name in `allowed_targets`.
        key: of the node, for messages.
    """
    signature = inspect.signature(_located(target))
    expected = argument_types(target)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for name, value in node.items():
        where = f"{source}: {'.'.join((*key, str(name)))}"
        annotation = HYDRA_KEYS.get(name, expected.get(name))
        if name == "_target_":
            continue
        if annotation is None and not takes_all:
            raise DataError(
                f"{where} is no argument of {target}; was the file written by another version?"
            )
        if annotation is not None and not matches(value, annotation):
            raise DataError(
                f"{where} is {brief(value)}, expected {type_name(annotation)}; is the file damaged?"
            )
    if node.get("_partial_"):
        return
    for name, parameter in signature.parameters.items():
        is_variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if parameter.default is parameter.empty and not is_variadic and name not in node:
            raise DataError(
                f"{source}: {'.'.join(key)} lacks {name}, an argument of {target}; "
                f"is the file damaged?"
            )


@cache
def allowed_targets() -> frozenset[str]:
    """Every class and function that a file of conf/ names, and those in `OWN_TARGETS`."""
    targets = set(OWN_TARGETS)
    for text in _config_files(config_folder()):
        targets.update(TARGET.findall(text))
    return frozenset(targets)


@cache
def group_targets(group: str) -> frozenset[str]:
    """What the config of a group may build: what a file of conf/GROUP builds itself."""
    targets = set(OWN_TARGETS) if group == "init" else set()
    for text in _config_files(config_folder() / group):
        targets.update(GROUP_TARGET.findall(text))
    return frozenset(targets)


@cache
def _located(target: str) -> Callable[..., Any]:
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


@cache
def argument_types(target: str) -> dict[str, Any]:
    """Returns the annotations of the arguments of a target by name."""
    types = parameter_types(_located(target))
    if target in PASSES_ON:
        types = {**parameter_types(_located(PASSES_ON[target])), **types}
    return {**types, **OWN_KEYS.get(target, {})}


@cache
def _own_values() -> frozenset[str]:
    """Values with a resolver that files of conf/ hold, such as that of `paths.cache`."""
    values: set[str] = set()
    for text in _config_files(config_folder()):
        for line in text.splitlines():
            value = line.partition(": ")[2].split("  #")[0].strip().strip("\"'")
            if RESOLVER.search(value):
                values.add(value)
    return frozenset(values)


def _config_files(folder: Path) -> Iterator[str]:
    for file in sorted(folder.rglob("*.yaml")):
        yield file.read_text(encoding="utf-8")


def walk(node: Any, key: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields every value at and below `node`, mappings and lists included, with its key."""
    yield key, node
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from walk(value, (*key, str(name)))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from walk(value, (*key, str(index)))
