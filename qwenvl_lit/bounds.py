"""Checks the numbers of a config where they enter."""

from __future__ import annotations

import math


def check_number(
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    whole: bool = False,
    optional: bool = False,
    or_auto: bool = False,
) -> None:
    """Raises an error unless `value` is a finite number within its bounds.

    Args:
        name: the key of the config, such as "optim.lr".
        least, most: bounds that are allowed themselves.
        above, below: bounds that are not.
        optional, or_auto: None, or "auto", is allowed, too.

    Raises:
        ValueError: names the key, what it may be and what it is.

    >>> check_number("data.batch_size", 0, least=1, whole=True)
    Traceback (most recent call last):
    ValueError: data.batch_size must be a whole number, 1 or more, got 0
    """
    if (value is None and optional) or (value == "auto" and or_auto):
        return
    kinds = int if whole else int | float
    if isinstance(value, kinds) and not isinstance(value, bool):
        in_bounds = least <= value <= most and above < value < below
        if in_bounds and math.isfinite(value):
            return
    expected = "a whole number" if whole else "a number"
    if least > -math.inf:
        expected += f", {least} or more"
    if above > -math.inf:
        expected += f", above {above}"
    if most < math.inf:
        expected += f", at most {most}"
    if below < math.inf:
        expected += f", below {below}"
    if optional:
        expected += ", or null"
    if or_auto:
        expected += ", or auto"
    raise ValueError(f"{name} must be {expected}, got {value!r:.100}")


def check_bool(name: str, value: object) -> None:
    """Raises an error unless `value` is True or False.

    Raises:
        ValueError: names the key and what it is.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r:.100}")
