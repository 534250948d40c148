"""A lock excludes other processes, and ends with its process."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

from qwenvl_lit.locks import ProcessLock, is_locked, read_holder

HOLD = """
import os, sys, time
from pathlib import Path
from qwenvl_lit.locks import ProcessLock
lock = ProcessLock(Path(sys.argv[1]))
lock.acquire()
child = os.fork() if "fork" in sys.argv else 1
if child:
    print(child, flush=True)
time.sleep(60)
"""


def start_holder(*arguments: str) -> tuple[subprocess.Popen, int]:
    """Starts a process that holds a lock; returns it, and the number of its forked process."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, *arguments], stdout=subprocess.PIPE, text=True
    )
    return process, int(process.stdout.readline())


def test_a_lock_is_refused_while_another_process_holds_it_and_ends_with_sigkill(tmp_path):
    file = tmp_path / "lock"
    holder, _ = start_holder(str(file))
    lock = ProcessLock(file)
    try:
        assert not lock.acquire()
        assert is_locked(file)
        written = read_holder(file)
        assert written.process == holder.pid
        assert written.is_here
        assert f"process {holder.pid} on " in str(written)
    finally:
        holder.kill()
        holder.wait()
    assert not is_locked(file)
    assert lock.acquire()
    assert read_holder(file).process == os.getpid()
    lock.release()
    assert not file.exists()
    lock.release()


def test_two_locks_of_one_process_exclude_each_other(tmp_path):
    first, second = ProcessLock(tmp_path / "lock"), ProcessLock(tmp_path / "lock")
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert second.acquire()
    second.release()


def test_a_forked_process_does_not_keep_the_lock_of_its_parent(tmp_path):
    file = tmp_path / "lock"
    holder, forked = start_holder(str(file), "fork")
    holder.kill()
    holder.wait()
    try:
        deadline = time.monotonic() + 5  # for the forked process to begin
        while is_locked(file) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_locked(file)
    finally:
        os.kill(forked, signal.SIGKILL)


def release_and_check(lock) -> None:
    lock.release()
    assert lock.file.exists()


def test_a_forked_process_cannot_release_the_lock_of_its_parent(tmp_path):
    lock = ProcessLock(tmp_path / "lock")
    lock.acquire()
    context = multiprocessing.get_context("fork")
    child = context.Process(target=release_and_check, args=(lock,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert is_locked(lock.file)
    lock.release()


def test_a_file_that_names_no_process_is_not_an_error(tmp_path):
    file = tmp_path / "lock"
    for content in ("", "[1]", '{"process": 1}'):
        file.write_text(content)
        assert read_holder(file) is None
        assert not is_locked(file)
    assert read_holder(tmp_path / "missing") is None
