"""Runs a command: prepares its arguments, lets Hydra compose the config, reports mistakes.

Nothing here imports torch, so that `--help` and the message about a misspelled key appear at once.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import (
    ConfigCompositionException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qwenvl_lit.cli.alternatives import is_sweep, quote_alternatives
from qwenvl_lit.cli.choices import refuse_paths_as_choices
from qwenvl_lit.cli.demo_data import refuse_own_files
from qwenvl_lit.cli.disk import DISK_ERRORS, RUN_FOLDER, disk_message, write_error
from qwenvl_lit.cli.early_checks import check_packages, check_values
from qwenvl_lit.cli.from_run import CommandLine, start_from_run, use_run
from qwenvl_lit.cli.hints import explain, refuse_options, refuse_unread_keys
from qwenvl_lit.cli.mixture import keep_expanded_datasets
from qwenvl_lit.cli.overrides import INFO_FLAGS, quote_free_text
from qwenvl_lit.cli.ranks import rank_arguments
from qwenvl_lit.cli.resume import refuse_used_folder, resume_arguments, resumed
from qwenvl_lit.cli.run_folder import remove_unused_folder
from qwenvl_lit.cli.settings_files import refuse_files
from qwenvl_lit.cli.signals import stops_reported
from qwenvl_lit.cores import limit_spinning
from qwenvl_lit.runs.run import config_folder
from qwenvl_lit.stopping import Stopped, signals
from qwenvl_lit.sweep.sweep import Sweep, is_a_sweep
from qwenvl_lit.terminal import printable
from qwenvl_lit.types import DataError

PACKAGE = Path(__file__).parents[1]
CACHE = "QWENVL_LIT_CACHE"  # environment variable
COMPOSITION_ERRORS = (
    ConfigCompositionException,
    MissingConfigException,
    OverrideParseException,
    OmegaConfBaseException,
)

Main = Callable[[DictConfig], None]
Adjust = Callable[[list[str]], list[str]]


def command(
    name: str,
    main: Main,
    *,
    run: Literal["unused", "needed", "start"] = "unused",
    adjust: Adjust = list,
) -> None:
    """Runs `main` with the config that the command line composes.

    Args:
        name: the primary config, `conf/NAME.yaml`.
        run: what `ckpt=` means. "unused": the command has no `ckpt=`. "needed": `ckpt=` names the
            run to use, from which the groups come that the command line does not choose; `model=`
            can name a published model instead. "start": training may start from a run, or resume
            one with `resume=`.
        adjust: changes that only this command makes to its arguments, applied first.

    The exit status is 2 after a mistake on the command line; 1 after a mistake in the data, a disk
    error, a closed output pipe or a failed job of a sweep; 130 after Ctrl-C, 129 after SIGHUP, and
    143 after SIGTERM or SIGUSR1.
    """
    limit_spinning()
    with stops_reported(name):
        _run_reporting_mistakes(name, main, run, adjust)


def _run_reporting_mistakes(
    name: str, main: Main, run: Literal["unused", "needed", "start"], adjust: Adjust
) -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach this function unchanged
    # Hydra turns exceptions in its callbacks into warnings. Make them errors again.
    warnings.filterwarnings("error", message="Callback .* raised", category=UserWarning)
    if CACHE in os.environ:  # conf/common.yaml reads it
        os.environ[CACHE] = os.path.expanduser(os.environ[CACHE])
    for resolver in (keys_of, choices_of, values_of):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
    arguments = sys.argv[1:]
    try:
        line = prepare(name, arguments, run=run, adjust=adjust)
        offer_groups(line)
        refuse_unread_keys(name, line.arguments)
        # Hydra reads sys.argv, and Lightning repeats it to start the other ranks.
        sys.argv[1:] = arguments = line.arguments
        sweep = Sweep(name)
        with sweep.reported():
            _compose_and_run(name, main, sweep)
        sys.stdout.flush()
    except Stopped:
        remove_unused_folder()
        raise
    except COMPOSITION_ERRORS as error:
        _exit(2, explain(name, arguments, error))
    except DataError as error:
        _exit(2, str(error))
    except BrokenPipeError:
        # Python flushes standard output once more when it exits, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if INFO_FLAGS & set(arguments):
            sys.exit(1)
        _exit(1, "output pipe closed; stopping")
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        _exit(1, write_error(error, error.filename or "the run folder", RUN_FOLDER))
    if sweep.failed:
        sys.exit(1)


def prepare(
    name: str,
    arguments: Sequence[str],
    *,
    run: Literal["unused", "needed", "start"] = "unused",
    adjust: Adjust = list,
) -> CommandLine:
    """Turns the arguments as typed into those that Hydra gets. Reads files, changes nothing.

    Other ranks prepare the prepared arguments again, so preparing twice must equal preparing once.

    Raises:
        DataError: the arguments name a run that is not there, contradict the run that they
            resume, or name a folder that holds results.
    """
    refuse_files(name, arguments)
    refuse_options(name, arguments)
    refuse_paths_as_choices(name, arguments)
    line = CommandLine(arguments=adjust(_quote_all(arguments)))
    if run == "needed":
        line = use_run(line.arguments, command=name)
    elif run == "start":
        line = start_from_run(line.arguments)
    prepared = line.arguments
    if run == "start":
        prepared = _quote_all(resume_arguments(prepared))
    prepared = rank_arguments(name, prepared)
    refuse_used_folder(prepared)
    refuse_own_files(name, prepared)
    return CommandLine(arguments=prepared, run_groups=line.run_groups, notes=line.notes)


def keys_of(name: str) -> str:
    """The keys of conf/NAME.yaml itself, with their comments, for `--help`."""
    text = (config_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    own_keys = text.partition("\n  - _self_\n")[2].partition("\nhydra:\n")[0]
    return own_keys.strip().replace("$", "$$")  # Hydra passes the help through string.Template


def choices_of(group: str) -> str:
    """The choices of a group in conf/, for `--help`."""
    return ", ".join(sorted(file.stem for file in (config_folder() / group).glob("*.yaml")))


def values_of(group: str, *keys: str, _root_: DictConfig) -> str:
    """Those of `keys` that a group of the composed config has, with their values, for `--help`."""
    node = OmegaConf.to_container(_root_[group], resolve=False)
    values = {key: node[key] for key in keys if key in node}
    return OmegaConf.to_yaml(OmegaConf.create({group: values})).strip().replace("$", "$$")


def _quote_all(arguments: Sequence[str]) -> list[str]:
    quote = quote_alternatives if is_sweep(arguments) else quote_free_text
    return [quote(argument) for argument in arguments]


def offer_groups(line: CommandLine) -> None:
    """Registers each group of a run with Hydra as its choice `run`; rank 0 prints the notes."""
    for group, node in line.run_groups.items():
        ConfigStore.instance().store(group=group, name="run", node=node)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for note in line.notes:
            print(printable(note), file=sys.stderr)


def _compose_and_run(name: str, main: Main, sweep: Sweep) -> None:
    decorate = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=name)
    decorate(_job(main, sweep))()


def _job(main: Main, sweep: Sweep) -> Callable[[DictConfig], float | None]:
    """Returns what Hydra calls with a config: it runs `main`, or gives the config to the sweep."""

    def job(config: DictConfig) -> float | None:
        if not is_a_sweep(config):
            return _report_mistakes(main, config)
        keep_expanded_datasets(config)  # also in the config file that Hydra wrote for the job
        return sweep.take(config, lambda config: _report_mistakes(main, config))

    job.__module__, job.__qualname__ = main.__module__, main.__qualname__
    return job


def _report_mistakes(main: Main, config: DictConfig) -> None:
    """Calls `main`; a user's mistake ends in a short message, a defect keeps its traceback."""
    try:
        keep_expanded_datasets(config)
        config = resumed(config) if "resume" in config else config
        check_values(config)
        check_packages(config)
        main(config)
    except DataError as error:
        remove_unused_folder()
        _exit(1, _last_message(str(error)))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        run, cache = Path(config.paths.run), Path(config.paths.cache)
        _exit(1, disk_message(error, run=run, cache=cache))
    except Exception as error:
        if signals.received:  # the error follows from the signal, which data workers also received
            raise Stopped(signals.received) from error
        cause: BaseException = error
        if isinstance(error, InstantiationException) and error.__cause__:
            cause = error.__cause__
        if not _is_a_mistake(cause):
            raise
        remove_unused_folder()
        _exit(2, str(cause))


def _last_message(text: str) -> str:
    """The message alone: an error from a data worker starts with that worker's traceback."""
    return re.split(r"(?m)^qwenvl_lit\.types\.\w+: ", text)[-1].strip()


def _is_a_mistake(error: BaseException) -> bool:
    """Whether the error is a ValueError of this package or a MisconfigurationException."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    refused_here = isinstance(error, ValueError) and raised_in.is_relative_to(PACKAGE)
    return refused_here or type(error).__name__ == "MisconfigurationException"


def _exit(status: int, message: str) -> NoReturn:
    print(printable(f"error: {message}", keep="\n"), file=sys.stderr)
    sys.exit(status)
