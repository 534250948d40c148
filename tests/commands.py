"""Runs commands of the package in processes of their own, and composes their configs."""

import json
import os
import subprocess
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from qwenvl_lit.runs.run import config_folder


def command_line(command: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"qwenvl_lit.{command}", *arguments]


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """The environment of a process with one thread, whose caches are in `folder`."""
    isolated = {"QWENVL_LIT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **isolated, **variables}


def run_command(folder: Path, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in `folder`, whatever its exit status will be."""
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
