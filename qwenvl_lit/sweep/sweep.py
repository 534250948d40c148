"""A sweep: a training run for each combination of values, each in a process of its own.

outputs/train/2026-11-23_09-00-00/
    0/ 1/ 2/ ...    run folders, as `runs` describes them, and in each
        output.log      what the job printed
        job.json        its values, how long it took, the error if it failed, and its config
    sweep.csv       all jobs, best first
    sweep.png       the score over what was varied

A process of its own has fresh memory, and several devices work inside: Lightning starts the other ranks by repeating the command line,
which is that of one job and not of the sweep.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from qwenvl_lit.sweep.results import (
    COMPOSED,
    JOB,
    read_scores,
    report,
    result_table,
    save_result,
    varied,
)
from qwenvl_lit.types import DataError

OUTPUT = "output.log"
GRACE = 60  # seconds that a job has to stop by itself


class CaptureSweepConfig(Callback):
    """Keeps the config of the sweep that Hydra begins: it tells it to its callbacks only."""

    config: ClassVar[DictConfig | None] = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        CaptureSweepConfig.config = config


class JobError(Exception):
    """A job on a cluster has failed; its folder says how."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run of a sweep, to be started."""

    folder: Path
    overrides: tuple[str, ...]
    command: tuple[str, ...]

    @property
    def values(self) -> dict[str, str]:
        return dict(override.split("=", 1) for override in self.overrides if "=" in override)


