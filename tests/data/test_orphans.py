"""Workers end with their parent, also if it is killed."""

import os
import subprocess
import sys
import time

import pytest

from qwenvl_lit.data.orphans import end_with_parent

PARENT = """
import multiprocessing, os, signal, sys, time
from qwenvl_lit.data import loading, orphans, survey

def work(delay):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(os.getpid(), flush=True)
    time.sleep(delay)
    {start}
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    context.Process(target=work, args=(float(sys.argv[1]),)).start()
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


@pytest.mark.parametrize("delay", [0, 0.5])
@pytest.mark.parametrize(
    "start",
    [
        "orphans.end_with_parent()",
        "survey._start_worker([], None)",
        "loading.ignore_cluster_signals(0)",
    ],
)
def test_a_worker_ends_after_its_parent_was_killed_also_before_the_worker_began(
    tmp_path, start, delay
):
    program = tmp_path / "parent.py"
    program.write_text(PARENT.format(start=start))
    parent = subprocess.Popen(
        [sys.executable, str(program), str(delay)], stdout=subprocess.PIPE, text=True
    )
    worker = int(parent.stdout.readline())
    if not delay:
        time.sleep(0.3)
        os.kill(worker, 0)
    parent.kill()
    parent.wait()
    ended = ends(worker, seconds=delay + 5)
    if not ended:
        os.kill(worker, 9)
    assert ended


def test_a_process_of_its_own_is_left_alone():
    end_with_parent()
    assert os.getpid()
