"""Optional packages: the extras of this package that install them, and messages without them."""

from __future__ import annotations

import re
from importlib.util import find_spec

EXTRAS = {  # package -> extra, as pyproject.toml has them
    "bitsandbytes": "quant",
    "hydra-optuna-sweeper": "sweep",
    "hydra-submitit-launcher": "cluster",
    "comet_ml": "comet",
    "fastapi": "serve",
    "mlflow": "mlflow",
    "prometheus_client": "serve",
    "pyarrow": "parquet",
    "tensorboard": "tensorboard",
    "uvicorn": "serve",
    "vllm": "vllm",
    "wandb": "wandb",
}


def missing(package: str, user: str) -> str:
    """Returns the message that `user`, such as "logger=wandb", needs a package.

    >>> missing("wandb", "logger=wandb")
    "logger=wandb needs the package wandb, which is not installed; install the extra `wandb`: \
pip install -e '.[wandb]' in the clone of this repository"
    >>> missing("nltk", "mine")
    'mine needs the package nltk, which is not installed: pip install nltk'
    """
    extra = EXTRAS.get(package)
    message = f"{user} needs the package {package}, which is not installed"
    if package == "vllm":
        return (
            f"{message}: make an environment of its own, as vLLM replaces torch, and there, in the "
            f"clone of this repository, pip install -e '.[vllm]'"
        )
    if extra is None:
        return f"{message}: pip install {package}"
    return (
        f"{message}; install the extra `{extra}`: pip install -e '.[{extra}]' in the clone of this "
        f"repository"
    )


def require(package: str, user: str) -> None:
    """Checks that a package can be imported, without importing it.

    Raises:
        ValueError: names `user`, the package and the command that installs it.
    """
    if find_spec(package) is None:
        raise ValueError(missing(package, user))


def not_importable(message: str, error: ModuleNotFoundError) -> str:
    """Returns one line about a class that Hydra cannot import.

    Args:
        message: Hydra's, which quotes the class.
        error: what stopped the import of its module, or of a package that this module needs.
    """
    quoted = re.search(r"Error locating target '([^']+)'", message)
    target, module = quoted[1] if quoted else "", error.name or ""
    if not f"{target}.".startswith(f"{module}."):
        return missing(module.partition(".")[0], f"_target_={target}")
    return (
        f"_target_={target} cannot be imported: there is no {module}; check the spelling, and that "
        f"its folder is on PYTHONPATH"
    )
