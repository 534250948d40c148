"""The history of a run as json lines, and its final scores as json."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from qwenvl_lit.atomic import write_text
from qwenvl_lit.callbacks.checkpoint import RunCheckpoint
from qwenvl_lit.types import Batch

LOG = "logging.jsonl"
log = logging.getLogger(__name__)
SCORES = "metrics.json"


class RunLog(lightning.Callback):
    """Writes `logging.jsonl` and `metrics.json` to the run folder.

    `logging.jsonl` has a line for the first step, each `log_every_n_steps`-th and the last: step, total, epoch, everything logged as
    `train/NAME` under NAME, learning_rate (that the step was made with; learning_rate_PART where a part has its own), elapsed_s,
    remaining_s and on CUDA memory_gib (the peak of rank 0); and one for each validation: step, epoch, and everything logged as `val/NAME`
    under that name. A resumed run goes on in the file; lines that are younger than its checkpoint are removed. What is not finite is
    null.

    `metrics.json` has `fit`: `last`, the last validation line, and `best`, that of the step which the checkpoint callback judged best,
    with its path; and `test`: every score under its logged name. A verb replaces its own part only.

    Args:
        print_every: where standard output is no terminal, and so without a progress bar, every so many steps are printed.
    """

    def __init__(self, print_every: int = 10):
        self.print_every = print_every
        self._total: int | None = None
        self._first_step = 0
        self._last_step = 0
        self._start = 0.0
        self._elapsed_before = 0.0
        self._learning_rates: dict[str, float] = {}
        self._lines = 0  # in the file
        self._repeated: dict[str, Any] | None = (
            None  # a validation at its end, which a run that was stopped within a step makes again
        )

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        total = trainer.estimated_stepping_batches
        self._total = int(total) if math.isfinite(total) else None
        self._first_step = self._last_step = trainer.global_step
        self._elapsed_before = 0.0
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir, LOG)
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = read_log(path)[: self._lines] if trainer.global_step else []
            self._lines = len(kept)
            self._repeated = kept[-1] if kept and "total" not in kept[-1] else None
            write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
            self._elapsed_before = max(
                (record.get("elapsed_s", 0.0) for record in kept), default=0.0
            )
            self._warn_of_no_validation(trainer)
        self._start = time.perf_counter()

    def _warn_of_no_validation(self, trainer: lightning.Trainer) -> None:
        if not trainer.enable_validation or trainer.check_val_every_n_epoch is not None:
            return
        batches = (
            trainer.num_training_batches * (trainer.max_epochs or 1)
            if (trainer.max_epochs or 1) > 0
            else math.inf
        )
        if self._total is not None:
            batches = min(batches, self._total * trainer.accumulate_grad_batches)
        if batches < trainer.val_check_batch:
            log.warning(
                "this run has %d batches and validates every %d: it will have no validation and no best checkpoint; set "
                "trainer.val_check_interval=%d for one at its end",
                batches,
                trainer.val_check_batch,
                min(batches, trainer.num_training_batches),
            )

    def on_before_optimizer_step(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        groups = optimizer.param_groups  # at the end of the step the schedule has moved on already
        parts = {
            f"learning_rate_{group['part']}": group["lr"] for group in groups if group.get("part")
        }
        self._learning_rates = {"learning_rate": groups[0]["lr"], **parts}

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if step == self._last_step:  # gradients are being accumulated
            return
        edge = self._last_step == 0 or step == self._total
        self._last_step = step
        written = edge or step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]  # set outside the class
        printed = not sys.stdout.isatty() and (edge or step % self.print_every == 0)
        if not trainer.is_global_zero or not (written or printed):
            return
        record = self._training_record(trainer)
        if written:
            self._append(trainer, record)
        if printed:
            print(training_line(record), flush=True)

    def _training_record(self, trainer: lightning.Trainer) -> dict[str, Any]:
        elapsed = time.perf_counter() - self._start
        done = trainer.global_step - self._first_step
        record: dict[str, Any] = {
            "step": trainer.global_step,
            "total": self._total,
            "epoch": trainer.current_epoch,
        }
        record |= {
            name.removeprefix("train/"): value for name, value in _scores(trainer, "train/").items()
        }
        record |= self._learning_rates
        record["elapsed_s"] = round(self._elapsed_before + elapsed, 1)
        record["remaining_s"] = (
            None
            if self._total is None
            else round(elapsed / done * (self._total - trainer.global_step), 1)
        )
        if trainer.strategy.root_device.type == "cuda":
            record["memory_gib"] = round(
                torch.cuda.max_memory_allocated(trainer.strategy.root_device) / 2**30, 2
            )
        return record

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if not trainer.is_global_zero or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        scores = _scores(trainer, "val/")
        record = {"step": trainer.global_step, "epoch": trainer.current_epoch, **scores}
        if record != self._repeated:
            self._append(trainer, record)
        if not sys.stdout.isatty():
            print(
                f"step {trainer.global_step}  "
                + "  ".join(f"{name} {_short(value)}" for name, value in scores.items()),
                flush=True,
            )

    def _append(self, trainer: lightning.Trainer, record: Mapping[str, Any]) -> None:
        with Path(trainer.default_root_dir, LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._lines += 1

    def state_dict(self) -> dict[str, int]:
        return {"lines": self._lines}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._lines = state_dict["lines"]

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.is_global_zero:
            save_scores(trainer.default_root_dir, "fit", _validation_summary(trainer))

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.is_global_zero:
            save_scores(trainer.default_root_dir, "test", _scores(trainer))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a `logging.jsonl`, none if it is not there. A last line that a killed run left unfinished is not among them."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def save_scores(folder: str | Path, part: str, scores: Mapping[str, Any]) -> None:
    """Set one part of the folder's `metrics.json` to `scores`, plain data without nan; its other parts stay."""
    path = Path(folder, SCORES)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_text(path, json.dumps({**before, part: scores}, indent=2) + "\n")


