"""Runs commands of the package in processes of their own, and composes their configs."""

import atexit
import json
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import warm
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from qwenvl_lit.runs.run import config_folder


def command_line(command: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"qwenvl_lit.{command}", *arguments]


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """The environment of a process with one thread, whose caches are in `folder`."""
    isolated = {"QWENVL_LIT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **isolated, **variables}


def run_command(
    folder: Path,
    command: str,
    *arguments: str,
    seconds: float | None = None,
    file_limit: int | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Runs a command in `folder`, whatever its exit status will be.

    The process is forked from one that has imported the package: its start takes no time.

    Args:
        seconds: the time after which it hangs; it is killed and `TimeoutExpired` raised.
        file_limit: the largest file that it can write, in bytes.
        variables: of its environment.
    """
    with TemporaryDirectory() as name:
        files = Path(name) / "stdout", Path(name) / "stderr"
        values = environment(folder, **variables)
        process = warm.context.Process(
            target=_run, args=(folder, command, arguments, files, values, file_limit)
        )
        process.start()
        process.join(seconds)
        status = process.exitcode
        if status is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        stdout, stderr = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    line = command_line(command, *arguments)
    if status is None:
        raise subprocess.TimeoutExpired(line, seconds, stdout, stderr)
    return subprocess.CompletedProcess(line, status, stdout, stderr)


def _run(
    folder: Path,
    command: str,
    arguments: tuple[str, ...],
    files: tuple[Path, Path],
    environment: dict[str, str],
    file_limit: int | None,
) -> None:
    for standard, file in enumerate(files, 1):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, standard)
        os.close(descriptor)
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as in a command that is not forked
    if file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
    sys.argv = [command, *arguments]
    try:
        runpy.run_module(f"qwenvl_lit.{command}", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def run_from_nothing(
    folder: Path, command: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command in `folder` as a user starts it: nothing is imported before."""
    return subprocess.run(
        command_line(command, *arguments),
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
    )


def output_of(folder: Path, command: str, *arguments: str) -> str:
    """Runs a command that must succeed in `folder`; returns what it prints."""
    process = run_command(folder, command, *arguments)
    assert process.returncode == 0, f"{process.args}\n{process.stdout}\n{process.stderr}"
    return process.stdout


def newest_run(folder: Path, command: str) -> Path:
    """The run folder that `command` has written last in `folder`."""
    return max((folder / "outputs" / command).iterdir(), key=lambda path: path.stat().st_mtime)


def only_run(folder: Path, command: str) -> Path:
    """The run folder that `command` has written in `folder`; fails unless there is exactly one."""
    [run] = (folder / "outputs" / command).iterdir()
    return run


def read_json_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


def compose_config(command: str, *overrides: str) -> DictConfig:
    """The config of a command with these Hydra overrides; free text must be quoted."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose(command, list(overrides))


def start_command(
    folder: Path, command: str, *arguments: str, own_group: bool = False, **variables: str
) -> subprocess.Popen[str]:
    """Starts a command in `folder`; its output and its errors come through one pipe.

    Args:
        own_group: the command leads a new process group, which a test can signal.
        variables: of its environment.
    """
    return subprocess.Popen(
        command_line(command, *arguments),
        cwd=folder,
        env=environment(folder, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=own_group,
    )
