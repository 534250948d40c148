"""Runs jobs as processes, several at a time, each with its own GPUs or share of the CPU cores."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qwenvl_lit.cores import available_cores
from qwenvl_lit.locks import is_locked, lock_of, read_holder
from qwenvl_lit.metrics.summary import read_fit_summary
from qwenvl_lit.sweep.results import RESULT, override_values, save_result
from qwenvl_lit.types import DataError

OUTPUT = "output.log"
GRACE_SECONDS = 60  # for a job to stop by itself


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run of a sweep, to be started."""

    folder: Path
    overrides: tuple[str, ...]
    command: tuple[str, ...]

    @property
    def values(self) -> dict[str, str]:
        """The values that the command line of the job sets."""
        return override_values(self.overrides)

    def name(self, keys: Sequence[str]) -> str:
        """Returns the number of the job and its values of `keys`."""
        values = self.values
        name = f"job {self.folder.name}"
        for key in keys:
            if key in values:
                name += f" {key}={values[key]}"
        return name


class _Running(NamedTuple):
    job: Job
    process: subprocess.Popen | None  # None: an earlier start of the sweep has started the job
    slot: Mapping[str, str]
    start: float


def job_slots(
    parallel: int, *, accelerator: str, devices: int | str | list[int]
) -> list[dict[str, str]]:
    """Returns the environment variables of each of `parallel` jobs that run at the same time.

    Each job gets its own GPUs, or its share of the CPU cores.

    Raises:
        DataError: there are not enough GPUs.
    """
    if parallel == 1:
        return [{}]
    if parallel < 1:
        raise DataError(f"sweep.parallel={parallel}: expected 1 or more jobs at a time")
    gpus = [] if accelerator == "cpu" else visible_gpus()
    if not gpus:
        threads = max(1, available_cores() // parallel)
        return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(threads)}] * parallel
    needed = devices if isinstance(devices, int) and devices > 0 else 1
    share = len(gpus) // parallel
    if share < needed:
        raise DataError(
            f"sweep.parallel={parallel}: {parallel} jobs with {needed} GPUs each, "
            f"but there are {len(gpus)}"
        )
    slots = []
    for start in range(0, share * parallel, share):
        slots.append({"CUDA_VISIBLE_DEVICES": ",".join(gpus[start : start + share])})
    return slots


def visible_gpus() -> list[str]:
    """Returns the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return list(filter(None, visible.split(",")))
    import torch

    return list(map(str, range(torch.cuda.device_count())))


def run_jobs(
    jobs: Sequence[Job],
    slots: Sequence[Mapping[str, str]],
    *,
    metric: str,
    keys: Sequence[str] = (),
) -> None:
    """Runs jobs, as many at a time as there are slots, and prints when each starts and ends.

    A job that fails leaves its error in its folder, and the other jobs continue. An interrupt or
    SIGTERM stops the running jobs, which then count as unfinished. A job whose folder is locked
    still runs since an earlier start of the sweep, which was killed: when that process has ended,
    the job is started and continues from there.

    Args:
        metric: printed when a job has ended.
        keys: printed with their values to name a job.
    """
    waiting, free_slots = list(jobs), list(slots)
    running: list[_Running] = []
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while waiting or running:
            while waiting and free_slots:
                running.append(_start(waiting.pop(0), free_slots.pop(0), keys))
            for entry in list(running):
                if not _has_ended(entry):
                    continue
                running.remove(entry)
                if entry.process is None or is_locked(lock_of(entry.job.folder)):
                    running.append(_start(entry.job, entry.slot, keys))
                    continue
                print(f"{entry.job.name(keys)}: {_finish(entry, metric)}", flush=True)
                free_slots.append(entry.slot)
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGTERM, handler)
        _stop(running)


def _start(job: Job, slot: Mapping[str, str], keys: Sequence[str]) -> _Running:
    """Starts a job, or finds the process of an earlier start that still runs it."""
    job.folder.mkdir(parents=True, exist_ok=True)
    output, lock = job.folder / OUTPUT, lock_of(job.folder)
    if is_locked(lock):
        holder = read_holder(lock)
        number = "of unknown number" if holder is None else holder.process
        print(f"{job.name(keys)}: still runs as process {number}, waiting for its end", flush=True)
        return _Running(job, None, slot, time.perf_counter())
    (job.folder / RESULT).unlink(missing_ok=True)
    environment = {**os.environ, **slot, "PYTHONUNBUFFERED": "1"}
    with output.open("ab") as stream:
        process = subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment
        )
    print(f"{job.name(keys)}: starts, prints to {_relative(output)}", flush=True)
    return _Running(job, process, slot, time.perf_counter())


def _has_ended(entry: _Running) -> bool:
    if entry.process is None:
        return not is_locked(lock_of(entry.job.folder))
    return entry.process.poll() is not None


def _finish(ended: _Running, metric: str) -> str:
    """Saves the result of a job whose process has ended; returns it in words."""
    assert ended.process is not None
    job, status = ended.job, ended.process.returncode
    seconds = time.perf_counter() - ended.start
    error = _error(status, job.folder / OUTPUT) if status else None
    save_result(job.folder, job.overrides, seconds=seconds, error=error)
    score = read_fit_summary(job.folder).scores.get(metric)
    if error is not None:
        outcome = f"failed ({error})"
    elif score is None:
        outcome = "no score"
    else:
        outcome = f"{metric} {score:.4g}"
    return f"{outcome}, {seconds:.0f} s"


def _error(status: int, output: Path) -> str:
    """Why a process failed: its last message, or the signal that ended it."""
    if status < 0:
        cause = " (out of memory?)" if -status == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-status).name}{cause}"
    last_line = last_error = ""
    text = ""
    if output.exists():
        text = output.read_text(encoding="utf-8", errors="replace")
    for line in text.split("\n"):
        if line.strip():
            last_line = line
        if line.startswith("error: "):
            last_error = line.removeprefix("error: ")
    return last_error or last_line or f"exit status {status}"


def _stop(running: Sequence[_Running]) -> None:
    _signal(running, signal.SIGTERM)
    deadline = time.perf_counter() + GRACE_SECONDS
    for entry in running:
        while not _has_ended(entry) and time.perf_counter() < deadline:
            time.sleep(0.1)
    _signal(running, signal.SIGKILL)


def _signal(running: Sequence[_Running], number: signal.Signals) -> None:
    """Sends a signal to the jobs that have not ended; those of another machine get none."""
    for entry in running:
        if _has_ended(entry):
            continue
        if entry.process is not None:
            entry.process.send_signal(number)
            continue
        holder = read_holder(lock_of(entry.job.folder))
        if holder is not None and holder.is_here:
            with suppress(ProcessLookupError):
                os.kill(holder.process, number)


def _relative(path: Path) -> Path:
    """Relative to the current folder if `path` is inside."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
