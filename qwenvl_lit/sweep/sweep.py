"""Runs a sweep: a training run for each combination of values, each in its own process.

outputs/train/2026-11-23_09-00-00/
    0/ 1/ 2/ ...    run folders, as `runs` describes them, and in each
        output.log      what the job printed
        job.json        its values, duration and config, and the error if it failed
    sweep.csv       all jobs, the best one first
    sweep.png       the scores over the values that were varied

Each process starts with empty memory and may use several devices: Lightning starts the other ranks
by repeating the command line, which is that of one job and not that of the sweep.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from qwenvl_lit.atomic import write_text
from qwenvl_lit.locks import WAIT_SECONDS, ProcessLock, lock_of, read_holder
from qwenvl_lit.metrics.summary import read_fit_summary
from qwenvl_lit.settings import check_settings
from qwenvl_lit.stopping import is_first_rank
from qwenvl_lit.sweep.jobs import Job, job_slots, run_jobs
from qwenvl_lit.sweep.report import PLOT, TABLE, report, result_table
from qwenvl_lit.sweep.results import COMPOSED, Result, read_result, save_result, varied_keys
from qwenvl_lit.terminal import counted
from qwenvl_lit.types import DataError


class CaptureSweepConfig(Callback):
    """Captures the config of the sweep, which Hydra passes to callbacks only."""

    config: ClassVar[DictConfig | None] = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        CaptureSweepConfig.config = config


class JobError(Exception):
    """A job on a cluster has failed; its folder has the details."""


class Sweep:
    """The jobs of a command with `-m` or `sweep=NAME`.

    Hydra composes each job and calls `take`. What happens then depends on Hydra's plugins:

    - A sweeper that knows all jobs beforehand (lists of values): the jobs are collected, and run
      when Hydra has composed the last one, `sweep.parallel` at a time.
    - A sweeper that needs the score of one job to choose the next (optuna): the job runs at once.
    - A launcher that has started a process on a cluster (submitit): the job runs in this process.

    Args:
        command: name of the command, such as "train".
    """

    def __init__(self, command: str):
        self.command = command
        self.jobs: list[Job] = []
        self.started = False
        self.failed = False

    def take(self, config: DictConfig, main: Callable[[DictConfig], None]) -> float | None:
        """Collects or runs one job; returns its score if it has run.

        Raises:
            DataError: a setting is wrong, the folder of the job holds one with other values, or
                Hydra was told to start jobs in a way that gives them no process of their own.
        """
        try:
            check_settings("sweep", config.sweep)
        except ValueError as error:
            raise DataError(str(error)) from None
        hydra = HydraConfig.get()
        overrides = tuple(item for item in hydra.overrides.task if not item.startswith("sweep."))
        folder = Path(hydra.runtime.output_dir)
        earlier = _earlier_result(folder, overrides)
        if _runs_on_cluster(hydra):
            if earlier is None or earlier.error:
                self._run_here(config, main, folder, overrides)
            return _score(folder, config)
        if not hydra.launcher._target_.endswith(".BasicLauncher"):
            launcher = hydra.runtime.choices["hydra/launcher"]
            raise DataError(
                f"hydra/launcher={launcher}: on one machine use sweep.parallel=N instead"
            )
        command = job_command(self.command, hydra, overrides, folder)
        job = Job(folder=folder, overrides=overrides, command=command)
        self.jobs.append(job)
        if _knows_all_jobs(hydra):
            return None
        if config.sweep.parallel > 1:
            raise DataError(
                f"sweep.parallel={config.sweep.parallel}: this hydra/sweeper runs one job after "
                "the other; use sweep.parallel=1"
            )
        self._run_unfinished([job], [{}], config.sweep.metric)
        return _score(folder, config)

    def _run_here(
        self,
        config: DictConfig,
        main: Callable[[DictConfig], None],
        folder: Path,
        overrides: Sequence[str],
    ) -> None:
        start, error = time.perf_counter(), None
        with _locked(folder):
            try:
                main(config)
            except (Exception, SystemExit) as stop:
                error = f"{type(stop).__name__}: {stop}"
                # A SystemExit would end the launcher's worker before it has reported back.
                raise JobError(error) from stop
            finally:
                if is_first_rank():
                    seconds = time.perf_counter() - start
                    save_result(folder, overrides, seconds=seconds, error=error)

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Runs the jobs that Hydra composes in the block, then reports their results.

        An interrupted sweep is reported too.
        """
        try:
            yield
            config = CaptureSweepConfig.config
            if config is not None and self.jobs and _knows_all_jobs(config.hydra):
                slots = job_slots(
                    config.sweep.parallel,
                    accelerator=config.trainer.accelerator,
                    devices=config.trainer.devices,
                )
                self._run_unfinished(self.jobs, slots, config.sweep.metric)
        except JobError:
            # Hydra raises the first failure after all jobs have ended; the table lists all of them.
            self.failed = True
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        finally:
            config = CaptureSweepConfig.config
            if config is not None and (self.started or _runs_on_cluster(config.hydra)):
                self._report(config)

    def _run_unfinished(
        self, jobs: Sequence[Job], slots: Sequence[Mapping[str, str]], metric: str
    ) -> None:
        self.started = True
        unfinished = []
        for job in jobs:
            result = read_result(job.folder)
            if result is None or result.error:
                unfinished.append(job)
        finished = len(jobs) - len(unfinished)
        if finished:
            print(f"{finished} of {counted(len(jobs), 'job')} finished already")
        config = CaptureSweepConfig.config
        reason = why_no_score(config) if config is not None and unfinished else None
        if reason:
            print(f"warning: the jobs will have no score: {reason}")
        keys = varied_keys([job.values for job in self.jobs])
        run_jobs(unfinished, slots, metric=metric, keys=keys)

    def _report(self, config: DictConfig) -> None:
        from qwenvl_lit.rendering.table import output_console

        folder = Path(config.hydra.sweep.dir)
        metric = config.sweep.metric
        ranked = report(folder, metric=metric, mode=config.sweep.mode)
        self.failed = any(result.error for result in ranked)
        if ranked:
            output_console().print(result_table(ranked, metric))
            files = [str(folder / TABLE)]
            if (folder / PLOT).exists():
                files.append(str(folder / PLOT))
            print(f"Also in {' and '.join(files)}")
            if ranked[0].scores.get(metric) is not None:
                print(f"Score the best:  python -m qwenvl_lit.test ckpt={ranked[0].folder}")
            elif not all(result.error for result in ranked):
                print(f"No job has a score: {why_no_score(config) or 'none has validated'}")
        unfinished = sum(read_result(job.folder) is None for job in self.jobs)
        if unfinished:
            print(
                f"{unfinished} of {counted(len(self.jobs), 'job')} did not end; to resume, repeat "
                f"the command with hydra.sweep.dir={folder}"
            )


