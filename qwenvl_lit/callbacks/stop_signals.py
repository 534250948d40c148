"""All ranks of a run agree on whether a signal has asked them to save and stop."""

from __future__ import annotations

import lightning
import torch

from qwenvl_lit.models.host_copy import HostCopy
from qwenvl_lit.stopping import exit_status, signals
from qwenvl_lit.training.strategies import sum_over_ranks


class StopSignals:
    """Records stop signals, so that a run can finish its step and save; see `SignalListener`.

    The handlers replace Lightning's, which would save and requeue the job by themselves.
    """

    def __init__(self) -> None:
        self._ranks_before: HostCopy | None = None  # how many ranks had a signal one step ago

    def listen(self) -> None:
        """Starts to record signals; the Trainer restores the earlier handlers after `fit`."""
        self._ranks_before = None
        signals.record()

    def release(self) -> None:
        """Stops recording: a signal ends the command again."""
        signals.release()

    @property
    def received(self) -> bool:
        return bool(signals.received)

    @property
    def exit_status(self) -> int:
        return exit_status(signals.received)

    def received_by_any_rank(self, trainer: lightning.Trainer) -> bool:
        """Returns the same answer on all ranks: whether any rank has received a signal.

        Call it in each step. With several ranks the answer is that of the call before, so that no
        rank synchronizes with its device.
        """
        if trainer.world_size == 1:
            return self.received
        received = torch.full((), float(self.received), device=trainer.strategy.root_device)
        ranks_before, self._ranks_before = self._ranks_before, HostCopy(sum_over_ranks(received))
        return ranks_before is not None and bool(ranks_before.read())
