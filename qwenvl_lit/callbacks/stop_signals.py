"""Signals that ask a run to save and stop."""

from __future__ import annotations

import signal
import threading
from typing import Any

import lightning
import torch

from qwenvl_lit.models.host_copy import HostCopy
from qwenvl_lit.training.strategies import sum_over_ranks

STOPPED = 143  # exit status after SIGTERM or SIGUSR1: 128 + 15, as a shell reports SIGTERM
INTERRUPTED = 130  # exit status after Ctrl-C: 128 + SIGINT


class StopSignals:
    """Records SIGTERM, SIGUSR1 and Ctrl-C, so that a run can finish its step and save.

    Clusters send SIGTERM or SIGUSR1 before they take a machine away. The handlers replace
    Lightning's, which would save and requeue the job by themselves. A second Ctrl-C is not
    recorded: it raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self._received = 0  # the number of the latest signal
        self._ranks_before: HostCopy | None = None  # how many ranks had a signal one step ago

    def listen(self) -> None:
        """Starts to record signals; the Trainer restores the earlier handlers after `fit`.

        Python can set handlers in the main thread only; in other threads nothing is recorded.
        """
        self._received = 0
        self._ranks_before = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                signal.signal(number, self._record)

    def release_ctrl_c(self) -> None:
        """Lets Ctrl-C raise KeyboardInterrupt again."""
        if signal.getsignal(signal.SIGINT) == self._record:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def received(self) -> bool:
        return bool(self._received)

    @property
    def exit_status(self) -> int:
        return INTERRUPTED if self._received == signal.SIGINT else STOPPED

    def received_by_any_rank(self, trainer: lightning.Trainer) -> bool:
        """Returns whether a rank has received a signal, the same on all ranks; call it each step.

        With several ranks the answer is that of the call before, so that no rank synchronizes with
        its device.
        """
        if trainer.world_size == 1:
            return self.received
        received = torch.full((), float(self.received), device=trainer.strategy.root_device)
        ranks_before, self._ranks_before = self._ranks_before, HostCopy(sum_over_ranks(received))
        return ranks_before is not None and bool(ranks_before.read())

    def _record(self, number: int, *_: Any) -> None:
        self._received = number
        if number == signal.SIGINT:
            self.release_ctrl_c()
            print(
                "\nThe run finishes its step and saves; press Ctrl-C again to end it at once.",
                flush=True,
            )
