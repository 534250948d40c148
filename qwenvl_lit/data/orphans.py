"""Worker processes that end with their parent, however it ends and however it started them."""

from __future__ import annotations

import os
from multiprocessing import parent_process
from threading import Thread

POLL_SECONDS = 1.0


def end_with_parent() -> None:
    """Ends this worker process when its parent has ended.

    A parent that is killed can tell nobody. The kernel closes the pipe between the two, unless
    another process has inherited the parent's end, as later workers do that are forked. A direct
    child also sees that another process has adopted it. (The parent-death signal of Linux would
    come as soon as the thread ends that started the worker.) A process that multiprocessing has
    not started is left alone.
    """
    if parent_process() is not None:
        Thread(target=_watch, name="orphan watch", daemon=True).start()


def parent_pid() -> int:
    """Returns the process that has started this one; a fork server starts it for another."""
    parent = parent_process()
    # The number comes from the parent itself, so that it counts if that has ended already.
    return os.getppid() if parent is None or parent.pid is None else parent.pid


def _watch() -> None:
    parent, pid = parent_process(), parent_pid()
    assert parent is not None
    is_direct = os.getppid() == pid  # not the child of a fork server
    while parent.is_alive() and (os.getppid() == pid or not is_direct):
        parent.join(POLL_SECONDS)
    os._exit(1)
