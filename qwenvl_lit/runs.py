"""What a training run leaves on disk, and how the other verbs find it again.

outputs/train/2026-11-23_09-00-00/
    .hydra/config.yaml          as composed, with its interpolations: what `test` and `predict` start from
    and what `CONTENTS` lists
"""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from qwenvl_lit.types import DataError

TRAIN_FOLDER = Path("outputs/train")
CONTENTS = {  # of a run folder; a split, and what was left out, only where there is any
    "checkpoints/best.ckpt": "what was learned, at the best validation",
    "checkpoints/best_adapter": "the same in peft's format",
    "checkpoints/last.ckpt": "what was learned in the end; resume=RUN goes on from here",
    "checkpoints/last_adapter": "the same in peft's format",
    "metrics.json": "the last and the best validation",
    "logging.jsonl": "loss, rates and scores, a line for each logged step and validation",
    "curves": "a plot of each of them",
    "samples": "pictures of each validation, with answers and boxes",
    "config.yaml": "every setting",
    "trainable.json": "what is trained",
    "versions.json": "libraries, git commit, machine and command",
    "split.json": "rows held out for validation (split_NAME.json: those of a dataset of a mixture)",
    "findings.jsonl": "rows left out or repaired",
}
LIBRARIES = ("torch", "lightning", "transformers", "peft", "bitsandbytes", "torchmetrics", "hydra-core", "numpy", "pillow")
log = logging.getLogger(__name__)


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


def contents(folder: Path) -> str:
    """What is in a run folder, a line each."""
    return "\n".join(f"  {name:24} {what}" for name, what in CONTENTS.items() if (folder / name).exists())


def save_versions(folder: Path) -> None:
    """Write `versions.json`; a warning if a run goes on with other versions than it began with."""
    file = folder / "versions.json"
    now = versions()
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [f"{name} {before.get(name)} -> {now[name]}" for name in now if name != "command" and before.get(name) != now[name]]
        if changed:
            log.warning("%s was begun with other versions; its numbers may differ in the last digits: %s", folder, ", ".join(changed))
    file.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")


def versions() -> dict[str, Any]:
    """What a result depends on besides the config: versions, the commit of this package, the machine, and the command that was given.

    `git` is null where the package is not in a repository, and ends in "+" if files of it were changed since the commit.
    """
    import torch

    import qwenvl_lit

    return {
        "qwenvl_lit": qwenvl_lit.__version__,
        "git": _commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "command": " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
    }


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True)
        except FileNotFoundError:  # no git here
            return None
        return None if result.returncode else result.stdout.strip()

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:  # another project's repository may be around an environment
        return None
    commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no", "--", ".")
    return f"{commit}+" if changed else commit


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
