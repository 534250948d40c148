"""Worker processes that end with their parent, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import time
from threading import Thread

POLL_SECONDS = 1.0


def end_with_parent() -> None:
    """Ends this worker process when its parent has ended.

    A parent that is killed can tell nobody; the worker sees that another process has adopted it.
    (The parent-death signal of Linux would come as soon as the thread ends that started the
    worker.) A process that multiprocessing has not started is left alone.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        # The number comes from the parent itself, so that it counts if that has ended already.
        Thread(target=_watch, args=(parent.pid,), name="orphan watch", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)
