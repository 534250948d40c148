"""Stored configs are data: what a checkpoint or a folder of a stranger may ask to be built.

The config of a run comes from files that others may have written: a checkpoint, a run folder, an
exported folder. Hydra would call whatever it names. Here a config may name only what conf/ names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from qwenvl_lit.runs.config_folder import config_folder
from qwenvl_lit.types import DataError

# Named by stored configs, and written by this package instead of conf/
OWN_TARGETS = (
    "qwenvl_lit.data.mixture.DatasetSpec",
    "qwenvl_lit.training.adapters.merging.StartingCheckpoint",
)
TARGET = re.compile(r"^\s*(?:-\s*)?_target_:\s*([\w.]+)", re.MULTILINE)
RESOLVER = re.compile(r"\$\{\s*[\w.]+\s*:")  # an interpolation that calls a function


def check_stored_config(
    config: Mapping[str, Any], source: str | Path, *, trust: bool = False
) -> None:
    """Refuses a stored config that names other code than conf/ does, anywhere in it.

    Interpolations that call a resolver, such as `${oc.env:HOME}`, are refused unless conf/ has the
    same one.

    Args:
        source: the file, for messages.
        trust: accept everything, for configs with a metric, callback or dataset of the user.

    Raises:
        DataError: names the key and what to do.
    """
    if trust:
        return
    if not isinstance(config, Mapping):
        raise DataError(f"{source}: the stored config is not a mapping; is the file damaged?")
    for key, value in _leaves(config, ()):
        name = ".".join(key)
        is_target = key[-1] == "_target_"
        if is_target and (not isinstance(value, str) or value not in allowed_targets()):
            raise DataError(
                f"{source}: {name} names {value!r:.100}, which is not part of this package; "
                f"trust=true builds it all the same, if the file is your own"
            )
        if "defaults" in key:
            raise DataError(
                f"{source}: {name} asks Hydra for other configs, which no stored config does; "
                f"is the file damaged?"
            )
        if isinstance(value, str) and RESOLVER.search(value) and value not in _own_values():
            raise DataError(
                f"{source}: {name} has the interpolation {value!r:.100}, which is not one of this "
                f"package; trust=true resolves it all the same, if the file is your own"
            )


@cache
def allowed_targets() -> frozenset[str]:
    """Every class and function that a file of conf/ names, and those in `OWN_TARGETS`."""
    targets = set(OWN_TARGETS)
    for text in _config_files():
        targets.update(TARGET.findall(text))
    return frozenset(targets)


@cache
def _own_values() -> frozenset[str]:
    """Values with a resolver that files of conf/ hold, such as that of `paths.cache`."""
    values: set[str] = set()
    for text in _config_files():
        for line in text.splitlines():
            value = line.partition(": ")[2].split("  #")[0].strip().strip("\"'")
            if RESOLVER.search(value):
                values.add(value)
    return frozenset(values)


def _config_files() -> Iterator[str]:
    for file in sorted(config_folder().rglob("*.yaml")):
        yield file.read_text(encoding="utf-8")


def _leaves(node: Any, key: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value below `node` that is no mapping or list, with its key; `_target_` of any type."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            inner = (*key, str(name))
            if name == "_target_":
                yield inner, value
            else:
                yield from _leaves(value, inner)
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _leaves(value, (*key, str(index)))
    else:
        yield key, node
