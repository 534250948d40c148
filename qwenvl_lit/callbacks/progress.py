"""The progress bar of a terminal."""

from __future__ import annotations

import math

from lightning.pytorch.callbacks import RichProgressBar


class ProgressBar(RichProgressBar):
    """Lightning's bar, whose end is that of the run: where `trainer.max_steps` ends it within an epoch, there.

    Lightning's own counts a whole epoch, or takes steps for batches if `trainer.max_epochs` is -1.
    """

    @property
    def total_train_batches(self) -> int | float:
        batches = self.trainer.num_training_batches
        if self.trainer.max_steps == -1 or not math.isfinite(batches):
            return batches
        accumulated = self.trainer.accumulate_grad_batches
        before = self.trainer.current_epoch * math.ceil(batches / accumulated)  # steps; the last one of an epoch may be of fewer batches
        return min(batches, (self.trainer.max_steps - before) * accumulated)

    def _get_train_description(self, current_epoch: int) -> str:
        described = super()._get_train_description(current_epoch)
        return described.replace("/-2", "") if self.trainer.max_epochs == -1 else described  # no last epoch to name
