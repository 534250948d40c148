"""Signals that stop a command: Ctrl-C, SIGTERM, SIGHUP and SIGUSR1.

Clusters send SIGTERM or SIGUSR1 before they take a machine away; a terminal sends SIGHUP when it
closes. Nothing here imports torch.
"""

from __future__ import annotations

import math
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
STOPPED = 143  # exit status after SIGTERM or SIGUSR1: 128 + 15, as a shell reports SIGTERM
INTERRUPTED = 130  # exit status after Ctrl-C: 128 + SIGINT
HUNG_UP = 129  # exit status after SIGHUP: 128 + 1
GRACE_SECONDS = 20.0  # for a step, or for the end of a command, after a signal
# A rank whose parent has ended waits this long, so that it can report the lost rank.
PARENT_SECONDS = 3.0
NOTHING_KEPT = "Nothing was saved."


class Stopped(SystemExit):
    """A signal ends the command."""

    def __init__(self, number: int):
        super().__init__(exit_status(number))
        self.number = number


def exit_status(number: int) -> int:
    """Returns the exit status of a command that the signal `number` ended."""
    return {signal.SIGINT: INTERRUPTED, signal.SIGHUP: HUNG_UP}.get(number, STOPPED)


def is_first_rank() -> bool:
    """Returns whether this process is the one that prints."""
    ranks = [os.environ.get(name, "0") for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK")]
    node = os.environ.get("NODE_RANK", "0")
    return all(rank == "0" for rank in (*ranks, node))


class SignalListener:
    """Receives the stop signals of this process.

    Usually a signal raises `Stopped` where the main thread is. Between `record` and `release` it is
    only recorded in `received`, so that a run finishes its step and saves. In both cases a watcher
    thread ends the process if it neither ends nor makes progress within `GRACE_SECONDS`. Python
    runs no signal handler while the main thread waits in a collective whose peer has ended.

    Attributes:
        received: the first signal that the main thread has seen.
        arrived: the first signal that has reached the process, whatever its main thread does.
        kept: a sentence that says what was saved, and how to continue from there.
    """

    def __init__(self) -> None:
        self.received = 0
        self.arrived = 0
        self.kept = NOTHING_KEPT
        self._records = False
        self._raises: frozenset[int] = frozenset()  # signals that raise `Stopped`
        self._deadline = math.inf
        self._saves = False
        self._slowest = 0.0  # seconds between two calls of `progress`
        self._latest_progress = 0.0
        self._parent: int | None = None  # of a rank that another process has started
        self._wake: tuple[socket.socket, socket.socket] | None = None

    def install(self, *, ctrl_c: bool = True) -> None:
        """Lets stop signals raise `Stopped`.

        Signals that were ignored at start stay ignored, as with `nohup`.

        Args:
            ctrl_c: False leaves Ctrl-C a KeyboardInterrupt.
        """
        if threading.current_thread() is not threading.main_thread():
            return  # Python sets handlers in the main thread only
        numbers = set(STOP_SIGNALS)
        if not ctrl_c:
            numbers.remove(signal.SIGINT)
        self._raises = frozenset(n for n in numbers if signal.getsignal(n) != signal.SIG_IGN)
        if "LOCAL_RANK" in os.environ:
            self._parent = os.getppid()
        self._start()
        self.admit()  # of a rank: what has reached it while it started

    def hold_back(self) -> None:
        """Lets processes that are started until `admit` begin with stop signals held back.

        A rank would be killed by a signal before it has reached `install`, and Lightning kills
        rank 0 when another rank has ended with an error. Here a thread still receives the signals.
        """
        if self._wake is not None and threading.current_thread() is threading.main_thread():
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def admit(self) -> None:
        """Ends `hold_back`, in this process or in the one that has started it."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def ignore(self) -> None:
        """Ignores stop signals from now on, also while the interpreter exits."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def reinstall(self) -> None:
        """Sets the handlers again, replacing the handlers that Lightning built on top of them."""
        if self._raises and threading.current_thread() is threading.main_thread():
            self._start()

    def record(self) -> None:
        """Only records stop signals until `release`. A second Ctrl-C raises `Stopped`."""
        self.received = self.arrived = 0
        self._deadline = math.inf
        self._slowest = 0.0
        self._latest_progress = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            self._records = True
            self._start()

    def release(self) -> None:
        """Ends `record`."""
        if not self._records:
            return
        self._records = False
        if not self._raises:  # outside a command: the caller's handlers decide
            self._deadline = math.inf
            if signal.getsignal(signal.SIGINT) == self._handle:
                signal.signal(signal.SIGINT, signal.default_int_handler)

    def progress(self) -> None:
        """Call after each batch.

        After a signal, each batch gets its own grace time: `GRACE_SECONDS`, or twice the slowest
        batch so far if that is longer.
        """
        now = time.monotonic()
        self._slowest = max(self._slowest, now - self._latest_progress)
        self._latest_progress = now
        if self._deadline < math.inf:
            self._deadline = now + self._grace

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Gives the block, which writes a checkpoint, as much time as it needs."""
        self._saves = True
        try:
            yield
        finally:
            self._saves = False
            self._latest_progress = time.monotonic()
            if self._deadline < math.inf:
                self._deadline = self._latest_progress + self._grace

    def line(self, number: int, reason: str = "") -> str:
        """Returns what is printed when the signal `number` has ended the command.

        0 stands for a signal that only another rank has received.
        """
        if not number:
            name = "a signal to another rank"
        elif number == signal.SIGINT:
            name = "Ctrl-C"
        else:
            name = signal.Signals(number).name
        return f"Stopped by {name}{reason}. {self.kept}"

    def end(self, message: str, status: int) -> NoReturn:
        """Ends this process at once, from any thread; the first rank prints `message`."""
        # The main thread may hold the lock of standard output
        flushing = threading.Thread(target=sys.stdout.flush, daemon=True)
        flushing.start()
        flushing.join(1.0)
        if message:
            os.write(2, f"\n{message}\n".encode())
        os._exit(status)

    @property
    def _listened(self) -> frozenset[int]:
        if self._records:
            return frozenset(STOP_SIGNALS)
        return self._raises

    @property
    def _grace(self) -> float:
        return max(GRACE_SECONDS, 2 * self._slowest)

    def _start(self) -> None:
        if self._wake is None:
            self._wake = socket.socketpair()
            for end in self._wake:
                end.setblocking(False)
            os.register_at_fork(after_in_child=self._leave_to_parent)
            threading.Thread(target=self._watch, daemon=True, name="stop signals").start()
        signal.set_wakeup_fd(self._wake[1].fileno(), warn_on_full_buffer=False)
        for number in self._listened:
            signal.signal(number, self._handle)

    def _handle(self, number: int, *_: object) -> None:
        """Python's signal handler; runs in the main thread."""
        is_repeated = bool(self.received)
        self.received = self.received or number
        if number == signal.SIGINT and is_repeated:
            raise Stopped(number)
        if self._records:
            if number == signal.SIGINT and is_first_rank():
                print(
                    "\nThe run finishes its step and saves; press Ctrl-C again to end it at once.",
                    flush=True,
                )
        elif not is_repeated:  # launchers and clusters repeat a signal; it must not stop the end
            raise Stopped(number)

    def _watch(self) -> None:
        """Ends the process when a signal has been received and nothing happens any more."""
        assert self._wake is not None
        while True:
            if select.select([self._wake[0]], [], [], 0.5)[0]:
                for number in self._wake[0].recv(64):
                    if number not in self._listened:
                        continue
                    if self._deadline == math.inf:
                        self.arrived, self._deadline = number, time.monotonic() + self._grace
                    elif number == signal.SIGINT:
                        self._deadline = min(self._deadline, time.monotonic() + GRACE_SECONDS / 4)
            if time.monotonic() > self._deadline and not self._saves:
                reason = f"; it did not end by itself within {self._grace:.0f} s"
                self.end_after_signal(self.arrived, reason)
            if self._parent not in (None, os.getppid()):
                time.sleep(PARENT_SECONDS)
                self.end("", 1)

    def end_after_signal(self, number: int, reason: str = "") -> NoReturn:
        """Ends the process as the signal `number` would, with one line."""
        if is_first_rank():
            self.end(self.line(number, reason), exit_status(number))
        self.end("", 0)  # Lightning kills rank 0 when another rank ends with an error

    def _leave_to_parent(self) -> None:
        """In a forked process, signals to the whole group are handled by the parent."""
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            if signal.getsignal(number) == self._handle:
                is_term = number == signal.SIGTERM
                signal.signal(number, signal.SIG_DFL if is_term else signal.SIG_IGN)


signals = SignalListener()  # a process has one set of handlers
