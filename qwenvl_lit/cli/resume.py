"""`resume=RUN` and `resume=auto`: a run continues in its own folder, with its own settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import NoneType

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from qwenvl_lit import checksums
from qwenvl_lit.cli.overrides import INFO_FLAGS, value_of
from qwenvl_lit.runs.run import COMPOSED_CONFIG, TRAIN_FOLDER, latest_run, run_near
from qwenvl_lit.runs.stored_config import check_stored_config, read_config
from qwenvl_lit.stored_files import read_checkpoint
from qwenvl_lit.terminal import counted
from qwenvl_lit.types import DataError
from qwenvl_lit.value_types import matches, type_name

ENDS = ("max_epochs", "max_steps")
MAY_CHANGE = (
    *(f"trainer.{key}" for key in ENDS),
    "data.num_workers",
    "trust",
)  # when a run is resumed
PERMISSIONS = ("trust", "verify")  # of a command, not of a run
LAST = "checkpoints/last.ckpt"
RESUMED = {  # what Lightning restores from a checkpoint
    "global_step": int,
    "epoch": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}
REPORT = "report.html"  # the last file that `test` writes
RESULTS = (  # files of a run folder that no later command overwrites
    "checkpoints/*.ckpt",
    "metrics.json",
    "predictions*.jsonl",
    "*/*/predictions*.jsonl",  # of benchmarks: NAME/SPLIT/
)


def resume_arguments(arguments: Sequence[str]) -> list[str]:
    """Replaces `resume=` by arguments that run Hydra in the folder of the resumed run.

    `resume=RUN` takes a run folder, its last.ckpt or `latest`. `resume=auto` resumes the run in the
    folder that `hydra.run.dir=` names if it holds a checkpoint, and starts one there if not, so
    that the same command starts a run and resumes it. Arguments may repeat those that the run was
    started with, and change `MAY_CHANGE`. Without `resume=` the arguments are returned unchanged.

    Raises:
        DataError: there is no such run, it has no checkpoint, or an argument contradicts it.
    """
    resume = value_of(arguments, "resume")
    if resume is None:
        return list(arguments)
    run = _run_to_resume(resume, arguments)
    if run is None:
        return list(arguments)
    kept = _compatible_arguments(resume, run, arguments)
    # No output_subdir: the config that the run was started with stays as it was written.
    return [*kept, f"resume={run}", f"hydra.run.dir={run}", "hydra.output_subdir=null"]


def _run_to_resume(resume: str, arguments: Sequence[str]) -> Path | None:
    """The folder of the run; None if `resume=auto` finds no checkpoint and a run starts."""
    folder = value_of(arguments, "hydra.run.dir")
    if resume == "auto":
        if not {"-m", "--multirun"}.isdisjoint(arguments):
            return None  # each job of the sweep has its folder, and gets this argument again
        if folder is None:
            raise DataError(
                "resume=auto needs the folder of the run, the same one each time: "
                "hydra.run.dir=runs/mine"
            )
        return Path(folder) if Path(folder, LAST).exists() else None
    run = latest_run() if resume == "latest" else Path(resume).expanduser()
    if run is not None and run.is_file():  # a checkpoint
        run = run.parent.parent if run.match(LAST) else run.parent
    if run is None or not (run / LAST).exists():
        if run is not None and (near := run_near(run)):
            raise DataError(f"resume={resume} takes the folder of a run; {near}")
        raise DataError(
            f"resume={resume}: there is no {LAST}; resume= takes the folder of a run that has "
            f"saved one, or latest, the newest run in {TRAIN_FOLDER.resolve()}; a run that "
            f"hydra.run.dir= put elsewhere is given by its folder. "
            f"Start a run again if it stopped before its first checkpoint"
        )
    if folder is not None and Path(folder).resolve() != run.resolve():
        raise DataError(f"resume={resume} continues in {run}; leave out hydra.run.dir={folder}")
    return run


def _compatible_arguments(resume: str, run: Path, arguments: Sequence[str]) -> list[str]:
    overrides = run / ".hydra/overrides.yaml"
    started_with = read_config(overrides)
    if not matches(started_with, list[str]):
        raise DataError(f"{overrides} is no list of arguments; is it complete?")
    kept = []
    for argument in arguments:
        key = argument.partition("=")[0]
        if key in ("resume", "hydra.run.dir", "hydra.output_subdir"):
            continue
        if key in (*MAY_CHANGE, *PERMISSIONS) or argument.startswith(("-", "hydra.")):
            kept.append(argument)
        elif argument not in started_with:
            raise DataError(
                f"resume={resume}: {argument} contradicts the run, which keeps its own settings "
                f"({run / 'config.yaml'}); only {', '.join(MAY_CHANGE)} may change. To start "
                f"another run from its weights: ckpt={run}"
            )
    return kept


def refuse_used_folder(arguments: Sequence[str]) -> None:
    """Refuses a `hydra.run.dir=` that holds `RESULTS`, unless the command resumes that run.

    A test that has not written its report has been interrupted or has failed; it starts again.
    Ranks above 0 are recognised by `hydra.output_subdir=null`: they share the folder of rank 0.

    Raises:
        DataError: the folder holds results.
    """
    keys = {argument.partition("=")[0] for argument in arguments}
    is_resuming = value_of(arguments, "resume") is not None
    is_other_rank = "hydra.output_subdir=null" in arguments
    if "hydra.run.dir" not in keys or is_resuming or is_other_rank or INFO_FLAGS & keys:
        return
    folder = Path(value_of(arguments, "hydra.run.dir") or "")
    if _is_a_test(folder) and not (folder / REPORT).exists():
        return
    for pattern in RESULTS:
        for file in sorted(folder.glob(pattern)):
            advice = "choose another folder, or remove this one"
            if (folder / LAST).exists():
                advice += f"; to continue its training: python -m qwenvl_lit.train resume={folder}"
            elif ".rank" in file.name:
                advice += (
                    f"; to answer the rows that are left: answered={folder} and another "
                    f"hydra.run.dir=, or none"
                )
            name = file.relative_to(folder)
            raise DataError(f"hydra.run.dir={folder} holds an earlier run ({name}): {advice}")


def _is_a_test(folder: Path) -> bool:
    """Whether the command `test` has made a run folder."""
    file = folder / ".hydra/hydra.yaml"
    if not file.exists():
        return False
    try:
        return OmegaConf.select(OmegaConf.create(read_config(file)), "hydra.job.name") == "test"
    except DataError:
        return False


def resumed(config: DictConfig) -> DictConfig:
    """The stored config of the run that `config` resumes, with what the command line changes.

    If an earlier resume has changed the end of the run, that end holds. A config that resumes
    nothing is returned as it is.
    """
    if config.resume in (None, "auto"):
        return config
    file = Path(config.paths.run, COMPOSED_CONFIG)
    plain = read_config(file)
    check_stored_config(plain, file, trust=config.trust)
    missing = sorted(set(config) - set(plain))
    if missing:
        raise DataError(f"{file} lacks {', '.join(missing)}; is it complete?")
    stored = OmegaConf.create(plain)
    # A run writes into its own folder, whatever the stored config says.
    OmegaConf.update(stored, "paths.run", config.paths.run)
    for key, value in _last_ends(Path(config.paths.run, "config.yaml")).items():
        OmegaConf.update(stored, f"trainer.{key}", value)
    overridden = {override.partition("=")[0] for override in HydraConfig.get().overrides.task}
    for key in overridden.intersection(MAY_CHANGE):
        OmegaConf.update(stored, key, OmegaConf.select(config, key))
    OmegaConf.update(stored, "resume", config.resume)
    for key in PERMISSIONS:
        OmegaConf.update(stored, key, config[key], force_add=True)
    OmegaConf.set_struct(stored, True)
    return stored


def _last_ends(file: Path) -> dict[str, int | None]:
    """The settings `ENDS` of the trainer that a run had when it last started.

    Raises:
        DataError: the file is damaged.
    """
    if not file.exists():
        return {}
    settings = read_config(file)
    trainer = settings.get("trainer") if isinstance(settings, dict) else None
    ends = {}
    if isinstance(trainer, dict):
        ends = {key: trainer[key] for key in ENDS if key in trainer}
    if len(ends) < len(ENDS) or not all(type(end) in (int, NoneType) for end in ends.values()):
        raise DataError(
            f"{file}: trainer needs {' and '.join(ENDS)}, whole numbers or null; is it complete?"
        )
    return ends


def checkpoint_of(config: DictConfig) -> Path | None:
    """The checkpoint that a run resumes from, compared with its checksum; None for a new run."""
    if config.resume in (None, "auto"):
        return None
    checkpoint = Path(config.paths.run, LAST)
    if config.verify:
        checksums.verify(checkpoint)
    return checkpoint


def steps_of(checkpoint: Path | None) -> int:
    """The optimizer steps that a checkpoint has made; 0 without one."""
    if checkpoint is None:
        return 0
    stored = read_checkpoint(checkpoint)
    for key, expected in RESUMED.items():
        if not matches(stored.get(key), expected):
            raise DataError(
                f"{checkpoint} cannot be resumed: its {key} is not {type_name(expected)}; "
                f"ckpt= starts another run from its weights"
            )
    return stored["global_step"]


def nothing_left(steps: int, max_steps: int, max_epochs: int | None) -> str:
    """Says that a resumed run is complete, and which of its limits ends it."""
    limit, why = "max_steps", ""
    if steps != max_steps:
        limit = "max_epochs"
        if max_steps > steps:
            why = f", all of trainer.max_epochs={max_epochs}, so trainer.max_steps={max_steps} "
            why += "has no effect"
    return (
        f"Nothing was left to train: the run has made its {counted(steps, 'step')}{why}. "
        f"To train further: trainer.{limit}=..."
    )
