"""Finds the predictions that an earlier command wrote, and the config that it ran with.

Nothing here imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwenvl_lit.data.predictions import FILENAME
from qwenvl_lit.runs.stored_config import check_stored_config, read_config
from qwenvl_lit.types import DataError


def predictions_file(path: str | Path) -> Path:
    """Returns the predictions file in the folder of a `test` or `predict` run, or `path` itself.

    Raises:
        DataError: there is no such file.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / FILENAME
    if not file.is_file():
        raise DataError(
            f"there is no {file}; give a folder that `predict` or `test` wrote, or its {FILENAME}"
        )
    return file


def config_beside(path: str, *, trust: bool = False) -> dict[str, Any] | None:
    """Returns the config of the run that wrote a predictions file, with its interpolations.

    None if the file is no longer in the folder of the run.

    Args:
        trust: accept a config that names classes which are not part of this package.

    Raises:
        DataError: as `predictions_file`, or the config is not trusted.
    """
    file = predictions_file(path).parent / ".hydra" / "config.yaml"
    if not file.exists():
        return None
    config = read_config(file)
    check_stored_config(config, file, trust=trust)
    return config
