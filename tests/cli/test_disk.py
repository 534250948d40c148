"""A disk that is full is named, with the setting that chooses another one."""

import errno
import os

import pytest
from commands import environment, run_command
from small_demo import small_demo

from qwenvl_lit.cli import disk
from qwenvl_lit.cli.disk import disk_message


def full(filename: str | None = None) -> OSError:
    names = [] if filename is None else [filename]
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *names)


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("cache/images/a.png", "paths.cache=FOLDER"),
        ("run/metrics.json", "hydra.run.dir=FOLDER"),
        ("elsewhere/a", "choose another path"),
    ],
)
def test_the_file_decides_whose_fault_it_is(tmp_path, file, advice):
    error = full(str(tmp_path / file))
    message = disk_message(error, run=tmp_path / "run", cache=tmp_path / "cache")
    assert message.startswith(f"{tmp_path / file} cannot be written: No space left on device; ")
    assert message.endswith(advice)
    assert message.count("FOLDER") == (advice != "choose another path")


@pytest.mark.parametrize("name", ["run", "cache"])
def test_without_a_file_the_full_disk_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(disk, "_is_full", lambda folder: folder.name == name)
    message = disk_message(full(), run=tmp_path / "run", cache=tmp_path / "cache")
    assert message.startswith(f"{tmp_path / name} cannot be written: ")
    assert message.count("FOLDER") == 1


def test_without_any_evidence_both_folders_are_named(tmp_path):
    message = disk_message(full(), run=tmp_path / "run", cache=tmp_path / "cache")
    assert message.startswith(f"{tmp_path / 'cache'} or {tmp_path / 'run'} cannot be written: ")
    assert message.count("FOLDER") == 2


def test_the_demo_in_a_cache_that_cannot_be_written_names_the_cache(tmp_path):
    (tmp_path / "cache").touch()
    assert environment(tmp_path)["QWENVL_LIT_CACHE"] == str(tmp_path / "cache")
    process = run_command(tmp_path, "train", "trainer=smoke", *small_demo())
    assert process.returncode == 1
    [line] = process.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'cache/demo'} cannot be written: ")
    assert "paths.cache=" in line
    assert "hydra.run.dir" not in line


def test_rows_of_files_are_trained_on_without_a_cache(tmp_path):
    run_command(tmp_path, "check", "data=demo", *small_demo())
    rows = tmp_path / "cache/demo"
    (tmp_path / "readonly").touch()
    process = run_command(
        tmp_path,
        "train",
        "trainer=smoke",
        "data=jsonl",
        f"data.train={rows}/train.jsonl#8",
        f"data.root={rows}",
        "data.validation=2",
        "data.num_workers=0",
        "data.batch_size=2",
        "data.generated_validation_rows=0",
        "~callbacks.curves",
        f"paths.cache={tmp_path}/readonly",
    )
    assert process.returncode == 0, process.stderr
    assert "cannot be written: Not a directory; it will be made again each time" in process.stdout
