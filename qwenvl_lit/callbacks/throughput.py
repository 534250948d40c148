"""How fast a run goes, and how much of its work is padding."""

from __future__ import annotations

from collections import deque
from time import perf_counter
from typing import Any, NamedTuple

import lightning
import torch

from qwenvl_lit.types import Batch


class Mark(NamedTuple):
    """Counts since the window was opened, at one point in time."""

    seconds: float
    samples: int = 0
    supervised_tokens: int = 0
    tokens: torch.Tensor | int = 0  # without padding; stays on the device, so that no step waits for it
    slots: int = 0  # with padding


class Throughput(lightning.Callback):
    """Logs rates over the last steps of training, and prints the rate of a test or prediction at its end.

    Logged, means over `window` batches, loading and optimizer steps included, validation and the time before the first step not:
    `train/samples_per_second`, `train/supervised_tokens_per_second`, `train/tokens_per_second` (without padding) and
    `train/padding_share` (of the slots of `Batch.input_ids`). Rates are for all ranks: those of rank 0 times the number of ranks.

    Place it before `RunLog`, which writes what has been logged in the step.
    """

    def __init__(self, window: int = 20):
        self.window = window
        self._marks: deque[Mark] = deque(maxlen=window + 1)
        self._start = 0.0
        self._rows = 0
        self._pictures = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._marks.clear()

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Batch, batch_idx: int) -> None:
        if not self._marks:
            self._marks.append(Mark(perf_counter()))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        last = self._marks[-1]
        real = batch.input_ids.numel() if batch.attention_mask is None else batch.attention_mask.sum()
        now = Mark(
            seconds=perf_counter(),
            samples=last.samples + len(batch.conversations),
            supervised_tokens=last.supervised_tokens + len(batch.target_positions),
            tokens=last.tokens + real,
            slots=last.slots + batch.input_ids.numel(),
        )
        self._marks.append(now)
        first = self._marks[0]
        ranks_per_second = trainer.world_size / (now.seconds - first.seconds)
        size = len(batch.conversations)
        pl_module.log("train/samples_per_second", (now.samples - first.samples) * ranks_per_second, prog_bar=True, batch_size=size)
        rates = {
            "train/supervised_tokens_per_second": (now.supervised_tokens - first.supervised_tokens) * ranks_per_second,
            "train/tokens_per_second": (now.tokens - first.tokens) * ranks_per_second,
            "train/padding_share": 1 - (now.tokens - first.tokens) / (now.slots - first.slots),
        }
        pl_module.log_dict(rates, batch_size=size)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._marks.clear()

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._rows = self._pictures = 0
        self._start = perf_counter()

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._rows += len(batch.conversations)
        self._pictures += sum(len(conversation.pictures) for conversation in batch.conversations)

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        counts = torch.tensor([self._rows, self._pictures], device=pl_module.device)
        rows, pictures = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        seconds = perf_counter() - self._start
        if trainer.is_global_zero:
            verb = "predict" if trainer.predicting else "test"
            print(f"{verb}: {rows} rows in {seconds:.1f} s, {pictures / seconds:.1f} pictures/s")

    on_predict_start = on_test_start
    on_predict_batch_end = on_test_batch_end
    on_predict_end = on_test_end
