"""A run folder belongs to one process: it is new or named, and locked."""

import os
import signal
import time

import pytest
from commands import read_json_lines, run_command, start_command
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict
from small_demo import small_demo

from qwenvl_lit.cli.run_folder import ClaimRunFolder
from qwenvl_lit.locks import ProcessLock, is_locked, lock_of
from qwenvl_lit.runs.run import config_folder

TRAIN = [
    "trainer=smoke",
    *small_demo(train=8, single=8, validation=3),
    "data.train=train.jsonl#8",
    "data.batch_size=2",
    "data.num_workers=0",
    "data.generated_validation_rows=0",
    "~callbacks.curves",
]


def compose_hydra(command: str, overrides: list[str]) -> DictConfig:
    """The config of a command with Hydra's own part."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose(command, overrides, return_hydra_config=True)


@pytest.fixture
def one_time(tmp_path) -> str:
    """An argument that makes all runs start in the same second: a folder of configs."""
    configs = tmp_path / "configs"
    (configs / "experiment").mkdir(parents=True)
    (configs / "experiment/now.yaml").write_text(
        "# @package _global_\nhydra:\n  run:\n    dir: outputs/now\n"
    )
    return f"--config-dir={configs}"


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path, one_time):
    arguments = [one_time, "experiment=now", *TRAIN]
    processes = [start_command(tmp_path, "train", *arguments, f"seed={seed}") for seed in (1, 2)]
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
    first = start_command(tmp_path, "train", *TRAIN, "trainer.max_steps=-1", "hydra.run.dir=mine")
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


@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_a_name_that_is_taken_gets_a_suffix(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ClaimRunFolder, "claimed", None)
    for number in range(3):
        config = compose_hydra("train", [])
        with open_dict(config):
            config.hydra[kind].dir = "outputs/${hydra:job.name}/now"
        start_of = ClaimRunFolder()
        getattr(start_of, "on_run_start" if kind == "run" else "on_multirun_start")(config)
        name = "now" if number == 0 else f"now_{number + 1}"
        assert config.hydra[kind].dir == f"outputs/train/{name}"
        assert is_locked(lock_of(tmp_path / "outputs/train" / name))
    if kind == "sweep":
        # Hydra composes each job of a sweep from these overrides.
        assert config.hydra.overrides.hydra == ["hydra.sweep.dir='outputs/train/now_3'"]


def test_other_ranks_neither_make_nor_lock_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    config = compose_hydra("train", [f"hydra.run.dir={tmp_path}/mine"])
    ClaimRunFolder().on_run_start(config)
    assert config.hydra.run.dir == f"{tmp_path}/mine"
    assert not (tmp_path / "mine").exists()


def test_a_run_folder_that_a_config_names_may_be_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = compose_hydra("train", ["hydra.run.dir='~/runs/mine'"])
    claim = ClaimRunFolder()
    claim.on_run_start(config)
    assert config.hydra.run.dir == str(tmp_path / "runs/mine")
    claim.remove_unused()
