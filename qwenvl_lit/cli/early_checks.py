"""Checks of a composed config that need no torch, so that their errors appear at once."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from qwenvl_lit.extras import require
from qwenvl_lit.settings import CHECKS, check_seed, check_settings

LOGGERS = {  # classes of Lightning that need an optional package
    "lightning.pytorch.loggers.WandbLogger": "wandb",
    "lightning.pytorch.loggers.TensorBoardLogger": "tensorboard",
}


def check_values(config: DictConfig) -> None:
    """Checks the seed and the settings of the groups that `CHECKS` lists.

    Classes of the user may have other settings of the same names.

    Raises:
        ValueError: names the key, what it may be and what it is.
    """
    check_seed(config.seed)
    for group in CHECKS:
        node = config.get(group)
        if not OmegaConf.is_dict(node):
            continue
        target = str(node.get("_target_", "qwenvl_lit."))
        if target.startswith(("qwenvl_lit.", "lightning.")):
            check_settings(group, OmegaConf.to_container(node, resolve=True))


def check_packages(config: DictConfig) -> None:
    """Checks that the optional packages that `config` needs are installed.

    Raises:
        ValueError: names the key, the package and the command that installs it.
    """
    for name, logger in (config.get("logger") or {}).items():
        package = LOGGERS.get(logger.get("_target_"))
        if package:
            require(package, f"logger={name}")
    if (config.get("adapter") or {}).get("quantization"):
        require("bitsandbytes", "adapter.quantization, which adapter=qlora sets,")
    if (config.get("model") or {}).get("load_in_4bit"):
        require("bitsandbytes", "model.load_in_4bit=true")
