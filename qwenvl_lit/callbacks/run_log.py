"""The history of a run as lines of JSON, and its final scores as JSON."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from qwenvl_lit.atomic import set_aside, write_text
from qwenvl_lit.bounds import check_number
from qwenvl_lit.callbacks.checkpoint import RunCheckpoint
from qwenvl_lit.data.json_lines import append_json_lines, read_json_lines
from qwenvl_lit.metrics.summary import SCORES_FILE, scores_to_update
from qwenvl_lit.types import Batch, DataError

LOG = "logging.jsonl"
PRINTED = ("loss", "accuracy", "grad_norm", "learning_rate", "samples_per_second", "memory_gib")

log = logging.getLogger(__name__)


class RunLog(lightning.Callback):
    """Writes `logging.jsonl` and `metrics.json` to the run folder.

    `logging.jsonl` has a line for the first step, for each `log_every_n_steps`-th and for the last:

    - `step`, `total` (steps of the run), `epoch`
    - NAME for everything logged as `train/NAME`
    - `learning_rate` of the step; `learning_rate_COMPONENT` for a component with its own
    - `elapsed_s`, `remaining_s`
    - on CUDA `memory_gib`, the peak of rank 0

    and a line for each validation: `step`, `epoch`, and everything logged as `val/NAME` under that
    name. A resumed run appends to the file, after removing the lines written after its checkpoint.
    Values that are not finite are null.

    `metrics.json` has the final scores. `fit` holds `last`, the last validation line, and `best`,
    the line of the step that the checkpoint callback kept as the best, with the checkpoint's path.
    `test` holds every score under its logged name. Each command replaces its own part only.

    Args:
        print_every: number of steps between printed lines; none are printed on a terminal, which
            shows a progress bar.
    """

    def __init__(self, print_every: int = 10):
        check_number("callbacks.run_log.print_every", print_every, least=1, whole=True)
        self.print_every = print_every
        self._total_steps: int | None = None
        self._first_step = 0
        self._last_step = 0
        self._start = 0.0
        self._elapsed_before = 0.0  # seconds, in earlier runs of this folder
        self._learning_rates: dict[str, float] = {}
        self._monitors_checked = False
        self._lines = 0  # in the file
        # The last validation, which a run that stopped within a step repeats when it resumes.
        self._repeated: dict[str, Any] | None = None

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        total_steps = trainer.estimated_stepping_batches
        self._total_steps = int(total_steps) if math.isfinite(total_steps) else None
        self._first_step = self._last_step = trainer.global_step
        self._elapsed_before = 0.0
        if trainer.is_global_zero:
            self._open_log(trainer)
            self._warn_of_interval(trainer)
        self._start = time.perf_counter()

    def _warn_of_interval(self, trainer: lightning.Trainer) -> None:
        """Warns if loggers receive no training values, since they have no first and last step."""
        steps, interval = self._total_steps, trainer.log_every_n_steps
        if trainer.loggers and steps is not None and steps < interval:
            log.warning(
                "the run has %d optimizer step%s and trainer.log_every_n_steps=%d: %s has the "
                "first and the last step only, and loggers have none; to log each step: "
                "trainer.log_every_n_steps=1",
                *(steps, "s" * (steps != 1), interval, LOG),
            )

    def on_before_optimizer_step(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        # Read before the step: at its end the schedule has set those of the next step.
        groups = optimizer.param_groups
        self._learning_rates = {"learning_rate": groups[0]["lr"]}
        for group in groups:
            if group.get("component"):
                self._learning_rates[f"learning_rate_{group['component']}"] = group["lr"]

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
        is_first_or_last = self._last_step == 0 or step == self._total_steps
        self._last_step = step
        writes = is_first_or_last or step % trainer.log_every_n_steps == 0
        prints = is_first_or_last or step % self.print_every == 0
        prints = prints and not sys.stdout.isatty()
        if not trainer.is_global_zero or not (writes or prints):
            return
        record = self._training_record(trainer)
        if writes:
            self._append(trainer, record)
        if prints:
            print(training_line(record), flush=True)

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if not self._monitors_checked:  # after the first validation
            self._monitors_checked = True
            _check_monitors(trainer)
        if not trainer.is_global_zero:
            return
        scores = _scores(trainer, "val/")
        record = {"step": trainer.global_step, "epoch": trainer.current_epoch, **scores}
        if record != self._repeated:
            self._append(trainer, record)
        if not sys.stdout.isatty():
            fields = [f"{name} {_short(value)}" for name, value in scores.items()]
            print(f"step {trainer.global_step}  " + "  ".join(fields), flush=True)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.is_global_zero:
            save_scores(trainer.default_root_dir, "fit", _validation_summary(trainer))

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.is_global_zero:
            save_scores(trainer.default_root_dir, "test", _scores(trainer))

    def state_dict(self) -> dict[str, int]:
        return {"lines": self._lines}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._lines = state_dict["lines"]

    def _open_log(self, trainer: lightning.Trainer) -> None:
        """Keeps the lines from before the checkpoint of a resumed run, and no other lines."""
        path = Path(trainer.default_root_dir, LOG)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if trainer.global_step:
            kept = read_log(path)[: self._lines]
            if path.exists() and len(kept) < self._lines:
                log.warning("the damaged %s is now %s", path, set_aside(path))
        self._lines = len(kept)
        self._repeated = None
        if kept and "total" not in kept[-1]:
            self._repeated = kept[-1]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        elapsed = [record.get("elapsed_s", 0.0) for record in kept]
        self._elapsed_before = max(elapsed, default=0.0)

    def _training_record(self, trainer: lightning.Trainer) -> dict[str, Any]:
        elapsed = time.perf_counter() - self._start
        record: dict[str, Any] = {
            "step": trainer.global_step,
            "total": self._total_steps,
            "epoch": trainer.current_epoch,
        }
        for name, value in _scores(trainer, "train/").items():
            record[name.removeprefix("train/")] = value
        record |= self._learning_rates
        record["elapsed_s"] = round(self._elapsed_before + elapsed, 1)
        record["remaining_s"] = None
        if self._total_steps is not None:
            seconds_per_step = elapsed / (trainer.global_step - self._first_step)
            steps_left = self._total_steps - trainer.global_step
            record["remaining_s"] = round(seconds_per_step * steps_left, 1)
        device = trainer.strategy.root_device
        if device.type == "cuda":
            record["memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
        return record

    def _append(self, trainer: lightning.Trainer, record: Mapping[str, Any]) -> None:
        append_json_lines(Path(trainer.default_root_dir, LOG), [record])
        self._lines += 1


def read_log(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a `logging.jsonl`; none if the file does not exist.

    A last line that a killed run left unfinished is skipped. The records end before a line that is
    damaged, with a warning: a run can be resumed without its history.
    """
    records: list[dict[str, Any]] = []
    if not path.exists():
        return records
    try:
        for number, record in read_json_lines(path, unfinished=True):
            if not _is_record(record):
                raise DataError(f"{path}:{number}: expected numbers by name; is the file damaged?")
            records.append(record)
    except DataError as damage:
        log.warning("%s; only the %d lines before it are used", damage, len(records))
    return records


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict):
        return False
    return all(isinstance(value, int | float | None) for value in record.values())