def training_line(record: Mapping[str, Any]) -> str:
    """A training record as a line to read.

    >>> training_line({"step": 50, "total": 400, "loss": 2.71, "learning_rate": 1e-4, "elapsed_s": 10.0, "remaining_s": 70.0})
    'step 50/400  loss 2.71  learning_rate 0.0001  remaining 1:10'
    """
    total = "" if record["total"] is None else f"/{record['total']}"
    shown = ("loss", "accuracy", "grad_norm", "learning_rate", "samples_per_second", "memory_gib")
    fields = [f"{name} {_short(record[name])}" for name in shown if name in record]
    if record["remaining_s"] is not None:
        minutes, seconds = divmod(round(record["remaining_s"]), 60)
        fields.append(f"remaining {minutes}:{seconds:02d}")
    return "  ".join([f"step {record['step']}{total}", *fields])


def _short(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4g}"


def _scores(trainer: lightning.Trainer, prefix: str = "") -> dict[str, float | None]:
    scores = {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith(prefix)
    }
    return {name: value if math.isfinite(value) else None for name, value in scores.items()}


def _validation_summary(trainer: lightning.Trainer) -> dict[str, Any]:
    """The last validation and, where a checkpoint callback watches one of its scores, the best one."""
    records = [
        record
        for record in read_log(Path(trainer.default_root_dir, LOG))
        if any(name.startswith("val/") for name in record)
    ]
    summary: dict[str, Any] = {
        "step": trainer.global_step,
        "last": records[-1] if records else None,
    }
    for keeper in trainer.checkpoint_callbacks:
        if isinstance(keeper, RunCheckpoint | ModelCheckpoint) and (name := keeper.monitor):
            judged = [record for record in records if record.get(name) is not None]
            best = (min if keeper.mode == "min" else max)(judged, key=itemgetter(name), default={})
            summary["best"] = {
                **best,
                "monitor": name,
                "checkpoint": keeper.best_model_path or None,
            }
    return summary
