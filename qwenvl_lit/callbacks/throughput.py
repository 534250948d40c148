"""Logs the speed of training, and prints the speed of tests and predictions."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch.profilers import PassThroughProfiler
from torch import nn

from qwenvl_lit.bounds import check_number
from qwenvl_lit.models.components import component_of_tensor
from qwenvl_lit.models.dynamo import compiled_graphs
from qwenvl_lit.terminal import counted
from qwenvl_lit.types import Batch, micro_batches_of

# Peak bfloat16 FLOP/s without sparsity, from the vendor's data sheets. The first name that is part
# of the device name determines the peak. Lightning's table has the H100 NVL with sparsity, and does
# not recognize an H200 by its name.
PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("A100", 312e12),
)
MIN_BATCHES = 10  # whose rate says something about the speed of longer runs


class Snapshot(NamedTuple):
    """Totals since the start of training. The difference of two snapshots gives the speed."""

    seconds: float
    data_wait: float  # seconds spent waiting for batches
    flops: float = 0.0
    samples: int = 0
    supervised_tokens: int = 0
    tokens: int = 0  # without padding
    tokens_with_padding: int = 0

    def after(self, batch: Batch, flops: float) -> Snapshot:
        """Returns the totals after a batch that took `flops` FLOPs."""
        return self._replace(
            flops=self.flops + flops,
            samples=self.samples + len(batch.conversations),
            supervised_tokens=self.supervised_tokens + len(batch.target_positions),
            tokens=self.tokens + sum(batch.lengths),
            tokens_with_padding=self.tokens_with_padding + batch.input_ids.numel(),
        )


class AnswerCounts(NamedTuple):
    """Totals of a test or prediction since its start, on this rank unless stated otherwise."""

    seconds: float
    batches: int = 0
    rows: int = 0
    images: int = 0
    tokens: int = 0  # generated tokens


class DataWaitProfiler(PassThroughProfiler):
    """Measures the time for which the training loop waits for batches.

    Lightning reports this time only to the profiler of the Trainer. `Throughput` reads it if the
    profiler is a `DataWaitProfiler`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self._start = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith(".train_dataloader_next"):
            self._start = perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith(".train_dataloader_next"):
            self.seconds += perf_counter() - self._start


