"""Reads JSON files that a run keeps beside its checkpoints, which may be damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from qwenvl_lit.types import DataError


def read_json_object(file: Path) -> dict[str, Any]:
    """Returns the JSON object in `file`.

    Raises:
        DataError: the file cannot be read, or holds anything else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is damaged: not JSON: {error}") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise DataError(f"{file} is damaged: expected a JSON object, found {kind}")
    return content


def set_aside(file: Path) -> Path:
    """Renames a damaged file to `NAME.broken`, or `NAME.broken_2` and so on; returns the name."""
    number = 1
    name = aside = file.with_name(f"{file.name}.broken")
    while os.path.lexists(aside):
        number += 1
        aside = name.with_name(f"{name.name}_{number}")
    file.rename(aside)
    return aside
