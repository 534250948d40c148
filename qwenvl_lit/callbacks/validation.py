"""Decides after which optimizer steps a run validates."""

from __future__ import annotations

import math
import sys
from typing import Any

import lightning

from qwenvl_lit.settings import check_settings
from qwenvl_lit.types import Batch

NEVER = sys.maxsize  # batches


class ValidationSchedule(lightning.Callback):
    """Lets the trainer validate every so many optimizer steps, and always after the last one.

    Lightning counts batches, which differ from optimizer steps with gradient accumulation. The
    trainer must be built with `trainer_options`.

    Args:
        every: a whole number of optimizer steps, or a number of epochs with a decimal point (0.25:
            four times per epoch). None validates at the end only.
        batches: Lightning's `val_check_interval`, which replaces `every`: a number of batches, a
            share of the batches of an epoch, or a time DD:HH:MM:SS.
    """

    def __init__(self, every: int | float | None, batches: int | float | str | None = None):
        check_settings("trainer", {"validate_every": every})
        self.every = every
        self.batches = batches
        self._last_step = 0
        self._total_steps = math.inf
        self._interval = math.inf  # in optimizer steps

    @property
    def trainer_options(self) -> dict[str, Any]:
        """The arguments of the trainer that this callback needs."""
        if self.batches is None:
            return {"val_check_interval": 1, "check_val_every_n_epoch": None}
        share = isinstance(self.batches, float)
        every_epochs = 1 if share else None
        return {"val_check_interval": self.batches, "check_val_every_n_epoch": every_epochs}

    def __str__(self) -> str:
        """Says when the run validates."""
        if isinstance(self.batches, float):
            return f"every {self.batches:g} of an epoch's batches and at the end"
        if self.batches is not None:
            unit = "batches" if isinstance(self.batches, int) else "(days:hours:minutes:seconds)"
            return f"every {self.batches} {unit} and at the end"
        if self.every is None:
            return "at the end"
        unit = "epochs" if isinstance(self.every, float) else "optimizer steps"
        return f"every {self.every:g} {unit} and at the end"

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self._last_step = trainer.global_step
        self._total_steps = trainer.estimated_stepping_batches
        self._interval = math.inf if self.every is None else self.every
        if isinstance(self.every, float):
            accumulated = trainer.accumulate_grad_batches
            self._interval *= math.ceil(trainer.num_training_batches / accumulated)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        is_new, self._last_step = step != self._last_step, step
        if is_new and step == self._total_steps:
            self._validate_now(trainer)
        elif self.batches is None:
            due = is_new and is_due(step, self._interval)
            trainer.val_check_batch = 1 if due else NEVER

    def _validate_now(self, trainer: lightning.Trainer) -> None:
        if trainer.val_check_batch is None:  # validates by time, except before it stops
            trainer.should_stop = True
        trainer.val_check_batch = 1
        trainer.check_val_every_n_epoch = None


def is_due(step: int, interval: float) -> bool:
    """Returns whether `step` is a multiple of `interval`, rounded to whole steps.

    >>> [step for step in range(1, 8) if is_due(step, 7 / 4)]
    [2, 4, 5, 7]
    """
    if interval <= 1 or math.isinf(interval):
        return interval <= 1
    return step == round(max(1, round(step / interval)) * interval)
