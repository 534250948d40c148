"""The progress bar of a terminal."""

from __future__ import annotations

import math
from time import perf_counter

import lightning
from lightning.pytorch.callbacks import RichProgressBar

SHOWN = {
    "train/loss": "loss",
    "train/samples_per_second": "samples/s",
    "val/loss": "val loss",
}  # by the name that it is logged under
EVERY = 1.0  # seconds: to read a number is to wait for the device


class ProgressBar(RichProgressBar):
    """Lightning's bar, whose end is that of the run: where `trainer.max_steps` ends it within an epoch, there.

    Lightning's own counts a whole epoch, or takes steps for batches if `trainer.max_epochs` is -1. It also waits for the device in every
    step, for what is logged "to the bar"; this one looks once a second.
    """

    def __init__(self, **options):
        super().__init__(**options)
        self._looked = -math.inf
        self._numbers: dict[str, float] = {}

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, float]:
        if perf_counter() - self._looked > EVERY:
            self._looked = perf_counter()
            logged = trainer.callback_metrics
            self._numbers = {
                short: round(float(logged[name]), 3)
                for name, short in SHOWN.items()
                if name in logged
            }
        return self._numbers

    @property
    def total_train_batches(self) -> int | float:
        batches = self.trainer.num_training_batches
        if self.trainer.max_steps == -1 or not math.isfinite(batches):
            return batches
        accumulated = self.trainer.accumulate_grad_batches
        before = self.trainer.current_epoch * math.ceil(
            batches / accumulated
        )  # steps; the last one of an epoch may be of fewer batches
        return min(batches, (self.trainer.max_steps - before) * accumulated)

    def _get_train_description(self, current_epoch: int) -> str:
        described = super()._get_train_description(current_epoch)
        return (
            described.replace("/-2", "") if self.trainer.max_epochs == -1 else described
        )  # no last epoch to name
