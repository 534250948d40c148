"""Answers that an earlier run left: where they are, and the config they were given with. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from qwenvl_lit.data.predictions import FILENAME
from qwenvl_lit.types import DataError


def predictions_file(place: str | Path) -> Path:
    """The file of predictions that a folder of `test` or `predict` has, or that `place` is.

    Raises:
        DataError: there is none.
    """
    path = Path(place).expanduser()
    file = path / FILENAME if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"there is no {file}; give a folder that `predict` or `test` wrote, or its {FILENAME}"
        )
    return file


def config_beside(place: str) -> dict[str, Any] | None:
    """The config of the run that wrote these predictions, interpolations kept; None where the file lies elsewhere now.

    Raises:
        DataError: as `predictions_file`.
    """
    file = predictions_file(place).parent / ".hydra" / "config.yaml"
    return (
        cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.load(file)))
        if file.exists()
        else None
    )
