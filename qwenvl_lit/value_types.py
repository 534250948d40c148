"""Checks plain values of files against type annotations."""

from __future__ import annotations

import inspect
import reprlib
import sys
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

NUMBERS = {int: (int,), float: (int, float)}
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 2, 100, 100
PLAIN = (str, int, float, bool, Path, type(None))
# Values of every type: interpolations of OmegaConf, and a value that is still to be given
UNRESOLVED, MISSING = "${", "???"


def brief(value: Any) -> str:
    """Returns a short `repr` of a value, which may be endless."""
    return _REPR.repr(value)


def matches(value: Any, annotation: Any) -> bool:
    """Returns whether a value of a file has a type.

    An annotation that is a class of this or another library stands for an object that a config
    describes: a mapping with `_target_`. Wherever data is expected, also inside `Any`, such a
    mapping does not match. Annotations of other kinds, such as type variables, match everything.
    """
    if isinstance(value, str) and is_unresolved(value):
        return True
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any or annotation is object:
        return not has_target(value)
    if origin in (Union, types.UnionType):
        return any(matches(value, option) for option in arguments)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in arguments)
    if annotation in NUMBERS:
        return isinstance(value, NUMBERS[annotation]) and not isinstance(value, bool)
    if annotation is None:
        return value is None
    if annotation is Path:
        return isinstance(value, str)
    if annotation in PLAIN:
        return isinstance(value, annotation)
    if origin is tuple and Ellipsis not in arguments:
        return _is_list(value, length=len(arguments)) and all(map(matches, value, arguments))
    container = origin or annotation
    if container in (list, tuple, set, Sequence, Collection):
        item = arguments[0] if arguments else Any
        return _is_list(value) and all(matches(element, item) for element in value)
    if container in (dict, Mapping):
        return _is_mapping_of(value, *(arguments or (Any, Any)))
    if container is Callable or inspect.isclass(annotation):
        return isinstance(value, Mapping)
    return True


def is_unresolved(value: Any) -> bool:
    """Returns whether a value, or one in it, is an interpolation or still to be given."""
    if isinstance(value, Mapping):
        return any(map(is_unresolved, value.values()))
    if isinstance(value, list | tuple):
        return any(map(is_unresolved, value))
    return isinstance(value, str) and (UNRESOLVED in value or value == MISSING)


def has_target(value: Any) -> bool:
    """Returns whether a value is, or holds, a mapping that asks Hydra to build something."""
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(has_target, value.values()))
    return isinstance(value, list | tuple) and any(map(has_target, value))


def parameter_types(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns the annotations of a function or of a constructor by parameter.

    An annotation whose names exist only for type checkers becomes `inspect.Parameter.empty`.
    """
    types_by_name = {}
    for name, parameter in inspect.signature(function).parameters.items():
        annotation = parameter.annotation
        if isinstance(annotation, str):
            annotation = _evaluated(annotation, function)
        types_by_name[name] = annotation
    return types_by_name


def type_name(annotation: Any) -> str:
    """Returns a type as a message names it.

    >>> type_name(int), type_name(dict[str, int] | None)
    ('int', 'dict[str, int] | None')
    """
    name = annotation.__name__ if inspect.isclass(annotation) and not get_args(annotation) else ""
    return name or str(annotation).replace("typing.", "").replace("collections.abc.", "")


def _evaluated(annotation: str, function: Callable[..., Any]) -> Any:
    names = vars(sys.modules[function.__module__])
    try:
        return eval(annotation, dict(names))  # source of this or an installed package
    except (NameError, TypeError):
        return inspect.Parameter.empty


def _is_list(value: Any, *, length: int | None = None) -> bool:
    return isinstance(value, list | tuple) and length in (None, len(value))


def _is_mapping_of(value: Any, key_type: Any, value_type: Any) -> bool:
    if not isinstance(value, Mapping) or "_target_" in value:
        return False
    return all(matches(k, key_type) and matches(v, value_type) for k, v in value.items())
