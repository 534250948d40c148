"""Answers that an earlier run left: where they are, and the config they were given with. Nothing here imports torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
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


def scored_arguments(arguments: Sequence[str]) -> list[str]:
    """`compare=[A,B]` without a model and without answers means: score the answers of B, against those of A.

    >>> scored_arguments(["compare=['a','b']"])
    ["predictions='b'", "compare=['a']"]
    """
    given = next((argument for argument in arguments if argument.startswith("compare=[")), None)
    if given is None or any(
        argument.startswith(("ckpt=", "model=", "predictions=")) for argument in arguments
    ):
        return list(arguments)
    places = re.findall(r"'(?:[^'\\]|\\.)*'", given)
    if len(places) < 2:
        raise DataError(
            "compare=[RUN1,RUN2] takes two runs at least; with ckpt= or predictions= it takes those to compare with"
        )
    rest = [argument for argument in arguments if argument is not given]
    return [*rest, f"predictions={places[-1]}", f"compare=[{','.join(places[:-1])}]"]
