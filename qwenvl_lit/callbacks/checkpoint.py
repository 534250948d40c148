"""Checkpoints from which a run resumes bit-exactly."""

from __future__ import annotations

import errno
import math
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

from qwenvl_lit import checksums
from qwenvl_lit.atomic import atomic_file, atomic_folder, disk_errors
from qwenvl_lit.bounds import check_number
from qwenvl_lit.callbacks.stop_signals import StopSignals
from qwenvl_lit.data.loop_state import rebuild_train_loader, state_after_batch, validation_follows
from qwenvl_lit.stopping import NOTHING_KEPT, signals
from qwenvl_lit.training.adapters.peft_files import write_peft_folder
from qwenvl_lit.training.rng import rng_state, set_rng_state
from qwenvl_lit.types import Batch, DataError


class RunCheckpoint(Checkpoint):
    """Writes `checkpoints/last.ckpt` and `checkpoints/best.ckpt` in the run folder.

    A checkpoint holds the trained tensors, the states of optimizer, schedule and training loops,
    the RNG states of every rank, and the config. A run with an adapter also has `last_adapter/` and
    `best_adapter/`, in peft's format, unless it started from another checkpoint: its adapter
    belongs to the merged weights, which no folder holds. A file gets its name when it is complete,
    so that a good checkpoint exists at any time.

    `last` is saved every `every` optimizer steps and at the end; if a validation follows that step,
    after the validation. `best` is saved after each validation whose `monitor` is better than all
    before.

    On SIGTERM, SIGUSR1, SIGHUP and Ctrl-C the run finishes its step or its validation, saves, and
    exits with status 130 after Ctrl-C, 129 after SIGHUP and 143 after the others; see
    `StopSignals`. Several ranks stop after the same step, which is one step later than a single
    process would. If a step hangs, the process is ended, see `SignalListener`.

    The RNG state is restored before each training batch. So random numbers that loaders and
    validations draw in between do not affect training.

    Args:
        keep: how many checkpoints before `last` are kept as `step_STEP.ckpt`.
        monitor, mode: a logged score, and whether its "min" or its "max" is best.

    Raises:
        DataError: a checkpoint cannot be written; the one before it is kept.
    """

    def __init__(
        self,
        every: int = 50,
        keep: int = 0,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
    ):
        check_number("callbacks.checkpoint.every", every, least=1, whole=True)
        check_number("callbacks.checkpoint.keep", keep, least=0, whole=True)
        if mode not in ("min", "max"):
            raise ValueError(f"callbacks.checkpoint.mode must be min or max, got {mode!r}")
        if not isinstance(monitor, str):
            raise ValueError(
                f"callbacks.checkpoint.monitor must be the name of a score, got {monitor!r}"
            )
        self.every = every
        self.keep = keep
        self.monitor = monitor
        self.mode = mode
        self.best_score: float | None = None
        self.folder = Path()  # set by `setup`
        self._signals = StopSignals()
        self._stopping = False  # whether all ranks know that the run stops
        self._due = False  # whether `last` must be saved, after the validation if one follows
        self._saved_step = 0  # optimizer step of the last checkpoint
        self._latest_step = 0
        self._rng_state: dict[str, Any] | None = None  # at the end of the last training batch
        self._loop_state: dict[str, Any] = {}  # at the end of the last optimizer step
        self._rng_state_of_step: dict[str, Any] | None = None  # at the same time
        self._saved_tensors: Mapping[str, torch.Tensor] = {}

    @property
    def best_model_path(self) -> str:
        """The path of `best.ckpt`; empty before the first validation."""
        return "" if self.best_score is None else str(self.folder / "best.ckpt")

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        self.folder = Path(trainer.default_root_dir, "checkpoints")
        if stage == "fit":
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
            with _disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self._saved_step = self._latest_step = trainer.global_step
        self._due = self._stopping = False
        is_resuming = self._rng_state is not None
        if self._rng_state is None:
            self._rng_state = rng_state()
        else:
            # Lightning built the loader at position 0 to count the steps. Build it again, to start
            # at the position of the checkpoint.
            rebuild_train_loader(trainer)
        self._loop_state = trainer.fit_loop.state_dict()
        self._rng_state_of_step = self._rng_state
        signals.kept = _saved_line(trainer) if is_resuming else NOTHING_KEPT
        self._signals.listen()

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        assert self._rng_state is not None
        set_rng_state(self._rng_state)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        signals.progress()
        self._rng_state = rng_state()
        if trainer.global_step == self._latest_step:
            return  # no optimizer step was taken, and accumulated gradients are not saved
        self._latest_step = trainer.global_step
        self._loop_state = state_after_batch(trainer)
        self._rng_state_of_step = self._rng_state
        self._stopping = self._signals.received_by_any_rank(trainer)
        self._due = self._stopping or self._due or self._latest_step % self.every == 0
        # If a validation follows, `on_validation_end` saves: Lightning would skip that validation
        # when it resumes from a checkpoint saved now.
        if self._due and not validation_follows(trainer):
            self._save_last(trainer)

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        signals.progress()

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        score = float(trainer.callback_metrics.get(self.monitor, math.nan))
        if trainer.strategy.broadcast(self._is_best(score)):
            self.best_score = score
            self._save(trainer, "best")
        self._stopping = trainer.strategy.reduce_boolean_decision(self._signals.received, all=False)
        if self._stopping or self._due:
            self._save_last(trainer)

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if self._saved_step != trainer.global_step:
            self._save_last(trainer)

    def teardown(self, *_: Any, **__: Any) -> None:
        self._signals.release()

    on_exception = teardown

    def on_save_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        # States after the last optimizer step: gradients accumulated since then are not saved.
        assert self._rng_state_of_step is not None
        checkpoint["loops"]["fit_loop"] = self._loop_state
        checkpoint["random"] = [self._rng_state_of_step] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(checkpoint["random"], self._rng_state_of_step)
        self._saved_tensors = checkpoint["state_dict"]

    def on_load_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Restores the RNG state of this rank.

        Raises:
            DataError: another number of processes wrote the checkpoint.
        """
        processes = len(checkpoint["random"])
        if processes != trainer.world_size:
            raise DataError(
                f"the stopped run had {processes} processes, this one has {trainer.world_size}; "
                f"resume it with {processes}"
            )
        self._rng_state = checkpoint["random"][trainer.global_rank]

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score = state_dict["best_score"]

    def _is_best(self, score: float) -> bool:
        sign = 1 if self.mode == "min" else -1
        if self.best_score is None:
            return sign * score < math.inf  # False for nan
        return sign * score < sign * self.best_score

    def _save_last(self, trainer: lightning.Trainer) -> None:
        self._due = False
        if self.keep and trainer.is_global_zero and trainer.global_step > self._saved_step:
            with _disk_errors(self.folder):
                self._keep_older()
        self._save(trainer, "last")
        self._saved_step = trainer.global_step
        signals.kept = _saved_line(trainer)
        if self._stopping:
            self._exit(trainer)

    def _exit(self, trainer: lightning.Trainer) -> None:
        if not trainer.is_global_zero:
            # Lightning kills rank 0 when another rank ends with an error.
            raise SystemExit(0)
        print(f"\n{signals.line(signals.received)}", file=sys.stderr, flush=True)
        raise SystemExit(self._signals.exit_status)

    def _keep_older(self) -> None:
        """Keeps `last.ckpt` as `step_STEP.ckpt` before it is replaced; deletes the oldest ones."""
        last = self.folder / "last.ckpt"
        if not last.exists():
            return
        path = self.folder / f"step_{self._saved_step:06d}.ckpt"
        path.unlink(missing_ok=True)
        os.link(last, path)
        for old in sorted(self.folder.glob("step_*.ckpt"))[: -self.keep]:
            old.unlink()

    def _save(self, trainer: lightning.Trainer, name: str) -> None:
        """Writes `NAME.ckpt`, and `NAME_adapter` where an adapter is trained.

        Raises:
            DataError: rank 0 cannot write them; raised on all ranks.
        """
        with signals.saving():
            error_message = self._write(trainer, name)
        if error_message:
            raise DataError(error_message)

    def _write(self, trainer: lightning.Trainer, name: str) -> str | None:
        """Does the work of `_save`; returns the error of rank 0, if any, on every rank."""
        error_message = None
        try:
            trainer.save_checkpoint(self.folder / f"{name}.ckpt")
        except DataError as error:
            error_message = str(error)
            # Rank 0 failed before the barrier in `save_checkpoint`, where the other ranks wait.
            trainer.strategy.barrier()
        tensors, self._saved_tensors = self._saved_tensors, {}
        module = trainer.lightning_module
        model = getattr(module, "model", None)
        writes_adapter = hasattr(model, "peft_config") and not module.init
        if not error_message and trainer.is_global_zero and writes_adapter:
            base = ((module.config or {}).get("model") or {}).get("path")
            try:
                save_adapter(model, tensors, self.folder / f"{name}_adapter", base=base)
            except DataError as error:
                error_message = str(error)
        return trainer.strategy.broadcast(error_message)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoint files atomically."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Writes a file that survives a power failure.

        Raises:
            DataError: the file cannot be written; a file of this name is kept as it was.
        """
        path = Path(path)
        with (
            _disk_errors(path),
            atomic_file(path, durable=True) as unfinished,
            # Given a path, torch would store the file's name in the archive.
            unfinished.open("wb") as file,
            checksums.sealed(file) as writer,
        ):
            _torch_save(checkpoint, writer)


