"""The progress bar in the terminal."""

from __future__ import annotations

import math
from time import perf_counter
from typing import Any

import lightning
from lightning.pytorch.callbacks import RichProgressBar

LABELS = {  # logged name -> label on the bar
    "train/loss": "loss",
    "train/samples_per_second": "samples/s",
    "val/loss": "val loss",
}
REFRESH_S = 1.0  # seconds between reads of logged values, because each read synchronizes


class ProgressBar(RichProgressBar):
    """Lightning's progress bar with two corrections.

    - If `trainer.max_steps` ends the run within an epoch, the bar ends at this step. Lightning's
      bar ends at the end of the epoch, and confuses steps and batches if `trainer.max_epochs=-1`.
    - Logged values are read once per second. Lightning's bar reads them in every step, and
      synchronizes to do so.
    """

    def __init__(self, *, leave: bool = False, **options: Any):
        super().__init__(leave=leave, **options)
        self._last_refresh = -math.inf
        self._values: dict[str, float] = {}

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, float]:
        if perf_counter() - self._last_refresh > REFRESH_S:
            self._last_refresh = perf_counter()
            self._values = {}
            for name, label in LABELS.items():
                if name in trainer.callback_metrics:
                    self._values[label] = round(float(trainer.callback_metrics[name]), 3)
        return self._values

    @property
    def total_train_batches(self) -> int | float:
        batches = self.trainer.num_training_batches
        if self.trainer.max_steps == -1 or not math.isfinite(batches):
            return batches
        accumulated = self.trainer.accumulate_grad_batches
        steps_per_epoch = math.ceil(batches / accumulated)
        steps_left = self.trainer.max_steps - self.trainer.current_epoch * steps_per_epoch
        return min(batches, steps_left * accumulated)

    def _get_train_description(self, current_epoch: int) -> str:
        """Removes the "/-2" of Lightning's "Epoch 0/-2" if the run has no last epoch.

        Lightning has no public method for this. `test_progress.py` fails if Lightning renames this
        one.
        """
        description = super()._get_train_description(current_epoch)
        return description.replace("/-2", "") if self.trainer.max_epochs == -1 else description