def is_a_sweep(config: DictConfig) -> bool:
    """Tells whether the job that Hydra is running belongs to a sweep of training runs."""
    return "sweep" in config and HydraConfig.get().mode == RunMode.MULTIRUN


def why_no_score(config: DictConfig) -> str | None:
    """Says which setting keeps the jobs of a sweep from validating; None if there is none."""
    if config.trainer.limit_val_batches == 0:
        return "trainer.limit_val_batches=0 turns validation off; give null"
    if "validation" in config.data and not config.data.validation:
        given = config.data.validation
        return (
            f"data.validation={'null' if given is None else given} gives no rows to validate on; "
            "give a file, or the number or the share of training rows to hold out"
        )
    return None


def job_command(
    command: str, hydra: DictConfig, overrides: Sequence[str], folder: Path
) -> tuple[str, ...]:
    """Returns the command line of one job, as a run without a sweep.

    Args:
        command: name of the command, such as "train".
        hydra: Hydra's own config of the job. It has the config folders and Hydra options that were
            given on the sweep's command line.
    """
    python = [sys.executable, "-m", f"qwenvl_lit.{command}"]
    flags = [f"--config-name={hydra.job.config_name}"]
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            flags.append(f"--config-dir={source.path}")
    resume = []
    if not any(override.startswith("resume=") for override in overrides):
        resume.append("resume=auto")  # from the checkpoint of an interrupted job
    destination = ["hydra.mode=RUN", f"hydra.run.dir={folder}"]  # last: nothing overrides these
    return (*python, *flags, *hydra.overrides.hydra, *overrides, *resume, *destination)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks the folder of a job, as a run without a sweep does; rank 0 locks it for all ranks.

    Raises:
        JobError: another process has locked it.
    """
    if not is_first_rank():
        yield
        return
    lock = ProcessLock(lock_of(folder))
    folder.mkdir(parents=True, exist_ok=True)
    if not lock.acquire(seconds=WAIT_SECONDS):
        holder = read_holder(lock.file) or "another process"
        raise JobError(f"{folder} is used by {holder}; wait until it has ended")
    try:
        yield
    finally:
        lock.release()


def _earlier_result(folder: Path, overrides: Sequence[str]) -> Result | None:
    """The result of the job that ran in `folder` before, whose config is restored.

    Hydra has overwritten that config.

    Raises:
        DataError: that job had other overrides.
    """
    earlier = read_result(folder)
    if earlier is None:
        return None
    if earlier.config:
        write_text(folder / COMPOSED, earlier.config)
    if earlier.overrides != tuple(overrides):
        raise DataError(
            f"{folder} holds a job with other values ({' '.join(earlier.overrides)}); "
            "choose another hydra.sweep.dir"
        )
    return earlier


def _score(folder: Path, config: DictConfig) -> float | None:
    return read_fit_summary(folder).scores.get(config.sweep.metric)


# Hydra's plugins are recognized by the class path in `_target_`. Comparing classes would import
# plugins that may not be installed.


def _knows_all_jobs(hydra: DictConfig) -> bool:
    """Whether the sweeper composes all jobs before it needs the first score."""
    return hydra.sweeper._target_.endswith(".BasicSweeper")


def _runs_on_cluster(hydra: DictConfig) -> bool:
    """Whether the launcher has started a process for each job."""
    return "submitit" in hydra.launcher._target_
