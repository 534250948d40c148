"""The progress bar in the terminal."""

from __future__ import annotations

import math
from time import perf_counter
from typing import Any

import lightning
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import ProcessingSpeedColumn
from rich import get_console
from rich.progress import BarColumn

LABELS = {  # logged name -> label on the bar
    "train/loss": "loss",
    "val/loss": "val",
    "train/samples_per_second": "samples/s",
}
BAR_WIDTH = 6  # characters at least
NARROW = 72  # characters of a terminal that has no room for the batches per second
OTHERS_WIDTH = 50  # characters of the epoch, the batches, the times and the speed beside the bar
REFRESH_S = 1.0  # seconds between reads of logged values, because each read synchronizes


class ProgressBar(RichProgressBar):
    """Lightning's progress bar with three corrections.

    - If `trainer.max_steps` ends the run within an epoch, the bar ends at this step. Lightning's
      bar ends at the end of the epoch, and confuses steps and batches if `trainer.max_epochs=-1`.
    - Logged values are read once per second. Lightning's bar reads them in every step, and
      synchronizes to do so.
    - The bar has one line. Lightning's bar breaks the logged values in a terminal of 80 characters;
      here the last values are left out if they do not fit.
    """

    def __init__(self, *, leave: bool = False, **options: Any):
        super().__init__(leave=leave, **options)
        self._last_refresh = -math.inf
        self._values: dict[str, str] = {}

    def configure_columns(self, trainer: lightning.Trainer) -> list[Any]:
        width = get_console().width
        free = width - OTHERS_WIDTH - _values_width()
        columns: list[Any] = []
        for column in super().configure_columns(trainer):
            if isinstance(column, BarColumn):
                column.bar_width = max(1, min(column.bar_width or free, free))
            if width >= NARROW or not isinstance(column, ProcessingSpeedColumn):
                columns.append(column)
        return columns

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, Any]:
        if perf_counter() - self._last_refresh > REFRESH_S:
            self._last_refresh = perf_counter()
            self._values = {}
            for name, label in LABELS.items():
                if name in trainer.callback_metrics:
                    self._values[label] = f"{float(trainer.callback_metrics[name]):.4g}"
            self._values = _fitting(self._values)
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


def _values_width() -> int:
    """Returns how many characters the logged values may have."""
    return min(42, get_console().width - OTHERS_WIDTH - BAR_WIDTH)


def _fitting(values: dict[str, str]) -> dict[str, str]:
    """Returns the first of the values, and those after it that fit beside the bar."""
    fitting: dict[str, str] = {}
    length = -1
    for label, value in values.items():
        length += len(f" {label}: {value}")
        if fitting and length > _values_width():
            break
        fitting[label] = value
    return fitting
