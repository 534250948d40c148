"""Where Lightning's training loop stands, and how a checkpoint records it.

Lightning has no public way to read or rewrite the progress of its loops, which a resumed run needs.
All that this package uses of it is here; `tests/data/test_loop_state.py` fails when a version of
Lightning changes it.
"""

from __future__ import annotations

import math
from typing import Any

import lightning


def data_position(trainer: lightning.Trainer) -> tuple[int, int]:
    """Returns the epoch that begins or resumes now, and the batches of it that are done.

    The numbers come from Lightning's progress counters, which a checkpoint restores. A batch is
    done when its optimizer step has been made. With `overfit_batches` every epoch is epoch 0.
    """
    fit_loop = trainer.fit_loop
    epochs = fit_loop.epoch_progress.current
    batches_done = 0
    if fit_loop.restarting and epochs.ready != epochs.processed:  # within an epoch
        batches_done = fit_loop.epoch_loop.batch_progress.current.processed
    return 0 if trainer.overfit_batches else epochs.processed, batches_done


def optimizer_steps(trainer: lightning.Trainer, batches: int) -> float:
    """Returns the number of optimizer steps of a run; inf if neither steps nor epochs limit it.

    Lightning's own `estimated_stepping_batches` starts the data workers, which then miss what is
    set up later.

    Args:
        batches: batches per rank and epoch, before `limit_train_batches`.
    """
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    steps = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        return steps
    steps_per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
    return min(steps, steps_per_epoch * max(1, trainer.max_epochs))


def state_after_batch(trainer: lightning.Trainer) -> dict[str, Any]:
    """Returns the state of the training loops at the end of a batch, to resume after this batch.

    After the last batch of an epoch, that is the state at the start of the next epoch. Lightning's
    own state at this moment would resume correctly for some kinds of runs only: with `max_steps`,
    the next epoch would begin with the last batch of the old one.
    """
    state = trainer.fit_loop.state_dict()
    if not trainer.is_last_batch:
        return state
    for progress in ("total", "current"):
        epochs = state["epoch_progress"][progress]
        epochs.update(processed=epochs["ready"], completed=epochs["ready"])
    batches = state["epoch_loop.batch_progress"]
    batches["total"]["completed"] = batches["total"]["ready"]
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False
    state["epoch_loop.state_dict"]["_batches_that_stepped"] += 1  # as Lightning does after hooks
    return state


def rebuild_train_loader(trainer: lightning.Trainer) -> None:
    """Builds the training loader again, so that its iterator starts at `data_position`.

    Lightning builds the loader, to count the steps, before it restores the counters.
    """
    trainer.fit_loop._combined_loader = None
    trainer.fit_loop.setup_data()


def validation_follows(trainer: lightning.Trainer) -> bool:
    """Returns whether the trainer validates after the batch that it has just trained on."""
    every_epochs, every_batches = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if not trainer.enable_validation or not every_batches:
        return False
    if every_epochs is None:
        return (trainer.fit_loop.total_batch_idx + 1) % every_batches == 0
    epoch_validates = (trainer.current_epoch + 1) % every_epochs == 0
    return epoch_validates and (trainer.fit_loop.batch_idx + 1) % every_batches == 0
