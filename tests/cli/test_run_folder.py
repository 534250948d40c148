"""A run folder belongs to one process: it is new or named, and locked."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import command_line, environment, read_json_lines, run_command
from small_demo import small_demo

from qwenvl_lit.locks import ProcessLock, lock_of

TRAIN = [
    "trainer=smoke",
    *small_demo(train=8, single=8, validation=3),
    "data.train=train.jsonl#8",
    "data.batch_size=2",
    "data.num_workers=0",
    "data.generated_validation_rows=0",
    "~callbacks.curves",
]


def start(folder: Path, command: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        command_line(command, *arguments),
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def one_time(tmp_path) -> str:
    """An argument that makes all runs start in the same second: a folder of configs."""
    configs = tmp_path / "configs"
    (configs / "experiment").mkdir(parents=True)
    (configs / "experiment/now.yaml").write_text(
        "# @package _global_\nhydra:\n  run:\n    dir: outputs/now\n  sweep:\n    dir: outputs/now\n"
    )
    return f"--config-dir={configs}"


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path, one_time):
    arguments = [one_time, "experiment=now", *TRAIN]
    processes = [start(tmp_path, "train", *arguments, f"seed={seed}") for seed in (1, 2)]
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["now", "now_2"]
    seeds = set()
    for folder in (tmp_path / "outputs").iterdir():
        assert f"{folder.relative_to(tmp_path)} has\n" in "".join(outputs)
        seeds.add((folder / ".hydra/overrides.yaml").read_text().split()[-1])
        rows = read_json_lines(folder / "logging.jsonl")
        assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
        assert not lock_of(folder).exists()
    assert seeds == {"seed=1", "seed=2"}


def test_every_command_has_a_folder_of_its_own(tmp_path, one_time):
    (tmp_path / "outputs/now").mkdir(parents=True)
    arguments = ["model=qwen_vl_tiny", "data=demo", *small_demo()]
    process = run_command(tmp_path, "check", one_time, "+experiment=now", *arguments[1:])
    assert process.returncode == 0, process.stderr
    assert "outputs/now_2/report.html" in process.stdout
    assert list((tmp_path / "outputs/now").iterdir()) == []


def test_a_folder_in_use_is_refused_with_its_process(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    lock = ProcessLock(lock_of(folder))
    assert lock.acquire()
    (folder / "logging.jsonl").write_text("kept")
    process = run_command(tmp_path, "train", *TRAIN, "hydra.run.dir=mine")
    assert process.returncode == 1
    [line] = process.stderr.splitlines()
    assert line.startswith(f"error: mine is used by process {os.getpid()} on ")
    assert line.endswith("wait until it has ended, or choose another folder with hydra.run.dir=")
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "logging.jsonl"]
    lock.release()


def test_a_sweep_in_the_folder_of_another_is_refused(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    lock = ProcessLock(lock_of(folder))
    assert lock.acquire()
    arguments = ["-m", *TRAIN, "hydra.sweep.dir=mine", "seed=1,2"]
    process = run_command(tmp_path, "train", *arguments)
    assert process.returncode == 1
    assert "error: mine is used by process" in process.stderr
    assert [path.name for path in folder.iterdir()] == [".lock"]
    lock.release()


def test_the_folder_of_a_killed_run_is_free(tmp_path):
    first = start(tmp_path, "train", *TRAIN, "trainer.max_steps=-1", "hydra.run.dir=mine")
    deadline = time.monotonic() + 60
    while not lock_of(tmp_path / "mine").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    process = run_command(tmp_path, "train", *TRAIN, "hydra.run.dir=mine", "resume=auto")
    assert process.returncode == 0, process.stderr
    assert not lock_of(tmp_path / "mine").exists()


def test_a_named_folder_that_cannot_be_made_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").touch()
    process = run_command(tmp_path, "train", *TRAIN, "hydra.run.dir=file/mine")
    assert process.returncode == 1
    assert process.stderr.startswith("error: file/mine cannot be written: Not a directory; ")
    assert len(process.stderr.splitlines()) == 1
