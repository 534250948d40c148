"""The Lightning task: one module trains, validates, tests and predicts, whatever the family and the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch import nn
from torchmetrics import MeanMetric

from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from torchmetrics import Metric

    from qwenvl_lit.adapters import Adapter
    from qwenvl_lit.families.protocols import Family
    from qwenvl_lit.generation import Generation
    from qwenvl_lit.optim import AdamW
    from qwenvl_lit.types import Batch, Prediction


class Task(lightning.LightningModule):
    """Steps and lean checkpoints; everything that is a choice is handed in.

    Args:
        adapter: what is trained; None for a model that is used as it was published.
        metrics: scores of predictions by name; each set of rows gets copies of its own.
        config: plain data that is stored in every checkpoint, from which the run can be built again.

    Logs `train/loss`, `train/accuracy` (of the next supervised token), `train/grad_norm` (before clipping); `val/loss`, `val/NAME`; and
    `SET/NAME` for each test set, with `SET/rows`. A metric that found no row it could score is not logged.
    """

    def __init__(
        self,
        *,
        family: Family,
        adapter: Adapter | None,
        generation: Generation,
        metrics: Mapping[str, Metric],
        optim: AdamW | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.family = family
        self.adapter = adapter
        self.generation = generation
        self.optim = optim
        self.config = config
        self.processor = family.processor()
        self.model: nn.Module | None = None
        self.home = torch.device("cpu")  # where `configure_model` puts the weights; a trainer says so in `setup`
        self.trained: Path | None = None  # a checkpoint whose tensors `configure_model` is to load
        self.metrics = nn.ModuleDict(metrics)
        self.set_metrics = nn.ModuleList()  # copies of `metrics` for each set being scored
        self.set_rows: list[int] = []
        self.val_loss = MeanMetric()
        self.strict_loading = False  # frozen tensors are not in checkpoints; `load_state_dict` checks the rest

    def setup(self, stage: str) -> None:
        self.home = self.trainer.strategy.root_device

    def configure_model(self) -> None:
        """Load the base weights, straight to the device that a trainer gave this process, and apply the adapter, once; then the trained
        tensors of `trained`, once.

        Raises:
            DataError: a checkpoint that is not this network's, or not this adapter's.
        """
        if self.model is None:
            model = self.family.load(self.home)
            self.model = (self.adapter.apply(model, self.family.parts) if self.adapter else model).train()
        if self.trained is not None:
            checkpoint, self.trained = self.trained, None
            try:
                self.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["state_dict"])
            except (ValueError, RuntimeError) as error:
                raise DataError(f"{checkpoint}: {error}") from error

    def trainable_names(self) -> set[str]:
        """Names, as in `state_dict`, of the tensors that are trained: what a checkpoint holds."""
        return {name for name, tensor in self.named_parameters() if tensor.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep = self.trainable_names()
        checkpoint["state_dict"] = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name in keep}
        checkpoint["config"] = self.config

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor], strict: bool = False, assign: bool = False):
        """Load what a checkpoint holds: all trainable tensors and nothing else.

        Raises:
            ValueError: a trainable tensor is missing, or the checkpoint has one that this model does not train.
        """
        missing, unexpected = self.trainable_names() - set(state_dict), set(state_dict) - self.trainable_names()
        for what, names in (("lacks", missing), ("has unknown", unexpected)):
            if names:
                shown = ", ".join(sorted(names)[:5])
                raise ValueError(f"the checkpoint {what} {len(names)} tensors ({shown}, ...); was it made with this model and adapter?")
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def configure_optimizers(self):
        optimizer, schedule = self.optim.build(self.model, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        output = self.model(**self.family.inputs(batch))
        if not len(batch.target_positions):  # every row was dropped: a step all the same, since other ranks wait for its gradients
            return output.logits.sum() * 0
        targets = batch.labels.flatten()[batch.target_positions + 1]
        accuracy = (output.logits.detach().argmax(-1) == targets).float().mean()
        rows = len(batch.conversations)
        self.log("train/loss", output.loss, prog_bar=True, batch_size=rows)
        self.log("train/accuracy", accuracy, batch_size=rows)
        return output.loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [tensor.grad for tensor in self.parameters() if tensor.grad is not None]
        self.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))

    def on_validation_epoch_start(self) -> None:
        self._start_scoring(1)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[Prediction] | None:
        if dataloader_idx == 0:  # all rows with their answers; loader 1 has prompts of some
            loss = self.model(**self.family.inputs(batch)).loss
            if loss is not None:  # else every row was dropped
                self.val_loss.update(loss, weight=len(batch.target_positions))
            return None
        return self._answer(batch, 0)

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", self.val_loss.compute(), prog_bar=True)
        self.val_loss.reset()
        if len(self.trainer.num_val_batches) > 1:
            self._log_scores(["val"])

    def on_test_epoch_start(self) -> None:
        self._start_scoring(len(self.trainer.datamodule.test_names))

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[Prediction]:
        return self._answer(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        names = self.trainer.datamodule.test_names
        self._log_scores(names)
        for name, rows in zip(names, self.set_rows, strict=True):
            self.log(f"{name}/rows", float(rows), reduce_fx="sum", sync_dist=True)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[Prediction]:
        return self.predict(batch)

    def predict(self, batch: Batch) -> list[Prediction]:
        """The model's answer to each row of a batch of prompts."""
        if not batch.conversations:
            return []
        rows = self.generation(
            self.model, self.family.inputs(batch, generate=True), stop_ids=self.processor.stop_ids, pad_id=self.processor.pad_id
        )
        return [self.processor.decode(ids, conversation) for ids, conversation in zip(rows, batch.conversations, strict=True)]

    def _answer(self, batch: Batch, scored_set: int) -> list[Prediction]:
        predictions = self.predict(batch)
        for metric in self.set_metrics[scored_set].values():
            metric.update(predictions)
        self.set_rows[scored_set] += len(predictions)
        return predictions

    def _start_scoring(self, sets: int) -> None:
        self.set_metrics = nn.ModuleList(
            nn.ModuleDict({name: metric.clone() for name, metric in self.metrics.items()}) for _ in range(sets)
        ).to(self.device)
        self.set_rows = [0] * sets

    def _log_scores(self, names: list[str]) -> None:
        for set_name, metrics in zip(names, self.set_metrics, strict=True):
            for name, metric in metrics.items():
                if (value := metric.compute()).isfinite():
                    self.log(f"{set_name}/{name}", value.float())
