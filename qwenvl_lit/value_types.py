"""Checks plain values of files against type annotations."""

from __future__ import annotations

import inspect
import reprlib
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

NUMBERS = {int: (int,), float: (int, float)}
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 2, 100, 100
PLAIN = (str, int, float, bool, Path, type(None))
LISTS = (list, tuple, set, Sequence, Collection)
# In messages
NAMES: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    None: "null",
    type(None): "null",
}
ITEMS = {int: "whole numbers", float: "numbers", str: "text"}
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
    if container in LISTS:
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

    Parameters without annotation, and those whose names exist only for type checkers, are left out.
    """
    constructor = function.__init__ if inspect.isclass(function) else function
    names = getattr(inspect.unwrap(constructor), "__globals__", {})  # a parent's, if inherited
    types_by_name = {}
    for name, parameter in inspect.signature(function).parameters.items():
        annotation = parameter.annotation
        if isinstance(annotation, str):
            annotation = _evaluated(annotation, names)
        if annotation is not parameter.empty:
            types_by_name[name] = annotation
    return types_by_name


def type_name(annotation: Any) -> str:
    """Returns a type in the words of a message.

    >>> type_name(int | None), type_name(Sequence[str]), type_name(Literal["min", "max"])
    ('a whole number or null', 'a list of text', 'min or max')
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in NAMES:
        return NAMES[annotation]
    if origin in (Union, types.UnionType):
        names = [type_name(option) for option in arguments]
        return " or ".join(dict.fromkeys(names))
    if origin is Literal:
        return " or ".join(map(str, dict.fromkeys(arguments)))
    container = origin or annotation
    if container in LISTS:
        items = [name for item, name in ITEMS.items() if arguments and item is arguments[0]]
        return f"a list of {items[0]}" if items else "a list"
    return "a mapping"


def _evaluated(annotation: str, names: Mapping[str, Any]) -> Any:
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
