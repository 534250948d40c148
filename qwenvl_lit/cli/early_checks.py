"""Checks of a composed config that need no torch, so that their errors appear at once."""

from __future__ import annotations

from omegaconf import DictConfig

from qwenvl_lit.extras import require

LOGGERS = {  # classes of Lightning that need an optional package
    "lightning.pytorch.loggers.WandbLogger": "wandb",
    "lightning.pytorch.loggers.TensorBoardLogger": "tensorboard",
}


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
