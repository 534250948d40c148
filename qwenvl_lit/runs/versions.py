"""Writes `versions.json`: the libraries, the commit and the machine that results depend on."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qwenvl_lit.atomic import set_aside, write_text
from qwenvl_lit.stored_files import read_json_object
from qwenvl_lit.types import DataError
from qwenvl_lit.value_types import matches

FILENAME = "versions.json"  # in a run folder
LIBRARIES = (
    "torch",
    "lightning",
    "transformers",
    "peft",
    "bitsandbytes",
    "torchmetrics",
    "hydra-core",
    "numpy",
    "pillow",
)
log = logging.getLogger(__name__)


def save_versions(folder: Path) -> None:
    """Writes `versions.json`; warns if a resumed run started with other versions.

    If the file exists, it is kept. Its list `resumed` gets the command of this start, with the
    versions that differ from those of the start before.
    """
    file = folder / FILENAME
    command = " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
    now = versions()
    first = _read(file) if file.exists() else None
    if first is None:
        stored = {**now, "command": command}
    else:
        starts = first.get("resumed") or []
        changed = _changes([first, *starts], now)
        if changed:
            log.warning(
                "%s was started with other versions; results may differ in the last digits: %s",
                folder,
                ", ".join(f"{name} {before} -> {now[name]}" for name, before in changed.items()),
            )
        start = {"command": command, **{name: now[name] for name in changed}}
        stored = {**first, "resumed": [*starts, start]}
    write_text(file, json.dumps(stored, indent=2) + "\n")


def _read(file: Path) -> dict[str, Any] | None:
    """Reads a file of versions; a damaged one is set aside, and None returned."""
    try:
        stored = read_json_object(file)
        if not matches(stored.get("resumed", []), list[dict]):
            raise DataError(f"{file} cannot be read: its resumed is not a list of objects")
    except DataError as error:
        aside = set_aside(file)
        log.warning("%s. It is now %s, and a new one is written", error, aside.name)
        return None
    return stored


def _changes(starts: Sequence[Mapping[str, Any]], now: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the versions of the last start that differ from `now`."""
    before: dict[str, Any] = {}
    for start in starts:
        before |= start
    return {name: before.get(name) for name in now if before.get(name) != now[name]}


def versions() -> dict[str, Any]:
    """Returns what results depend on besides the config.

    `git` is the commit of this package, with "+" if files in this folder were changed since. It is
    None if the package is not in a git repository.
    """
    import torch

    import qwenvl_lit

    return {
        "qwenvl_lit": qwenvl_lit.__version__,
        "git": _git_commit(),
        "python": platform.python_version(),
        **{library: _version(library) for library in LIBRARIES},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    # Installed packages may be inside the repository of another project, which does not track them.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".")
    return f"{commit}+" if changed else commit


def _git(*arguments: str) -> str | None:
    """Runs git in this folder; returns its output, or None if it fails or is not installed."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return None if result.returncode else result.stdout.strip()
