"""The checkpoints of a run: from the last one it goes on as if it had never stopped."""

from __future__ import annotations

import math
import os
import random
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

from qwenvl_lit.models.host_copy import HostCopy
from qwenvl_lit.training.strategies import summed
from qwenvl_lit.types import Batch, DataError

STOPPED = 143  # exit status of a run that SIGTERM or SIGUSR1 ended: 128 + 15, as a shell says it
INTERRUPTED = 130  # the same of Ctrl-C, SIGINT


class RunCheckpoint(Checkpoint):
    """Keeps `checkpoints/last.ckpt` and `best.ckpt` in the run folder: what is trained, optimizer, schedule, place in the data, random
    numbers of every rank, and the config. Where an adapter is trained, `last_adapter/` and `best_adapter/` have it in peft's format.

    The last one is of every `every`-th optimizer step, where a validation follows after it, and of the end; the best one is of the
    validation with the best `monitor`. A file is complete when it gets its name, so that a good one is there at any moment.

    On SIGTERM or SIGUSR1, as a cluster sends them before it takes a machine away, the run ends its step, or its validation, saves, and
    exits with status 143; where there are several processes they learn of it at the end of the next step. Lightning's own handlers are
    replaced: nobody else saves, or queues the job again. Ctrl-C does the same, with status 130; a second one ends the run at once.

    Random numbers that are drawn between two batches, for loaders and by a validation, do not change those of training.

    Args:
        keep: so many older ones stay too, as `step_STEP.ckpt`.
        monitor, mode: a logged score, and whether its "min" or its "max" is best.

    Raises:
        DataError: a checkpoint cannot be written; the one before it stays.
    """

    def __init__(
        self,
        every: int = 50,
        keep: int = 0,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
    ):
        if every < 1 or keep < 0 or mode not in ("min", "max"):
            raise ValueError(
                f"callbacks.checkpoint: every={every} must be 1 or more, keep={keep} 0 or more, mode={mode!r} min or max"
            )
        self.every = every
        self.keep = keep
        self.monitor = monitor
        self.mode = mode
        self.best_score: float | None = None
        self.folder = Path()
        self._saved_step = 0  # of the last checkpoint
        self._seen_step = 0
        self._due = False
        self._signalled = 0  # the signal that this rank got
        self._stopping = False  # all ranks are
        self._asked: HostCopy | None = (
            None  # whether any rank had got a signal at the end of the step before
        )
        self._random: dict[str, Any] | None = None  # at the end of the last batch
        self._place: tuple[dict[str, Any], dict[str, Any]] | None = (
            None  # loops and random numbers, at the end of the last step
        )
        self._weights: Mapping[str, torch.Tensor] = {}

    @property
    def best_model_path(self) -> str:
        """Empty as long as there is none."""
        return "" if self.best_score is None else str(self.folder / "best.ckpt")

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        self.folder = Path(trainer.default_root_dir, "checkpoints")
        if stage == "fit":
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
            with _writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self._saved_step = self._seen_step = trainer.global_step
        self._due = self._stopping = False
        self._signalled, self._asked = 0, None
        if self._random is None:
            self._random = random_state()
        else:  # a run goes on; its data were opened at their start, to count the steps, before it was known where
            trainer.fit_loop._combined_loader = None
            trainer.fit_loop.setup_data()
        self._place = trainer.fit_loop.state_dict(), self._random
        if (
            threading.current_thread() is threading.main_thread()
        ):  # the trainer puts the old handlers back
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                signal.signal(number, self._note_signal)

    def _note_signal(self, number: int, *_: Any) -> None:
        self._signalled = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # for the second one
            print("\nThe run ends its step and saves; Ctrl-C again ends it at once.", flush=True)

    def teardown(self, *_: Any, **__: Any) -> None:
        if signal.getsignal(signal.SIGINT) == self._note_signal:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    on_exception = teardown

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        assert self._random is not None
        set_random_state(self._random)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self._random = random_state()
        if trainer.global_step == self._seen_step:  # gradients are being accumulated, and not saved
            return
        self._seen_step = trainer.global_step
        self._place = place(trainer), self._random
        self._stopping = self._told_by_now(trainer)
        self._due = self._stopping or self._due or self._seen_step % self.every == 0
        if self._due and not validation_follows(
            trainer
        ):  # else Lightning would pass over the validation
            self._save_last(trainer)

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        score = float(trainer.callback_metrics.get(self.monitor, math.nan))
        best = (
            math.inf
            if self.best_score is None
            else self.best_score
            if self.mode == "min"
            else -self.best_score
        )
        if trainer.strategy.broadcast((score if self.mode == "min" else -score) < best):
            self.best_score = score
            self._save(trainer, "best")
        self._stopping = trainer.strategy.reduce_boolean_decision(bool(self._signalled), all=False)
        if self._stopping or self._due:
            self._save_last(trainer)

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if self._saved_step != trainer.global_step:
            self._save_last(trainer)

    def on_save_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        assert (
            self._place is not None
        )  # that of the last step: what has been accumulated since is not saved
        checkpoint["loops"]["fit_loop"], own = self._place
        checkpoint["random"] = [own]
        if trainer.world_size > 1:
            checkpoint["random"] = [None] * trainer.world_size
            torch.distributed.all_gather_object(checkpoint["random"], own)
        self._weights = checkpoint["state_dict"]

    def on_load_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """
        Raises:
            DataError: the run that stopped had another number of processes.
        """
        if (before := len(checkpoint["random"])) != trainer.world_size:
            raise DataError(
                f"the run that stopped had {before} processes, this one has {trainer.world_size}; go on with as many"
            )
        self._random = checkpoint["random"][trainer.global_rank]

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score = state_dict["best_score"]

    def _told_by_now(self, trainer: lightning.Trainer) -> bool:
        """Whether this process was told to stop; of several, whether any was at the end of the step before, which all learn at once."""
        if trainer.world_size == 1:
            return bool(self._signalled)
        told = torch.full((), float(bool(self._signalled)), device=trainer.strategy.root_device)
        asked, self._asked = self._asked, HostCopy(summed(told))
        return asked is not None and bool(asked.read())

    def _save_last(self, trainer: lightning.Trainer) -> None:
        self._due = False
        self._save(trainer, "last")
        self._saved_step = trainer.global_step
        if self.keep and trainer.is_global_zero:
            with _writing(self.folder):
                self._keep_older(trainer.global_step)
        if self._stopping:
            if trainer.is_global_zero:
                run = trainer.default_root_dir
                print(
                    f"\nStopped by a signal; saved after step {trainer.global_step}. Go on:  python -m qwenvl_lit.train resume={run}"
                )
            status = INTERRUPTED if self._signalled == signal.SIGINT else STOPPED
            raise SystemExit(
                status if trainer.is_global_zero else 0
            )  # Lightning kills rank 0 where another ends with an error

    def _keep_older(self, step: int) -> None:
        name = self.folder / f"step_{step:06d}.ckpt"
        name.unlink(missing_ok=True)
        os.link(self.folder / "last.ckpt", name)  # takes no room until `last` is another file
        for old in sorted(self.folder.glob("step_*.ckpt"))[: -self.keep]:
            old.unlink()

    def _save(self, trainer: lightning.Trainer, name: str) -> None:
        fault = None
        try:
            trainer.save_checkpoint(self.folder / f"{name}.ckpt")
        except DataError as error:  # on the rank that writes; the others wait for it
            fault = str(error)
            trainer.strategy.barrier()
        weights, self._weights = self._weights, {}
        model = getattr(trainer.lightning_module, "model", None)
        if not fault and trainer.is_global_zero and hasattr(model, "peft_config"):
            try:
                save_adapter(model, weights, self.folder / f"{name}_adapter")
            except DataError as error:
                fault = str(error)
        if fault := trainer.strategy.broadcast(fault):
            raise DataError(fault)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint files that are there whole or not at all."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """
        Raises:
            DataError: the file cannot be written; what was there under its name still is.
        """
        path = Path(path)
        unfinished = path.with_name(path.name + ".part")
        with _writing(path):
            try:
                with unfinished.open("wb") as file:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(unfinished, path)
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise
            _write_through(path.parent)


def save_adapter(model: nn.Module, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write the adapter of a `PeftModel` for peft to read; each of its files is there whole or not at all.

    Args:
        weights: a task's state, names beginning with `model.`.

    Raises:
        DataError: the folder cannot be written.
    """
    own = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    unfinished = folder.with_name(folder.name + ".part")
    with _writing(folder):
        model.save_pretrained(unfinished, state_dict=own, save_embedding_layers=False)
        folder.mkdir(exist_ok=True)
        for file in unfinished.iterdir():
            os.replace(file, folder / file.name)
        unfinished.rmdir()


