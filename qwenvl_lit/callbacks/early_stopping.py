"""Says why a run was stopped early."""

from __future__ import annotations

import lightning
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason


def why_stopped(trainer: lightning.Trainer) -> str | None:
    """Returns why early stopping has ended the last training; None if it has not."""
    if not trainer.should_stop:
        return None
    for callback in trainer.early_stopping_callbacks:
        if reason := _reason(callback):
            return f"{reason} (callbacks.early_stopping)"
    return None


def _reason(callback: EarlyStopping) -> str | None:
    monitor, best = callback.monitor, f"{float(callback.best_score):.4g}"
    match callback.stopping_reason:
        case EarlyStoppingReason.PATIENCE_EXHAUSTED:
            number = callback.patience
            validations = "validation" if number == 1 else f"{number} validations"
            by = f" by {abs(callback.min_delta):g}" if callback.min_delta else ""
            return f"{monitor} has not improved{by} in the last {validations}; its best is {best}"
        case EarlyStoppingReason.STOPPING_THRESHOLD:
            return f"{monitor} has reached stopping_threshold={callback.stopping_threshold}"
        case EarlyStoppingReason.DIVERGENCE_THRESHOLD:
            return f"{monitor} has passed divergence_threshold={callback.divergence_threshold}"
        case EarlyStoppingReason.NON_FINITE_METRIC:
            return f"{monitor} is not finite; its best was {best}"
    return None
