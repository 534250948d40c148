"""How fast a run goes, and how much of its work is padding."""

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

from qwenvl_lit.models.components import component_of_tensor
from qwenvl_lit.types import Batch

PEAKS = (  # dense bfloat16 operations a second, from the makers' data sheets; the first name that fits
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("A100", 312e12),
)


class Mark(NamedTuple):
    """Counts at one point in time; the window is what two of them differ by."""

    seconds: float
    waited: float  # seconds, for data
    operations: float = 0.0
    samples: int = 0
    supervised_tokens: int = 0
    tokens: int = 0  # without padding
    slots: int = 0  # with padding


class Waiting(PassThroughProfiler):
    """Seconds in which the training loop asked for a batch and had none yet: Lightning tells them to a profiler alone."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self._since = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith(".train_dataloader_next"):
            self._since = perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith(".train_dataloader_next"):
            self.seconds += perf_counter() - self._since


class Throughput(lightning.Callback):
    """Logs rates over the last steps of training, and prints the rate of a test or prediction at its end.

    Logged, means over `window` batches, loading and optimizer steps included; validation, checkpoints and the time before the first step
    not: `train/samples_per_second`, `train/supervised_tokens_per_second`, `train/tokens_per_second` (without padding),
    `train/padding_share` (of the slots of `Batch.input_ids`), `train/waiting_share` (of the time, for data; nan beside another profiler),
    `train/tflop_per_second`, the family's operations on one device, in 1e12, and `train/mfu`, their share of the device's peak (nan where
    no peak is known). The other rates are for all ranks: those of rank 0 times the number of ranks. And `train/compilations`, the graphs
    that torch.compile has made since training began: a number that keeps growing tells of shapes that keep changing.

    All is counted on the host: nothing waits for the device. Place it before `RunLog`, which writes what has been logged in the step.
    """

    def __init__(self, window: int = 20):
        self.window = window
        self._marks: deque[Mark] = deque(maxlen=window + 1)
        self._trained: dict[str, float] = {}  # by part, the share that is trained
        self._peak = math.nan
        self._waiting = Waiting()
        self._graphs_before = 0
        self._asked = 0.0  # when loading began
        self._counts: list[
            tuple[int, int, int]
        ] = []  # rows, images and new tokens: none, after the first batch, by now
        self._times: list[float] = []  # of the same
        self.rates: dict[
            str, float
        ] = {}  # of the latest test or prediction, of all ranks; known to rank 0 at its end

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self._marks.clear()
        self._peak = peak_flops(trainer.strategy.root_device)
        if hasattr(pl_module, "family"):
            self._trained = trained_shares(pl_module.model, pl_module.family.components)
        if isinstance(trainer.profiler, PassThroughProfiler):
            trainer.profiler = self._waiting
        else:
            self._waiting.seconds = math.nan
        self._graphs_before = compiled_graphs()

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        if not self._marks:
            self._marks.append(Mark(perf_counter(), self._waiting.seconds))

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        last = self._marks[-1]
        now = Mark(
            seconds=perf_counter(),
            waited=self._waiting.seconds,
            operations=last.operations
            + (pl_module.family.flops(batch, self._trained) if self._trained else math.nan),
            samples=last.samples + len(batch.conversations),
            supervised_tokens=last.supervised_tokens + len(batch.target_positions),
            tokens=last.tokens + sum(batch.lengths),
            slots=last.slots + batch.input_ids.numel(),
        )
        self._marks.append(now)
        first = self._marks[0]
        seconds = now.seconds - first.seconds
        ranks_per_second = trainer.world_size / seconds
        operations_per_second = (now.operations - first.operations) / seconds
        rates = {
            "samples_per_second": (now.samples - first.samples) * ranks_per_second,
            "supervised_tokens_per_second": (now.supervised_tokens - first.supervised_tokens)
            * ranks_per_second,
            "tokens_per_second": (now.tokens - first.tokens) * ranks_per_second,
            "padding_share": 1 - (now.tokens - first.tokens) / (now.slots - first.slots),
            "waiting_share": (now.waited - first.waited) / seconds,
            "tflop_per_second": operations_per_second / 1e12,
            "mfu": operations_per_second / self._peak,
            "compilations": compiled_graphs() - self._graphs_before,
        }
        for (
            name,
            value,
        ) in rates.items():  # as tensors of the host: Lightning would copy plain numbers to the device, and wait for it
            pl_module.log(
                f"train/{name}", torch.tensor(float(value)), batch_size=len(batch.conversations)
            )

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self._marks.clear()

    def on_save_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        self._marks.clear()

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        if stage in ("test", "predict"):
            self._asked = perf_counter()

    def on_test_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self._counts = [(0, 0, 0)]
        self._times = [perf_counter()]

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,  # Sequence[Prediction]
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        rows, images, tokens = self._counts[-1]
        rows += len(batch.conversations)
        images += sum(len(conversation.images) for conversation in batch.conversations)
        tokens += sum(prediction.tokens or 0 for prediction in outputs)
        self._counts[1:] = [
            *self._counts[1:2],
            (rows, images, tokens),
        ]  # after the first batch, and by now
        self._times[1:] = [*self._times[1:2], perf_counter()]

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        counts = [self._counts[0], self._counts[min(1, len(self._counts) - 1)], self._counts[-1]]
        _, first, last = trainer.strategy.reduce(
            torch.tensor(counts, device=pl_module.device), reduce_op="sum"
        ).tolist()
        if not trainer.is_global_zero:
            return
        start, end = self._times[0], self._times[-1]
        self.rates = {"seconds": end - start, "images_per_second": last[1] / max(end - start, 1e-9)}
        answered = f"{last[0]} row" if last[0] == 1 else f"{last[0]} rows"
        print(
            f"{'predict' if trainer.predicting else 'test'}: {answered} in {end - start:.1f} s, {_rates(last[1:], end - start)}"
        )
        beside = f"loading took {start - self._asked:.1f} s before"
        if len(self._times) > 2:
            warm = _rates(
                [b - a for a, b in zip(first[1:], last[1:], strict=True)], end - self._times[1]
            )
            beside = f"without the first batch, of {self._times[1] - start:.1f} s: {warm}; {beside}"
        print(f"  {beside}")

    on_predict_start = on_test_start
    on_predict_batch_end = on_test_batch_end
    on_predict_end = on_test_end


def _rates(counts: Sequence[int], seconds: float) -> str:
    images, tokens = (count / max(seconds, 1e-9) for count in counts)
    return f"{images:.1f} images/s" + (f", {tokens:.0f} new tokens/s" if tokens else "")


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process: one for each function and each set of shapes that it is made for."""
    from torch._dynamo.utils import counters  # a second to import; there is no public way to ask

    return counters["stats"]["unique_graphs"]


def peak_flops(device: torch.device) -> float:
    """Operations a second that the device could do, in bfloat16; nan where that is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAKS if part in name), math.nan)


def trained_shares(model: nn.Module, components: Mapping[str, str]) -> dict[str, float]:
    """For each part (name -> module path; of several the innermost), the share of its numbers that is trained."""
    counts = {part: [0, 0] for part in components}
    for name, tensor in model.named_parameters():
        if part := component_of_tensor(name, components):
            counts[part][0] += tensor.numel() * tensor.requires_grad
            counts[part][1] += tensor.numel()
    return {part: trained / max(1, numbers) for part, (trained, numbers) in counts.items()}