def place(trainer: lightning.Trainer) -> dict[str, Any]:
    """Where the training loops stand at the end of a batch, in a form from which they go on right.

    After the last batch of an epoch that is the start of the next one. Lightning's own states of that moment are good for one kind of
    run only: with `max_steps` the next epoch would go on at the last batch of the old one.
    """
    loops = trainer.fit_loop.state_dict()
    if trainer.is_last_batch:
        for progress in ("total", "current"):
            epochs = loops["epoch_progress"][progress]
            epochs.update(processed=epochs["ready"], completed=epochs["ready"])
        batches = loops["epoch_loop.batch_progress"]
        batches["total"]["completed"] = batches["total"]["ready"]
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1  # as it will be
    return loops


def validation_follows(trainer: lightning.Trainer) -> bool:
    """Whether the trainer validates after the batch that it has just trained on."""
    every_epochs, every_batches = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if not trainer.enable_validation or not every_batches:
        return False
    if every_epochs is None:
        return (trainer.fit_loop.total_batch_idx + 1) % every_batches == 0
    return (trainer.current_epoch + 1) % every_epochs == 0 and (
        trainer.fit_loop.batch_idx + 1
    ) % every_batches == 0


def random_state() -> dict[str, Any]:
    """Where the generators of python, numpy, torch and this process's GPU stand, as plain data and tensors."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the generators back where they were at `random_state()`."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A disk that is full, or not ours to write, is the user's to see to."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(
            error.__context__, KeyboardInterrupt
        ):  # it came while torch wrote, which then complains
            raise error.__context__ from None
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, RuntimeError):
            if "inline_container" not in reason:
                raise
            reason = "the disk is full, or a quota is used up"  # torch says only that it came less far than it wrote
        raise DataError(
            f"{path} cannot be written: {reason}. Make room there or give another folder with hydra.run.dir=...; "
            f"what was saved before is still there, resume=RUN goes on from it"
        ) from error


def _write_through(folder: Path) -> None:
    """The names in `folder` outlive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
