"""Imports every module of the package in an environment without optional packages.

Modules of `serving/` and `evaluation/lmms/`, which only `serve`, vLLM and lmms-eval import, may
lack a package of their extra.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import qwenvl_lit
from qwenvl_lit.extras import EXTRAS

WITH_EXTRAS = ("qwenvl_lit.serving.", "qwenvl_lit.evaluation.lmms.")
# Installed with fastapi, and with lmms-eval
OF_EXTRAS = {"anyio", "pydantic", "starlette", "lmms_eval", "tqdm"}


def modules() -> list[str]:
    """Returns the names of all modules of the package."""
    folder = Path(qwenvl_lit.__file__).parent
    names = []
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder.parent).with_suffix("").parts
        names.append(".".join(parts).removesuffix(".__init__"))
    return names


def main() -> None:
    """Imports the modules and prints how many there are."""
    lacking = []
    names = modules()
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if not name.startswith(WITH_EXTRAS) or package not in OF_EXTRAS | set(EXTRAS):
                raise
            lacking.append(name)
    python = sys.version.split()[0]
    print(f"Python {python}: {len(names) - len(lacking)} of {len(names)} modules imported")
    print(f"need an extra: {', '.join(lacking) or 'none'}")


if __name__ == "__main__":
    main()
