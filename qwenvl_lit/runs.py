"""What a training run leaves on disk, and how the other verbs find it again.

outputs/train/2026-11-23_09-00-00/
    .hydra/config.yaml          as composed, with its interpolations: what `test` and `predict` start from
    config.yaml                 resolved, to read
    checkpoints/best.ckpt       trainable tensors, optimizer, and the config once more
    checkpoints/last.ckpt
    split.json                  rows held out for validation, if they were drawn (split_NAME.json: those of a dataset of a mixture)
    findings.jsonl              rows that were left out or repaired, if there are any
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from qwenvl_lit.types import DataError

TRAIN_FOLDER = Path("outputs/train")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A trained model: the config it was made with, and a checkpoint."""

    config: dict[str, Any]  # plain data, interpolations kept
    checkpoint: Path
    folder: Path | None  # None for a checkpoint outside its run folder


def find_run(ckpt: str) -> Run:
    """The run that `ckpt` names: a run folder (its best checkpoint, else its last), a checkpoint file, or "latest".

    Raises:
        DataError: there is no such run or it has no checkpoint.
    """
    path = latest_run() if ckpt == "latest" else Path(ckpt).expanduser()
    if path is None:
        raise DataError(f"ckpt=latest: there is no run in {TRAIN_FOLDER}/; train first: python -m qwenvl_lit.train")
    if not path.exists():
        raise DataError(f"ckpt={ckpt} does not exist; {_known_runs()}")
    if path.is_file():
        folder = path.parent.parent
        if (folder / ".hydra/config.yaml").exists():
            return Run(config=_composed(folder), checkpoint=path, folder=folder)
        return Run(config=_stored(path), checkpoint=path, folder=None)
    if (path / "adapter_config.json").exists():
        raise DataError(f"ckpt={ckpt} is an adapter folder of PEFT, which cannot be taken as ckpt; give the run that it comes from")
    if (path / "config.json").exists():
        raise DataError(f"ckpt={ckpt} is a whole model: give it as model.path={ckpt}, with model=qwen_vl_chat or model=qwen_vl")
    if not (path / ".hydra/config.yaml").exists():
        raise DataError(f"ckpt={ckpt} is no run folder (it has no .hydra/config.yaml); {_known_runs()}")
    for name in ("best.ckpt", "last.ckpt"):
        if (path / "checkpoints" / name).exists():
            return Run(config=_composed(path), checkpoint=path / "checkpoints" / name, folder=path)
    raise DataError(f"ckpt={ckpt} has no checkpoints/best.ckpt or last.ckpt: the run was stopped before it saved one")


def base_of(run: Run) -> dict[str, Any]:
    """What a run learned as plain data, for the config of a run that starts from it; with the runs that it had started from."""
    from qwenvl_lit.adapters import Learned, fingerprint

    return {
        "_target_": f"{Learned.__module__}.{Learned.__name__}",
        "checkpoint": str(run.checkpoint.resolve()),
        "sha256": fingerprint(run.checkpoint),
        "adapter": run.config["adapter"],
        "base": run.config.get("base") or {},
    }


def latest_run() -> Path | None:
    """The newest folder of `outputs/train` that holds a checkpoint."""
    saved = [folder for folder in TRAIN_FOLDER.glob("*") if any(folder.glob("checkpoints/*.ckpt"))]
    return max(saved, key=lambda folder: folder.stat().st_mtime, default=None)


def _known_runs() -> str:
    newest = latest_run()
    return f"the newest run here is ckpt={newest}" if newest else "train one first: python -m qwenvl_lit.train"


def _composed(folder: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.load(folder / ".hydra/config.yaml")))


def _stored(checkpoint: Path) -> dict[str, Any]:
    import torch

    try:
        config = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True).get("config")
    except (OSError, RuntimeError, ValueError, AttributeError) as error:
        raise DataError(f"ckpt={checkpoint} cannot be read as a checkpoint of this package: {error}") from error
    if config is None:
        raise DataError(f"ckpt={checkpoint} holds no config: it was not written by this package")
    return config
