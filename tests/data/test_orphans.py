"""Workers end with their parent, also if it is killed."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from qwenvl_lit.data.orphans import end_with_parent

PARENT = """
import multiprocessing, os, signal, sys, time
from qwenvl_lit.data import {module}

def work(delay):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(os.getpid(), flush=True)
    time.sleep(delay)
    {module}.{start}
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.set_start_method("{method}")
    worker = multiprocessing.Process(target=work, args=(float(sys.argv[1]),))
    worker.start()
    signal.signal(signal.SIGUSR1, lambda *_: worker.terminate())
    time.sleep(600)
"""


def ends(process: int, *, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


STARTS = {
    "orphans": "end_with_parent()",
    "survey": "_start_worker([], None)",
    "loading": "ignore_cluster_signals(0)",
}


@pytest.fixture
def start_worker(tmp_path):
    """Starts a process that starts a worker; returns both, the worker as its number."""
    numbers = []

    def start(method: str, module: str, delay: float = 0.0) -> tuple[subprocess.Popen, int]:
        program = tmp_path / "parent.py"
        program.write_text(PARENT.format(start=STARTS[module], module=module, method=method))
        parent = subprocess.Popen(
            [sys.executable, str(program), str(delay)], stdout=subprocess.PIPE, text=True
        )
        numbers.append(parent.pid)
        numbers.append(int(parent.stdout.readline()))
        return parent, numbers[-1]

    yield start
    for number in numbers:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


@pytest.mark.parametrize("delay", [0, 0.5])
@pytest.mark.parametrize(
    ("method", "module"),
    [
        ("fork", "orphans"),
        ("fork", "survey"),
        ("fork", "loading"),
        ("spawn", "orphans"),
        ("forkserver", "orphans"),
    ],
)
def test_a_worker_ends_after_its_parent_was_killed_also_before_the_worker_began(
    start_worker, method, module, delay
):
    parent, worker = start_worker(method, module, delay)
    if not delay:
        assert not ends(worker, seconds=1.5)
    parent.kill()
    parent.wait()
    assert ends(worker, seconds=delay + 5)


def test_a_worker_of_a_fork_server_obeys_the_process_that_it_works_for(start_worker):
    """As `DataLoader` does with a worker that does not end."""
    parent, worker = start_worker("forkserver", "loading")
    time.sleep(0.5)
    os.kill(worker, signal.SIGTERM)
    assert not ends(worker, seconds=0.5)
    parent.send_signal(signal.SIGUSR1)
    assert ends(worker, seconds=5)


def test_a_process_of_its_own_is_left_alone():
    end_with_parent()
    assert os.getpid()
