"""`resume=RUN` and `resume=auto`: the command line and the config of a run that goes on in its folder; others need an unused one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from qwenvl_lit.runs.run import latest_run
from qwenvl_lit.types import DataError

MAY_CHANGE = (
    "trainer.max_epochs",
    "trainer.max_steps",
    "data.num_workers",
)  # of a run that goes on
LAST = "checkpoints/last.ckpt"
RESULTS = (
    "checkpoints/*.ckpt",
    "metrics.json",
    "predictions*.jsonl",
    "*/*/predictions*.jsonl",
)  # the last: of benchmarks, FILE/SET
LOOKS_ONLY = {"--help", "-h", "--hydra-help", "--info", "-i", "--cfg", "-c"}


def resume_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line of the run that `resume=` names, to be run in its folder; without `resume=` the arguments as they are.

    `resume=RUN` takes a run folder, or `latest`. `resume=auto` takes the folder that `hydra.run.dir=` names, if there is a checkpoint in
    it, and else begins there: the same command starts a run and goes on with it. Arguments may repeat what the run was started with, and
    change `MAY_CHANGE`.

    Raises:
        DataError: there is no such run, it has no checkpoint, or an argument says something else than the run.
    """
    values = {
        key: value.strip("'\"")
        for key, equals, value in (argument.partition("=") for argument in arguments)
        if equals
    }
    resume, folder = values.get("resume", "null"), values.get("hydra.run.dir")
    if resume == "null":
        return list(arguments)
    if resume == "auto":
        if {"-m", "--multirun"} & set(
            arguments
        ):  # each job of a sweep has a folder, and this argument again
            return list(arguments)
        if folder is None:
            raise DataError(
                "resume=auto needs the folder of the run, the same one each time: hydra.run.dir=runs/mine"
            )
        if not Path(folder, LAST).exists():
            return list(arguments)
        run = Path(folder)
    else:
        found = latest_run() if resume == "latest" else Path(resume).expanduser()
        if found is None or not (found / LAST).exists():
            raise DataError(
                f"resume={resume}: there is no {LAST}; resume= takes the folder of a run that has saved one, or latest. A run that stopped "
                f"before its first is begun again"
            )
        if folder is not None and Path(folder).resolve() != found.resolve():
            raise DataError(f"resume={resume} goes on in {found}; leave out hydra.run.dir={folder}")
        run = found
    started_with = OmegaConf.to_container(OmegaConf.load(run / ".hydra/overrides.yaml"))
    kept = []
    for argument in arguments:
        key = argument.partition("=")[0]
        if key in MAY_CHANGE or argument.startswith(("-", "hydra.")):
            kept.append(argument)
        elif key != "resume" and argument not in started_with:
            raise DataError(
                f"resume={resume}: {argument} contradicts the run, which goes on with its own settings ({run / 'config.yaml'}); only "
                f"{', '.join(MAY_CHANGE)} may change. To start another run from what this one has learned: ckpt={run}"
            )
    own = [
        argument
        for argument in kept
        if not argument.startswith(("hydra.run.dir=", "hydra.output_subdir="))
    ]
    return [
        *own,
        f"resume={run}",
        f"hydra.run.dir={run}",
        "hydra.output_subdir=null",
    ]  # null: what it was started with stays written


def refuse_used_folder(arguments: Sequence[str]) -> None:
    """Nothing that an earlier command of any verb has found is overwritten: `hydra.run.dir=` names a folder without `RESULTS`, or that of a
    run that goes on. Other ranks than the first write no config of their own, which is how they are told apart.

    Raises:
        DataError: the folder holds results.
    """
    keys = {argument.partition("=")[0] for argument in arguments}
    goes_on = any(
        argument.startswith("resume=") and argument != "resume=null" for argument in arguments
    )
    if (
        "hydra.run.dir" not in keys
        or goes_on
        or "hydra.output_subdir=null" in arguments
        or LOOKS_ONLY & keys
    ):
        return
    place = next(argument for argument in arguments if argument.startswith("hydra.run.dir="))
    folder = Path(str(OverridesParser.create().parse_override(place).value()))
    found = next(
        (file.relative_to(folder) for pattern in RESULTS for file in sorted(folder.glob(pattern))),
        None,
    )
    if found is not None:
        going_on = (
            f"; to go on with its training: python -m qwenvl_lit.train resume={folder}"
            if (folder / LAST).exists()
            else ""
        )
        raise DataError(
            f"hydra.run.dir={folder} holds an earlier run ({found}): choose another folder, or remove this one{going_on}"
        )


def resumed(config: DictConfig) -> DictConfig:
    """The config of the run itself where `config` goes on with one, with what the command line changed of it; else `config`."""
    if config.resume in (None, "auto"):
        return config
    stored = OmegaConf.load(Path(config.paths.run, ".hydra/config.yaml"))
    assert isinstance(stored, DictConfig)
    given = {override.partition("=")[0] for override in HydraConfig.get().overrides.task}
    for key in given & set(MAY_CHANGE):
        OmegaConf.update(stored, key, OmegaConf.select(config, key))
    OmegaConf.update(stored, "resume", config.resume)
    OmegaConf.set_struct(stored, True)
    return stored


def checkpoint_of(config: DictConfig) -> Path | None:
    """What a run goes on from; None if it begins."""
    return None if config.resume in (None, "auto") else Path(config.paths.run, LAST)


def steps_of(checkpoint: Path | None) -> int:
    """Optimizer steps that a checkpoint has behind it; none without one."""
    import torch

    return (
        0
        if checkpoint is None
        else torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    )