def save_scores(folder: str | Path, part: str, scores: Mapping[str, Any]) -> None:
    """Replaces one part of the folder's `metrics.json`, and keeps its other parts.

    A damaged file is set aside with a warning.

    Args:
        scores: plain data without nan.
    """
    path = Path(folder, SCORES_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = scores_to_update(path.parent)
    write_text(path, json.dumps({**content, part: scores}, indent=2) + "\n")


def training_line(record: Mapping[str, Any]) -> str:
    """Returns a training record as a line to read.

    >>> record = {"step": 50, "total": 400, "loss": 2.71, "learning_rate": 1e-4}
    >>> training_line({**record, "elapsed_s": 10.0, "remaining_s": 70.0})
    'step 50/400  loss 2.71  learning_rate 0.0001  remaining 1:10'
    """
    total = "" if record["total"] is None else f"/{record['total']}"
    fields = [f"step {record['step']}{total}"]
    fields += [f"{name} {_short(record[name])}" for name in PRINTED if name in record]
    if record["remaining_s"] is not None:
        minutes, seconds = divmod(round(record["remaining_s"]), 60)
        fields.append(f"remaining {minutes}:{seconds:02d}")
    return "  ".join(fields)


def _short(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4g}"


def _scores(trainer: lightning.Trainer, prefix: str = "") -> dict[str, float | None]:
    """Logged values by name; None for those that are not finite."""
    scores: dict[str, float | None] = {}
    for name, value in trainer.callback_metrics.items():
        if name.startswith(prefix):
            score = float(value)
            scores[name] = score if math.isfinite(score) else None
    return scores


def _check_monitors(trainer: lightning.Trainer) -> None:
    """Compares what callbacks monitor with the logged scores.

    A checkpoint callback whose score is missing keeps no best checkpoint: this is a warning.

    Raises:
        ValueError: early stopping would wait for a score that is not logged.
    """
    logged = ", ".join(sorted(trainer.callback_metrics)) or "none"
    for callback in trainer.callbacks:
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str) or monitor in trainer.callback_metrics:
            continue
        if isinstance(callback, EarlyStopping):
            raise ValueError(
                f"callbacks.early_stopping.monitor={monitor}: no such score is logged; "
                f"these are: {logged}"
            )
        if isinstance(callback, RunCheckpoint | ModelCheckpoint) and trainer.is_global_zero:
            log.warning(
                "callbacks.checkpoint.monitor=%s: no such score is logged, so no best checkpoint "
                "is kept; these are: %s",
                monitor,
                logged,
            )


def _validation_summary(trainer: lightning.Trainer) -> dict[str, Any]:
    """The last validation and, if a checkpoint callback monitors one of its scores, the best."""
    validations = []
    for record in read_log(Path(trainer.default_root_dir, LOG)):
        if any(name.startswith("val/") for name in record):
            validations.append(record)
    last = validations[-1] if validations else None
    summary: dict[str, Any] = {"step": trainer.global_step, "last": last}
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, RunCheckpoint | ModelCheckpoint) and callback.monitor:
            summary["best"] = {
                **_best(validations, callback.monitor, callback.mode),
                "monitor": callback.monitor,
                "checkpoint": callback.best_model_path or None,
            }
    return summary


def _best(validations: Sequence[dict[str, Any]], monitor: str, mode: str) -> dict[str, Any]:
    """The validation with the best score; empty if none has the score."""
    scored = [record for record in validations if record.get(monitor) is not None]
    choose = min if mode == "min" else max
    return choose(scored, key=itemgetter(monitor), default={})
