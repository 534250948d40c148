"""Finds the configs of the package."""

from __future__ import annotations

from pathlib import Path


def config_folder() -> Path:
    """Returns `conf/` of the checkout, or its copy in the installed package."""
    package = Path(__file__).parent.parent
    folders = (package / "conf", package.parent / "conf")
    return next(folder for folder in folders if (folder / "train.yaml").exists())
