"""Prints what a run is about to do, before its first step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import lightning
import torch
from rich.console import Console
from rich.text import Text

from qwenvl_lit.callbacks.validation import ValidationSchedule
from qwenvl_lit.data.findings import FILENAME
from qwenvl_lit.data.loading import EncodedDataset
from qwenvl_lit.data.selection import Concat
from qwenvl_lit.models.chatml import runs
from qwenvl_lit.models.components import blocks_of
from qwenvl_lit.terminal import counted, printable, wrapped
from qwenvl_lit.types import Sample

if TYPE_CHECKING:
    from qwenvl_lit.data.datamodule import DataModule
    from qwenvl_lit.data.micro_batches import CutStep
    from qwenvl_lit.models.protocols import Processor

LABEL_WIDTH = 12
MAX_CHARACTERS = 600  # of consecutive tokens; of a longer text the middle is left out
ROWS_TRIED = 100  # rows that are searched for one that is not left out
OPEN, CLOSE = "⟦", "⟧"  # around supervised tokens


class Overview(lightning.Callback):
    """Prints rows, steps, learning rate and device, and a row with its supervised tokens marked.

    The row is the first training row that is not left out.
    """

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if not trainer.is_global_zero:
            return
        console = Console(highlight=False, soft_wrap=True)
        for label, value in facts(trainer, pl_module):
            line = f"{label:{LABEL_WIDTH}}{printable(value)}"
            console.print(Text(wrapped(line, indent=LABEL_WIDTH)))
        sample = first_sample(trainer.datamodule)
        if sample is not None:
            console.print(marked(sample, trainer.datamodule.processor))


def facts(
    trainer: lightning.Trainer, module: lightning.LightningModule
) -> Iterator[tuple[str, str]]:
    """Yields the lines of the overview, each as a label and its text."""
    data: DataModule = trainer.datamodule
    folder = Path(trainer.default_root_dir)
    here = Path.cwd()
    yield "Run folder", str(folder.relative_to(here) if folder.is_relative_to(here) else folder)
    yield "Device", _device(trainer)
    yield "Rows", _rows(data)
    yield "Steps", _steps(trainer, data)
    yield "Batches", _batches(trainer, data)
    yield "Speed", _speed(module, data)
    yield "Optimizer", module.optim.describe(int(data.steps_of_run()))
    yield "Validation", _validation(trainer, data, list(module.metrics))


def _device(trainer: lightning.Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type.upper()}, {counted(torch.get_num_threads(), 'thread')}"
    if trainer.world_size > 1:
        name = f"{trainer.world_size} x {name}"
    return f"{name}, precision {trainer.precision}"


def _rows(data: DataModule) -> str:
    images = sum(dataset.images for dataset in data.measured.values())
    left_out = sum(dataset.left_out for dataset in data.measured.values())
    text = f"{sum(map(len, data.train)):,} training with {counted(images, 'image')}, "
    text += f"{len(data.validation):,} validation, {left_out:,} left out"
    return f"{text} ({FILENAME} says why)" if left_out else text


def _steps(trainer: lightning.Trainer, data: DataModule) -> str:
    text = "no limit"
    if math.isfinite(steps := data.steps_of_run()):
        steps_per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
        epochs = f"{steps / math.ceil(steps_per_epoch):.3g}"
        plural = "s" * (steps != 1)
        text = f"{int(steps):,} optimizer step{plural} in {epochs} epoch{'s' * (epochs != '1')}"
    if trainer.global_step:
        total = f" of {int(steps):,}" if math.isfinite(steps) else ""
        text += f", {trainer.global_step:,}{total} steps done"
    return text


def _batches(trainer: lightning.Trainer, data: DataModule) -> str:
    accumulated, ranks = trainer.accumulate_grad_batches, trainer.world_size
    factors = f"x {accumulated} accumulated x {counted(ranks, 'rank')}"
    if data.cuts_steps:
        rows = min(data.rows_per_step, -(-sum(map(len, data.train)) // ranks)) * ranks
        return f"{counted(rows, 'row')} per optimizer step, {_micro_batches(data.cut)}"
    if data.max_tokens is None:
        rows = data.batch_size * accumulated * ranks
        return f"{counted(rows, 'row')} per optimizer step = batch of {data.batch_size} {factors}"
    rows = accumulated * sum(map(len, data.train)) / trainer.num_training_batches
    return f"about {rows:.3g} rows per step: batches of up to {data.max_tokens:,} tokens {factors}"


def _micro_batches(cut: CutStep) -> str:
    """Says how the rows of a step are cut on each rank."""
    how = "padded" if cut.pack is None else "packed"
    if cut.count is not None and cut.count > 1:
        return f"{how} in {cut.count} micro-batches per rank"
    if cut.most_tokens is None or cut.count == 1:
        return f"{how} in one micro-batch per rank"
    return f"{how} in micro-batches of up to {cut.most_tokens:,} tokens"


def _speed(module: lightning.LightningModule, data: DataModule) -> str:
    blocks = blocks_of(module.model).values()
    compiled = module.speed is not None and module.speed.compiled
    text = "compiled blocks" if compiled else "not compiled"
    if recomputed := sum(block.gradient_checkpointing for block in blocks):
        text += f", {recomputed} of {len(blocks)} blocks recomputed"
    return f"{text}, {counted(data.num_workers, 'worker')} for data"


def _validation(trainer: lightning.Trainer, data: DataModule, metrics: Sequence[str]) -> str:
    names = ", ".join(metrics)
    left_to_test = f"; the command test computes {names}" if metrics else ""
    if not len(data.validation):
        return f"none, as data.validation gives no rows{left_to_test}"
    if trainer.limit_val_batches == 0:
        limit = trainer.limit_val_batches
        return f"none, as trainer.limit_val_batches={limit}{left_to_test}"
    times = ""
    for callback in trainer.callbacks:
        if isinstance(callback, ValidationSchedule):
            times = f"{callback}, "
    plan = data.plans.get("validation")
    if plan and plan.batches.reason:  # data.eval_batch_size=auto
        times += f"batches of {counted(plan.batches.rows, 'row')} ({plan.batches.reason}), "
    answered = min(data.generated_validation_rows, len(data.validation))
    if not answered:
        return f"{times}loss only (data.generated_validation_rows=0){left_to_test}"
    text = f"{times}{counted(answered, 'row')} answered (data.generated_validation_rows)"
    return f"{text} and scored by {names}" if metrics else f"{text}, no metrics chosen"


def first_sample(data: DataModule) -> Sample | None:
    """Returns the first training sample; None if the first `ROWS_TRIED` are left out."""
    rows = Concat(data.train)
    drop_bad = data.on_bad_image == "drop"
    samples = EncodedDataset(rows, data.processor, prompt=False, renumber=False, drop_bad=drop_bad)
    for index in range(min(ROWS_TRIED, len(rows))):
        sample = samples[index]
        if isinstance(sample, Sample):
            return sample
    return None


def marked(sample: Sample, processor: Processor) -> Text:
    """Returns a sample as the model receives it, with marks around supervised tokens."""
    ids, labels = sample.input_ids.tolist(), sample.labels.tolist()
    supervised = sum(label >= 0 for label in labels[1:])
    row = sample.conversation.where or sample.conversation.id
    title = f"{printable(row)}, {counted(len(ids), 'token')}, {supervised:,} supervised"
    line = f"{'First row':{LABEL_WIDTH}}{title}, marked {OPEN}...{CLOSE}:"
    text = Text(wrapped(line, indent=LABEL_WIDTH) + "\n")
    for piece, is_supervised in runs(ids, labels, processor.text):
        piece = _shortened(printable(piece, keep="\n"))
        if is_supervised:
            text.append(f"{OPEN}{piece}{CLOSE}", style="bold green")
        else:
            text.append(piece)
    return text


def _shortened(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]} ... {text[-half:]}"