def save_adapter(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], folder: Path, *, base: str | None = None
) -> None:
    """Writes the adapter of a `PeftModel` as a folder that peft reads.

    Args:
        tensors: the state of a LightningModule; names begin with `model.`.
        base: the name or folder of the base model.

    Raises:
        DataError: the folder cannot be written.
    """
    state = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    with _disk_errors(folder), atomic_folder(folder) as unfinished:
        write_peft_folder(model, unfinished, state, base=base)
        checksums.write_sums(unfinished)


def _saved_line(trainer: lightning.Trainer) -> str:
    resume = f"python -m qwenvl_lit.train resume={trainer.default_root_dir}"
    return f"Saved after step {trainer.global_step}. Resume:  {resume}"


def _torch_save(checkpoint: dict[str, Any], file: checksums.Writer) -> None:
    """`torch.save` that raises the original error, such as a full disk, instead of torch's."""
    try:
        torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None  # Ctrl-C leaves torch with an incomplete zip archive
        if isinstance(error, RuntimeError) and "inline_container" in str(error):
            # torch hides the error of the disk: it reports only that the archive is too short.
            full = "the disk is full, or a quota is exceeded"
            raise OSError(errno.ENOSPC, full) from error
        raise


def _disk_errors(path: Path) -> AbstractContextManager[None]:
    return disk_errors(
        path,
        "free disk space, or choose another folder with hydra.run.dir=...; "
        "what was saved before is kept, and resume=RUN continues from it",
    )