class Throughput(lightning.Callback):
    """Logs the speed of training, and prints the speed of a test or prediction at its end.

    The logged values are averages over the last `window` batches. They include data loading and
    optimizer steps, but neither validation nor the writing of checkpoints:

    - `train/samples_per_second`, `train/supervised_tokens_per_second` and
      `train/tokens_per_second`, which does not count padding. The speed of all ranks is estimated
      as the speed of rank 0 times the number of ranks.
    - `train/padding_share`: the fraction of padding in `Batch.input_ids`.
    - `train/waiting_share`: the fraction of the time spent waiting for data. NaN if the Trainer's
      profiler is not a `DataWaitProfiler`.
    - `train/tflop_per_second`: TFLOP/s of one device, from `Family.flops`.
    - `train/mfu`: model FLOPs utilization, the fraction of the peak FLOP/s of the device. NaN if
      the peak is unknown.
    - `train/compilations`: the number of graphs that torch.compile has compiled since training
      began. If this number keeps growing, batches keep having new shapes.

    All values are computed on the host without synchronizing. This callback must come before
    `RunLog`, which writes the values that were logged in a step.

    Attributes:
        rates: `seconds` and `images_per_second` of the latest test or prediction, over all ranks.
            They are set on rank 0 at its end.
    """

    def __init__(self, window: int = 20):
        check_number("callbacks.throughput.window", window, least=1, most=10**6, whole=True)
        self.window = window
        self.rates: dict[str, float] = {}
        self._snapshots: deque[Snapshot] = deque(maxlen=window + 1)
        self._trained_fractions: dict[str, float] = {}  # by component
        self._peak = math.nan
        self._graphs_before = 0
        self._loading_start = 0.0
        # Totals of a test or prediction at its start, after its first and after its latest batch.
        self._start = self._first_batch = self._latest = AnswerCounts(0.0)

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self._snapshots.clear()
        self._peak = peak_flops(trainer.strategy.root_device)
        if hasattr(pl_module, "family"):
            components = pl_module.family.components
            self._trained_fractions = trained_fractions(pl_module.model, components)
        self._graphs_before = compiled_graphs()

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Batch | Sequence[Batch],
        batch_idx: int,
    ) -> None:
        if not self._snapshots:
            self._snapshots.append(Snapshot(perf_counter(), _data_wait(trainer)))

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch | Sequence[Batch],
        batch_idx: int,
    ) -> None:
        micro_batches = micro_batches_of(batch)
        now = self._snapshots[-1]._replace(seconds=perf_counter(), data_wait=_data_wait(trainer))
        for micro_batch in micro_batches:
            flops = math.nan
            if self._trained_fractions:
                flops = pl_module.family.flops(micro_batch, self._trained_fractions)
            now = now.after(micro_batch, flops)
        self._snapshots.append(now)
        rows = sum(len(micro_batch.conversations) for micro_batch in micro_batches)
        rates = self._training_rates(self._snapshots[0], now, trainer.world_size)
        for name, value in rates.items():
            # CPU tensors, because Lightning would copy numbers to the device and synchronize.
            pl_module.log(f"train/{name}", torch.tensor(float(value)), batch_size=rows)

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self._snapshots.clear()

    def on_save_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        self._snapshots.clear()

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        if stage in ("test", "predict"):
            self._loading_start = perf_counter()

    def on_test_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self._start = self._first_batch = self._latest = AnswerCounts(perf_counter())

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,  # Sequence[Prediction]
        batch: Batch | Sequence[Batch],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        parts = micro_batches_of(batch)
        is_first = self._latest is self._start
        self._latest = AnswerCounts(
            seconds=perf_counter(),
            batches=self._latest.batches + 1,
            rows=self._latest.rows + sum(len(part.conversations) for part in parts),
            images=self._latest.images + sum(len(part.images) for part in parts),
            tokens=self._latest.tokens + sum(prediction.tokens or 0 for prediction in outputs),
        )
        if is_first:
            self._first_batch = self._latest

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        counts = torch.tensor(
            [self._first_batch[1:], self._latest[1:]], device=pl_module.device
        )  # without `seconds`
        counts_of_ranks = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        if not trainer.is_global_zero:
            return
        first = AnswerCounts(self._first_batch.seconds, *counts_of_ranks[0])
        latest = AnswerCounts(self._latest.seconds, *counts_of_ranks[1])
        seconds = latest.seconds - self._start.seconds
        self.rates = {"seconds": seconds, "images_per_second": latest.images / max(seconds, 1e-9)}
        command = "predict" if trainer.predicting else "test"
        rows = counted(latest.rows, "row")
        print(f"{command}: {rows} in {seconds:.1f} s, {_answer_rates(self._start, latest)}")
        loading = f"loading took {self._start.seconds - self._loading_start:.1f} s before that"
        batches = latest.batches - first.batches
        if batches >= MIN_BATCHES:
            first_seconds = first.seconds - self._start.seconds
            loading = (
                f"{batches:,} batches after the first, which took {first_seconds:.1f} s: "
                f"{_answer_rates(first, latest)}; {loading}"
            )
        print(f"  {loading}")

    on_predict_start = on_test_start
    on_predict_batch_end = on_test_batch_end
    on_predict_end = on_test_end

    def _training_rates(self, first: Snapshot, now: Snapshot, ranks: int) -> dict[str, float]:
        seconds = now.seconds - first.seconds
        tokens = now.tokens - first.tokens
        supervised_tokens = now.supervised_tokens - first.supervised_tokens
        tokens_with_padding = now.tokens_with_padding - first.tokens_with_padding
        flop_per_second = (now.flops - first.flops) / seconds
        return {
            "samples_per_second": (now.samples - first.samples) * (ranks / seconds),
            "supervised_tokens_per_second": supervised_tokens * (ranks / seconds),
            "tokens_per_second": tokens * (ranks / seconds),
            "padding_share": 1 - tokens / tokens_with_padding,
            "waiting_share": (now.data_wait - first.data_wait) / seconds,
            "tflop_per_second": flop_per_second / 1e12,
            "mfu": flop_per_second / self._peak,
            "compilations": compiled_graphs() - self._graphs_before,
        }


def peak_flops(device: torch.device) -> float:
    """Returns the peak bfloat16 FLOP/s of a device, or NaN if it is unknown."""
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for name, peak in PEAKS:
        if name in device_name:
            return peak
    return math.nan


def trained_fractions(model: nn.Module, components: Mapping[str, str]) -> dict[str, float]:
    """Returns the fraction of the parameters of each component that is trained.

    A parameter of nested components counts for the innermost component only.
    """
    trained = dict.fromkeys(components, 0)
    total = dict.fromkeys(components, 0)
    for name, parameter in model.named_parameters():
        component = component_of_tensor(name, components)
        if component:
            total[component] += parameter.numel()
            trained[component] += parameter.numel() * parameter.requires_grad
    return {component: trained[component] / max(1, total[component]) for component in components}


def _data_wait(trainer: lightning.Trainer) -> float:
    profiler = trainer.profiler
    return profiler.seconds if isinstance(profiler, DataWaitProfiler) else math.nan


def _answer_rates(start: AnswerCounts, end: AnswerCounts) -> str:
    seconds = max(end.seconds - start.seconds, 1e-9)
    rates = f"{(end.images - start.images) / seconds:.1f} images/s"
    tokens = end.tokens - start.tokens
    if tokens:
        rates += f", {tokens / seconds:.0f} new tokens/s"
    return rates
