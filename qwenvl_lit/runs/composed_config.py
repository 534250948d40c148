"""Checks the values of a composed config against what its classes and functions take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from omegaconf import DictConfig, OmegaConf

from qwenvl_lit.runs.stored_config import allowed_targets, argument_types, walk
from qwenvl_lit.value_types import brief, matches, type_name

# Keys of commands, which no class takes
KEYS: Mapping[str, Any] = {
    "seed": int,
    "trust": bool,
    "verify": bool,
    "memory.tokens": int,
    "memory.targets": int,
    "memory.images": int,
    "memory.check": bool,
    "sweep.parallel": int,
    "sweep.metric": str,
    "sweep.mode": Literal["min", "max"],
    "workers": int | None,
    "examples": int,
    "baseline": bool,
    "multiline": bool,
    "merge": bool,
    "overwrite": bool,
    "push": str | None,
    "push_private": bool,
}

LARGEST = 2**63 - 1  # the integers of torch and numpy have 64 bits


def check_composed_config(config: DictConfig) -> None:
    """Refuses a value that the class or function of its key does not take.

    Interpolations match every type. Classes that conf/ does not name are not checked.

    Raises:
        ValueError: names the key, what it may be and what it is.
    """
    for path, node in walk(OmegaConf.to_container(config), ()):
        key = ".".join(path)
        if key in KEYS:
            _check(key, node, KEYS[key])
        if isinstance(node, Mapping) and node.get("_target_") in allowed_targets():
            expected = argument_types(node["_target_"])
            for name, value in node.items():
                if name in expected:
                    _check(f"{key}.{name}", value, expected[name])


def _check(key: str, value: Any, annotation: Any) -> None:
    if isinstance(value, Mapping) and "_target_" not in value:
        for option in (annotation, *get_args(annotation)):
            if get_origin(option) is Mapping:
                for name, item in value.items():  # the message names the item
                    _check(f"{key}.{name}", item, get_args(option)[1])
    if not matches(value, annotation):
        raise ValueError(f"{key} must be {type_name(annotation)}, got {brief(value)}")
    is_number = isinstance(value, int | float)
    if is_number and not -LARGEST <= value <= LARGEST:
        raise ValueError(
            f"{key} must be a finite number, of 64 bits if it is whole, got {brief(value)}"
        )
