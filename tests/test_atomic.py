"""Files and folders appear complete or not at all, also when a process is killed."""

import errno
import multiprocessing
import os
import re
import resource
import signal
import stat
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from qwenvl_lit import build
from qwenvl_lit.atomic import atomic_file, atomic_folder, disk_errors, write_text, write_to_cache
from qwenvl_lit.callbacks.curves import draw_curves
from qwenvl_lit.reports.data import write_findings
from qwenvl_lit.sweep.report import _write_table as write_table
from qwenvl_lit.types import DataError

PROCESSES = multiprocessing.get_context("spawn")


class Interrupted(BaseException):
    """As KeyboardInterrupt, not an `Exception`."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_gets_its_name_at_the_end_of_the_block(tmp_path):
    with atomic_file(tmp_path / "scores.json") as unfinished:
        unfinished.write_text("new")
        assert names(tmp_path) == ["scores.json.part"]
    assert names(tmp_path) == ["scores.json"]
    assert (tmp_path / "scores.json").read_text() == "new"


def test_a_reader_that_has_opened_the_old_file_keeps_its_content(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text("old")
    with path.open() as reader:
        write_text(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


def write_curves(folder: Path) -> None:
    draw_curves([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], folder)


def write_config(folder: Path) -> None:
    build.save_config(OmegaConf.create({"paths": {"run": str(folder)}}))


def write_no_findings(folder: Path) -> None:
    write_findings(SimpleNamespace(sets=[]), folder / "findings.jsonl")


def write_sweep(folder: Path) -> None:
    write_table([], ["a"], ["s"], folder / "sweep.csv")


@pytest.mark.parametrize("write", [write_curves, write_config, write_no_findings, write_sweep])
def test_a_file_of_a_run_folder_has_its_name_only_when_it_is_whole(tmp_path, monkeypatch, write):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path)
    assert names(tmp_path) == []
    write(tmp_path)
    assert names(tmp_path)


@pytest.mark.parametrize("concurrent", [False, True])
@pytest.mark.parametrize("error", [ValueError, Interrupted])
def test_an_error_leaves_the_old_content_and_no_other_file(tmp_path, error, concurrent):
    path = tmp_path / "scores.json"
    path.write_text("old")

    def write_half() -> None:
        with atomic_file(path, concurrent=concurrent) as unfinished:
            unfinished.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["scores.json"]


def test_a_block_that_writes_nothing_is_an_error_and_leaves_the_old_content(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_file(path):
        pass
    assert path.read_text() == "old"


def kill_while_writing(path: Path) -> None:
    with atomic_file(path, durable=True) as unfinished:
        unfinished.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def kill_while_filling(path: Path) -> None:
    with atomic_folder(path) as unfinished:
        (unfinished / "weights").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_leaves_a_part_file_that_the_next_write_replaces(tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_text("old")
    writer = PROCESSES.Process(target=kill_while_writing, args=(path,))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert (tmp_path / "last.ckpt.part").read_text() == "half"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["last.ckpt"]


def write_many(path: Path, letter: str) -> None:
    for _ in range(50):
        write_text(path, letter * 100_000, concurrent=True)


def test_concurrent_writers_do_not_mix_their_contents(tmp_path):
    path = tmp_path / "index.json"
    writers = [PROCESSES.Process(target=write_many, args=(path, letter)) for letter in "ab"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            assert path.read_text() in ("a" * 100_000, "b" * 100_000)
        time.sleep(0.001)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert names(tmp_path) == ["index.json"]


def test_concurrent_unfinished_files_have_names_of_their_own(tmp_path):
    path = tmp_path / "index.json"
    with atomic_file(path, concurrent=True) as first, atomic_file(path, concurrent=True) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first", "the last to finish wins"


def test_a_long_name_has_an_unfinished_file_within_the_limit_of_the_file_system(tmp_path):
    path = tmp_path / ("n" * 255)
    write_text(path, "new", concurrent=True)
    assert path.read_text() == "new"


def test_a_durable_file_is_flushed_before_it_gets_its_name_and_its_folder_after(
    tmp_path, monkeypatch
):
    path, flushed = tmp_path / "last.ckpt", []

    def fsync(handle):
        is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        flushed.append(("folder" if is_folder else "file", path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_file(path, durable=True) as unfinished:
        unfinished.write_text("new")
    assert flushed == [("file", False), ("folder", True)]
    write_text(path, "newer")
    assert len(flushed) == 2, "other files are not flushed"


def test_text_is_utf_8(tmp_path):
    write_text(tmp_path / "name.txt", "\u72d7 \u00e9")
    assert (tmp_path / "name.txt").read_bytes() == "\u72d7 \u00e9".encode()


def test_a_folder_replaces_the_old_one_as_a_whole(tmp_path):
    path = tmp_path / "adapter"
    for name in ("old", "new"):
        with atomic_folder(path) as unfinished:
            assert names(unfinished) == []
            (unfinished / name).write_text(name)
    assert names(path) == ["new"]
    assert names(tmp_path) == ["adapter"]


@pytest.mark.parametrize("error", [ValueError, Interrupted])
def test_an_error_leaves_the_old_folder(tmp_path, error):
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "old").write_text("old")

    def fill_half() -> None:
        with atomic_folder(path) as unfinished:
            (unfinished / "new").write_text("half")
            raise error

    with pytest.raises(error):
        fill_half()
    assert names(path) == ["old"]
    assert names(tmp_path) == ["adapter"]


def killed_while(target, path: Path) -> None:
    writer = PROCESSES.Process(target=target, args=(path,))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL


def kill_while_replacing(path: Path) -> None:
    with atomic_folder(path) as unfinished:
        (unfinished / "config").write_text("new")
        rename = Path.rename

        def rename_once(source: Path, target: Path) -> None:
            rename(source, target)
            os.kill(os.getpid(), signal.SIGKILL)

        Path.rename = rename_once


def test_the_next_write_removes_what_a_killed_process_has_left(tmp_path):
    path = tmp_path / "adapter"
    killed_while(kill_while_filling, path)
    left = names(tmp_path)
    assert [name.rpartition(".")[2] for name in left] == ["lock", "part"]
    assert all(name.startswith(".adapter.") for name in left)
    with atomic_folder(path) as unfinished:
        (unfinished / "config").write_text("new")
    assert names(path) == ["config"]
    assert names(tmp_path) == ["adapter"]


def test_a_folder_that_was_being_replaced_when_the_process_was_killed_comes_back(tmp_path):
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "config").write_text("old")
    killed_while(kill_while_replacing, path)
    assert not path.exists()
    with pytest.raises(ValueError, match="mine"), atomic_folder(path):
        raise ValueError("mine")
    assert (path / "config").read_text() == "old"
    assert names(tmp_path) == ["adapter"]


def test_folders_of_others_are_never_touched(tmp_path):
    others = ["adapter.part", "adapter.old", ".adapter.part", f".adapter.{'0' * 32}.part"]
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    for _ in range(2):
        with atomic_folder(tmp_path / "adapter") as unfinished:
            (unfinished / "config").write_text("new")
    assert names(tmp_path) == sorted(["adapter", *others])
    assert all((tmp_path / name / "mine").exists() for name in others)


def test_two_processes_that_fill_the_same_folder_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "adapter"
    with atomic_folder(path) as first:
        (first / "first").touch()
        with atomic_folder(path) as second:
            (second / "second").touch()
        assert names(path) == ["second"]
        assert names(first) == ["first"]
    assert names(path) == ["first"], "the last to finish wins"
    assert names(tmp_path) == ["adapter"]


def test_a_folder_that_another_process_has_made_meanwhile_is_kept_on_request(tmp_path):
    path = tmp_path / "export"

    def fill() -> None:
        with atomic_folder(path, replace=False) as unfinished:
            (unfinished / "mine").touch()
            path.mkdir()
            (path / "other").touch()

    with pytest.raises(DataError, match="export was made by another process in the meantime"):
        fill()
    assert names(path) == ["other"]
    assert names(tmp_path) == ["export"]


def test_a_cache_file_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "cache").touch()
    file = tmp_path / "cache/indexes/a.npy"
    assert not write_to_cache(file, pytest.fail)
    [warning] = caplog.records
    assert f"{file} cannot be written: Not a directory" in warning.getMessage()
    assert "paths.cache=FOLDER" in warning.getMessage()
    (tmp_path / "cache").unlink()
    assert write_to_cache(file, lambda unfinished: unfinished.write_text("new"))
    assert file.read_text() == "new"


def test_a_full_cache_leaves_no_unfinished_file(tmp_path, caplog):
    def fill(unfinished: Path) -> None:
        unfinished.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert not write_to_cache(tmp_path / "a.npy", fill)
    assert names(tmp_path) == []
    assert "No space left on device" in caplog.text


def test_parents_of_a_folder_are_created(tmp_path):
    with atomic_folder(tmp_path / "run" / "adapter") as unfinished:
        (unfinished / "config").write_text("new")
    assert names(tmp_path / "run" / "adapter") == ["config"]


def test_a_disk_error_names_the_file_and_the_advice(tmp_path):
    path = tmp_path / "last.ckpt"
    full = f"{re.escape(str(path))} cannot be written: No space left on device; free disk space, or"
    with pytest.raises(DataError, match=full), disk_errors(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(DataError, match="cannot be written: quota; buy a disk"),
        disk_errors(path, "buy a disk"),
    ):
        raise OSError("quota")


def test_other_errors_are_not_disk_errors(tmp_path):
    with pytest.raises(ValueError, match="mine"), disk_errors(tmp_path):
        raise ValueError("mine")


def test_a_file_that_grows_too_large_is_a_disk_error_and_the_old_content_stays(tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_text("old")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with (
            pytest.raises(DataError, match="File too large"),
            disk_errors(path),
            atomic_file(path) as unfinished,
        ):
            unfinished.write_bytes(bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["last.ckpt"]


def test_a_folder_that_does_not_exist_is_a_disk_error(tmp_path):
    path = tmp_path / "gone" / "last.ckpt"
    with pytest.raises(DataError, match="No such file or directory"), disk_errors(path):
        write_text(path, "new")
