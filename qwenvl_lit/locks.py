"""Locks on files that end with the process that holds them, also after SIGKILL.

Another process can see whether a lock is held, and by whom.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

WAIT_SECONDS = 3.0  # for the end of a process that was killed
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some network file systems
_held_handles: set[int] = set()


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """The process that holds a lock, as it wrote itself into the file."""

    process: int
    host: str
    start: str
    command: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} (since {self.start}): {self.command}"

    @property
    def is_here(self) -> bool:
        """Whether the process runs on this machine, where its number means something."""
        return self.host == socket.gethostname()


class ProcessLock:
    """An exclusive lock on `file`, which is created, and removed when the lock is released.

    Forked processes do not inherit the lock, so that a data worker cannot keep it after its parent
    has ended. On file systems without locks, every process acquires it.
    """

    def __init__(self, file: Path):
        self.file = file
        self._handle: int | None = None

    def acquire(self, *, seconds: float = 0.0) -> bool:
        """Takes the lock unless another process, or another lock of this process, holds it.

        Args:
            seconds: how long to wait for it.

        Raises:
            OSError: the file cannot be created.
        """
        deadline = time.monotonic() + seconds
        while not self._acquire():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
        return True

    def _acquire(self) -> bool:
        while True:
            handle = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    os.close(handle)
                    if isinstance(error, BlockingIOError):
                        return False
                    raise
            if _is_file(handle, self.file):
                break
            os.close(handle)  # the earlier holder has removed the file in the meantime
        self._handle = handle
        _held_handles.add(handle)
        os.ftruncate(handle, 0)
        os.write(handle, (json.dumps(asdict(_this_process())) + "\n").encode())
        return True

    def release(self) -> None:
        """Removes the file and releases the lock; does nothing if the lock is not held."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        if handle not in _held_handles:
            return  # in a forked process
        if _is_file(handle, self.file):
            self.file.unlink()
        _held_handles.discard(handle)
        os.close(handle)


def lock_of(folder: Path) -> Path:
    """The file that is locked by the process that writes to the run folder `folder`."""
    return folder / ".lock"


def is_locked(file: Path) -> bool:
    """Whether a living process holds the lock on `file`."""
    try:
        handle = os.open(file, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def read_holder(file: Path) -> Holder | None:
    """Reads who holds the lock on `file`; None if the file does not say."""
    try:
        return Holder(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _this_process() -> Holder:
    return Holder(
        process=os.getpid(),
        host=socket.gethostname(),
        start=time.strftime("%Y-%m-%d %H:%M:%S"),
        command=shlex.join(sys.orig_argv),
    )


def _is_file(handle: int, file: Path) -> bool:
    """Whether `file` still names the file that is open as `handle`."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _close_inherited() -> None:
    for handle in _held_handles:
        os.close(handle)
    _held_handles.clear()


os.register_at_fork(after_in_child=_close_inherited)
