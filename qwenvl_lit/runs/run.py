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
from collections.abc import Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
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
    "samples": "images of each validation, with answers and boxes",
    "config.yaml": "every setting",
    "trainable.json": "what is trained",
    "versions.json": "libraries, git commit, machine and command",
    "split.json": "rows held out for validation (split_NAME.json: those of a dataset of a mixture)",
    "findings.jsonl": "rows left out or repaired",
    "csv": "the logged numbers as a table",
    "train.log": "warnings",
}
SETTINGS = "qwenvl_lit.json"  # of an exported folder
PUBLISHED = {
    "qwen-vl": "Qwen/Qwen-VL",
    "qwen-vl-chat": "Qwen/Qwen-VL-Chat",
}  # by the last parts of the names that they have elsewhere
LIBRARIES = (
    "torch",
    "lightning",
    "transformers",
    "peft",
    "bitsandbytes",
    "torchmetrics",
    "hydra-core",
    "numpy",
    "pillow",
)
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A trained model: the config it was made with, and a checkpoint."""

    config: dict[str, Any]  # plain data, interpolations kept
    checkpoint: Path | None  # None for a whole model: all is in its own weights
    folder: Path | None  # None for a checkpoint outside its run folder, and for what others trained
    expects: str | None = None  # the base that an adapter folder names


def config_folder() -> Path:
    """`conf/` of a checkout, or the copy inside an installed package."""
    package = Path(__file__).parent.parent
    return next(
        folder
        for folder in (package / "conf", package.parent / "conf")
        if (folder / "train.yaml").exists()
    )


def find_run(ckpt: str) -> Run:
    """The run that `ckpt` names: a run folder (its best checkpoint, else its last), a checkpoint file, or "latest"; or what somebody else
    trained: an adapter folder of peft, or a whole model in the published layout.

    Raises:
        DataError: there is no such run or it has no checkpoint.
    """
    path = latest_run() if ckpt == "latest" else Path(ckpt).expanduser()
    if path is None:
        raise DataError(
            f"latest: there is no run in {TRAIN_FOLDER}/; train first: python -m qwenvl_lit.train"
        )
    if not path.exists():
        raise DataError(f"{ckpt} does not exist; {_known_runs()}")
    if path.name.startswith("adapter_model.") and path.is_file():
        path = path.parent
    if path.is_file():
        folder = path.parent.parent
        if (folder / ".hydra/config.yaml").exists():
            return Run(config=_composed(folder), checkpoint=path, folder=folder)
        return Run(config=_stored(path), checkpoint=path, folder=None)
    if (path / "adapter_config.json").exists():
        return _adapter_folder(path)
    if (path / "config.json").exists():
        return _whole_model(path)
    if not (path / ".hydra/config.yaml").exists():
        raise DataError(f"{ckpt} is no run folder (it has no .hydra/config.yaml); {_known_runs()}")
    for name in ("best.ckpt", "last.ckpt"):
        if (path / "checkpoints" / name).exists():
            return Run(config=_composed(path), checkpoint=path / "checkpoints" / name, folder=path)
    raise DataError(
        f"{ckpt} has no checkpoints/best.ckpt or last.ckpt: the run was stopped before it saved one"
    )


def init_from(run: Run) -> dict[str, Any]:
    """What a run learned as plain data, for the config of a run that starts from it; with the runs that it had started from."""
    from qwenvl_lit.training.adapters.merging import StartingCheckpoint, fingerprint

    assert run.checkpoint is not None  # a whole model is a base by itself
    return {
        "_target_": f"{StartingCheckpoint.__module__}.{StartingCheckpoint.__name__}",
        "checkpoint": str(run.checkpoint.resolve()),
        "sha256": fingerprint(run.checkpoint),
        "adapter": run.config["adapter"],
        "init": run.config.get("init") or {},
    }


def latest_run() -> Path | None:
    """The newest folder of `outputs/train` that holds a checkpoint."""
    saved = [folder for folder in TRAIN_FOLDER.glob("*") if any(folder.glob("checkpoints/*.ckpt"))]
    return max(saved, key=lambda folder: folder.stat().st_mtime, default=None)


def contents(folder: Path) -> str:
    """What is in a run folder, a line each."""
    return "\n".join(
        f"  {name:24} {what}" for name, what in CONTENTS.items() if (folder / name).exists()
    )


def save_versions(folder: Path) -> None:
    """Write `versions.json`; a warning if a run goes on with other versions than it began with."""
    file = folder / "versions.json"
    now = versions()
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [
            f"{name} {before.get(name)} -> {now[name]}"
            for name in now
            if name != "command" and before.get(name) != now[name]
        ]
        if changed:
            log.warning(
                "%s was begun with other versions; its numbers may differ in the last digits: %s",
                folder,
                ", ".join(changed),
            )
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
            result = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *arguments],
                capture_output=True,
                text=True,
            )
        except FileNotFoundError:  # no git here
            return None
        return None if result.returncode else result.stdout.strip()

    if (
        git("ls-files", "--error-unmatch", Path(__file__).name) is None
    ):  # another project's repository may be around an environment
        return None
    commit, changed = (
        git("rev-parse", "HEAD"),
        git("status", "--porcelain", "--untracked-files=no", "--", "."),
    )
    return f"{commit}+" if changed else commit


def _known_runs() -> str:
    newest = latest_run()
    return (
        f"the newest run here is {newest}"
        if newest
        else "train one first: python -m qwenvl_lit.train"
    )


def _composed(folder: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return cast(
        "dict[str, Any]", OmegaConf.to_container(OmegaConf.load(folder / ".hydra/config.yaml"))
    )


def _adapter_folder(folder: Path) -> Run:
    from qwenvl_lit.training.adapters.peft_files import adapter_node, read_config, weights_file

    run = folder.resolve().parent.parent
    if folder.resolve().parent.name == "checkpoints" and (run / ".hydra/config.yaml").exists():
        return Run(config=_composed(run), checkpoint=weights_file(folder), folder=run)
    expects = read_config(folder).get("base_model_name_or_path") or None
    stored = stored_settings(folder)
    base = _base_path(expects)
    config = _recipe(base, stored or {"model": {"path": base}})
    return Run(
        config={**config, "adapter": adapter_node(folder)},
        checkpoint=weights_file(folder),
        folder=None,
        expects=expects,
    )


def _whole_model(folder: Path) -> Run:
    stored = stored_settings(folder)
    config = _recipe(
        str(folder), {**stored, "model": {**stored.get("model", {}), "path": str(folder)}}
    )
    return Run(config=config, checkpoint=None, folder=None)


def stored_settings(folder: Path) -> dict[str, Any]:
    """What an exported folder says of how its model is prompted and answers: parts of a config; empty for folders of others."""
    file = folder / SETTINGS
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _base_path(expects: str | None) -> str:
    """Where the base of an adapter is looked for: ms-swift names folders of its own cache, of which only the last part says something."""
    if expects is None:
        return "???"  # to be given with model.path=
    published = PUBLISHED.get(Path(expects).name.lower())
    return expects if published is None or Path(expects).expanduser().is_dir() else published


def _recipe(path: str, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The config that training a published model has, with what is `stored` of another in its place; without data."""
    config = deepcopy(_composed_for("qwen_vl" if _continues_text(path) else "qwen_vl_chat"))
    model = (
        stored["model"] if "_target_" in stored["model"] else {**config["model"], **stored["model"]}
    )
    return {**config, **stored, "model": model, "init": {}, "data": {}, "metrics": {}}


@cache
def _composed_for(model: str) -> dict[str, Any]:
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    begun = GlobalHydra.instance().is_initialized()  # by a verb that is running
    with (
        nullcontext()
        if begun
        else hydra.initialize_config_dir(str(config_folder()), version_base="1.3")
    ):
        return cast(
            "dict[str, Any]", OmegaConf.to_container(hydra.compose("train", [f"model={model}"]))
        )


def _continues_text(path: str) -> bool:
    """Whether it is a base model, which is published with raw prompts."""
    file = Path(path).expanduser() / "generation_config.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8")).get("chat_format") == "raw"
    return Path(path).name.lower() == "qwen-vl"


def _stored(checkpoint: Path) -> dict[str, Any]:
    import torch

    try:
        config = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True).get(
            "config"
        )
    except (OSError, RuntimeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{checkpoint} cannot be read as a checkpoint of this package: {error}"
        ) from error
    if config is None:
        raise DataError(f"{checkpoint} holds no config: it was not written by this package")
    return config