class Sweep:
    """The jobs of a command with `-m` or `sweep=NAME`.

    Hydra composes each job and gives it to `take`. Jobs made of lists of values are collected and then run, `sweep.parallel` at a time;
    a sweeper that needs the score of one job to choose the next (optuna) gets it at once. On a cluster the launcher (submitit) has
    started a process for the job already, and it runs there.
    """

    def __init__(self, verb: str):
        self.verb = verb
        self.jobs: list[Job] = []
        self.started = False
        self.failed = False

    def take(self, config: DictConfig, main: Callable[[DictConfig], None]) -> float | None:
        """Collect or run one job; returns its score once it has run.

        Raises:
            DataError: its folder holds a job with other values, or Hydra was told to start jobs in a way that gives them no process.
        """
        hydra = HydraConfig.get()
        overrides = tuple(item for item in hydra.overrides.task if not item.startswith("sweep."))
        folder = Path(hydra.runtime.output_dir)
        before = _result(folder)
        if before and before["config"]:  # Hydra has written its config anew already
            (folder / COMPOSED).write_text(before["config"], encoding="utf-8")
        if before and before["overrides"] != list(overrides):
            raise DataError(
                f"{folder} holds a job with other values ({' '.join(before['overrides'])}); choose another hydra.sweep.dir"
            )
        if _on_a_cluster(hydra):
            if before is None or before["error"]:
                self._run_here(config, main, folder, overrides)
            return read_scores(folder).get(config.sweep.metric)
        if not hydra.launcher._target_.endswith(".BasicLauncher"):
            raise DataError(
                f"hydra/launcher={hydra.runtime.choices['hydra/launcher']}: on one machine use sweep.parallel=N instead"
            )
        job = Job(
            folder=folder,
            overrides=overrides,
            command=job_command(self.verb, hydra, overrides, folder),
        )
        self.jobs.append(job)
        if _is_collected(hydra):
            return None
        if config.sweep.parallel > 1:
            raise DataError(
                f"sweep.parallel={config.sweep.parallel}: this hydra/sweeper runs one job after the other; use sweep.parallel=1"
            )
        self._run_unfinished([job], [{}], config.sweep.metric)
        return read_scores(folder).get(config.sweep.metric)

    def _run_here(
        self, config: DictConfig, main: Callable, folder: Path, overrides: Sequence[str]
    ) -> None:
        start, error = time.perf_counter(), None
        try:
            main(config)
        except (Exception, SystemExit) as stop:
            error = f"{type(stop).__name__}: {stop}"
            raise JobError(
                error
            ) from stop  # SystemExit would end the launcher's worker before it has answered
        finally:
            if os.environ.get("SLURM_PROCID", "0") == "0":
                save_result(folder, overrides, seconds=time.perf_counter() - start, error=error)

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Run the jobs that Hydra gives inside; in the end, also that of an interrupted sweep, table and plot say what it found."""
        try:
            yield
            config = CaptureSweepConfig.config
            if config is not None and self.jobs and _is_collected(config.hydra):
                trainer = config.trainer
                slots = job_slots(
                    config.sweep.parallel, accelerator=trainer.accelerator, devices=trainer.devices
                )
                self._run_unfinished(self.jobs, slots, config.sweep.metric)
        except JobError:
            self.failed = True  # Hydra raises the first failure when all jobs have ended; the table has them all
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        finally:
            config = CaptureSweepConfig.config
            if config is not None and (self.started or _on_a_cluster(config.hydra)):
                self._report(config)

    def _run_unfinished(
        self, jobs: Sequence[Job], slots: Sequence[Mapping[str, str]], metric: str
    ) -> None:
        self.started = True
        todo = [job for job in jobs if (result := _result(job.folder)) is None or result["error"]]
        if done := len(jobs) - len(todo):
            print(f"{done} of {len(jobs)} jobs are finished already")
        run_jobs(todo, slots, metric=metric, keys=varied([job.values for job in self.jobs]))

    def _report(self, config: DictConfig) -> None:
        from rich.console import Console

        folder = Path(config.hydra.sweep.dir)
        ranked = report(folder, metric=config.sweep.metric, mode=config.sweep.mode)
        self.failed = any(result.error for result in ranked)
        if ranked:
            Console().print(result_table(ranked, config.sweep.metric))
            plot = f" and {folder / 'sweep.png'}" if (folder / "sweep.png").exists() else ""
            print(f"Also in {folder / 'sweep.csv'}{plot}")
            if ranked[0].scores.get(config.sweep.metric) is not None:
                print(f"Score the best:  python -m qwenvl_lit.test ckpt={ranked[0].folder}")
        if left := sum(_result(job.folder) is None for job in self.jobs):
            print(
                f"{left} of {len(self.jobs)} jobs have not ended; to go on, the same command with hydra.sweep.dir={folder}"
            )


def is_a_sweep(config: DictConfig) -> bool:
    """Whether the job that Hydra is running is one of a sweep of training runs."""
    return "sweep" in config and HydraConfig.get().mode == RunMode.MULTIRUN


def job_command(
    verb: str, hydra: DictConfig, overrides: Sequence[str], folder: Path
) -> tuple[str, ...]:
    """The command line of one job, as a run that knows nothing of the sweep.

    Args:
        hydra: Hydra's own config of the job, for what the sweep's command line said of config folders and of Hydra.
    """
    own = [
        source.path for source in hydra.runtime.config_sources if source.provider == "command-line"
    ]
    flags = [f"--config-name={hydra.job.config_name}", *(f"--config-dir={path}" for path in own)]
    # goes on from the checkpoint that an interrupted job left
    resume = (
        [] if any(override.startswith("resume=") for override in overrides) else ["resume=auto"]
    )
    placed = ["hydra.mode=RUN", f"hydra.run.dir={folder}"]  # the last word on both
    return (
        sys.executable,
        "-m",
        f"qwenvl_lit.{verb}",
        *flags,
        *hydra.overrides.hydra,
        *overrides,
        *resume,
        *placed,
    )


def job_slots(
    parallel: int, *, accelerator: str, devices: int | str | list[int]
) -> list[dict[str, str]]:
    """What jobs that run at the same time need in their environment: each its own GPUs, or its share of the CPU cores.

    Raises:
        DataError: there are not enough GPUs.
    """
    if parallel == 1:
        return [{}]
    if parallel < 1:
        raise DataError(f"sweep.parallel={parallel}: 1 or more jobs at a time")
    cards = [] if accelerator == "cpu" else visible_cards()
    if not cards:
        threads = os.environ.get("OMP_NUM_THREADS") or str(
            max(1, (os.cpu_count() or 1) // parallel)
        )
        return [{"OMP_NUM_THREADS": threads}] * parallel
    needed = devices if isinstance(devices, int) and devices > 0 else 1
    share = len(cards) // parallel
    if share < needed:
        raise DataError(
            f"sweep.parallel={parallel}: {parallel} jobs with {needed} GPUs each, but there are {len(cards)}"
        )
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(cards[slot * share : (slot + 1) * share])}
        for slot in range(parallel)
    ]


def visible_cards() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [card for card in chosen.split(",") if card]
    import torch

    return [str(card) for card in range(torch.cuda.device_count())]


def run_jobs(
    jobs: Sequence[Job],
    slots: Sequence[Mapping[str, str]],
    *,
    metric: str,
    keys: Sequence[str] = (),
) -> None:
    """Run jobs, as many at a time as there are slots, and say in a line when each, named by the values of `keys`, begins and how it ended.

    A job that fails leaves its error in its folder, and the others go on. An interrupt, or SIGTERM, stops those that run.
    """
    waiting, free = list(jobs), list(slots)
    running: list[tuple[Job, subprocess.Popen, Mapping[str, str], float]] = []
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while waiting or running:
            while waiting and free:
                job, slot = waiting.pop(0), free.pop(0)
                running.append((job, _start(job, slot), slot, time.perf_counter()))
                print(
                    f"{_name(job, keys)}: starts, prints to {_shown(job.folder / OUTPUT)}",
                    flush=True,
                )
            for entry in list(running):
                job, process, slot, start = entry
                if (status := process.poll()) is not None:
                    seconds = time.perf_counter() - start
                    error = _error(status, job.folder / OUTPUT) if status else None
                    save_result(job.folder, job.overrides, seconds=seconds, error=error)
                    print(
                        f"{_name(job, keys)}: {_outcome(job, error, metric)}, {seconds:.0f} s",
                        flush=True,
                    )
                    running.remove(entry)
                    free.append(slot)
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGTERM, before)
        _stop([process for _, process, _, _ in running])


def _start(job: Job, slot: Mapping[str, str]) -> subprocess.Popen:
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / JOB).unlink(missing_ok=True)
    with (job.folder / OUTPUT).open("ab") as output:
        environment = {**os.environ, **slot, "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.perf_counter() + GRACE
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()


def _error(status: int, output: Path) -> str:
    """Why a process failed: its last message, or the signal that ended it."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}" + (
            " (out of memory?)" if -status == signal.SIGKILL else ""
        )
    lines = [
        line
        for line in output.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (named or lines or [f"exit status {status}"])[-1]


def _outcome(job: Job, error: str | None, metric: str) -> str:
    if error is not None:
        return f"failed ({error})"
    score = read_scores(job.folder).get(metric)
    return "no score" if score is None else f"{metric} {score:.4g}"


def _result(folder: Path) -> dict[str, Any] | None:
    file = folder / JOB
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _is_collected(hydra: DictConfig) -> bool:
    """Whether all jobs are known before the first one runs."""
    return hydra.sweeper._target_.endswith(".BasicSweeper")


def _on_a_cluster(hydra: DictConfig) -> bool:
    return "submitit" in hydra.launcher._target_


def _name(job: Job, keys: Sequence[str]) -> str:
    return " ".join(
        [
            f"job {job.folder.name}",
            *(f"{key}={job.values[key]}" for key in keys if key in job.values),
        ]
    )


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
