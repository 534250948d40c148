"""The LightningModule of all families and adapters: it trains, validates, tests and predicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from qwenvl_lit.metrics.per_sample import ROWS, warn_without_rows
from qwenvl_lit.metrics.token_scores import TokenScores
from qwenvl_lit.training.adapters.merging import StartingCheckpoint, check_trained_names
from qwenvl_lit.training.answering import Answering
from qwenvl_lit.training.loading import load_model
from qwenvl_lit.training.memory import free_unused_memory
from qwenvl_lit.training.non_finite import NonFiniteGuard
from qwenvl_lit.training.optim import local_tensor
from qwenvl_lit.training.precision import LossScale
from qwenvl_lit.training.strategies import sharding_of, sum_over_ranks
from qwenvl_lit.training.whole_steps import add_gradients, zero_loss
from qwenvl_lit.training.zero_gradients import ZeroGradientGuard
from qwenvl_lit.types import Batch, DataError

if TYPE_CHECKING:
    from torchmetrics import Metric

    from qwenvl_lit.data.evaluation_batches import BatchChoice, RowSizes
    from qwenvl_lit.data.micro_batches import BatchLimit
    from qwenvl_lit.generation.generation import Generation
    from qwenvl_lit.models.protocols import Family, FeatureSource
    from qwenvl_lit.training.adapters.methods import Adapter
    from qwenvl_lit.training.optim import AdamW
    from qwenvl_lit.training.speed import Speed
    from qwenvl_lit.types import Prediction


class VisionLanguageModule(lightning.LightningModule):
    """Steps and lean checkpoints; every choice is an argument.

    The weights are loaded by `configure_model`, which Lightning calls when a run starts.

    Args:
        adapter: the fine-tuning method; None for the published model.
        metrics: scores of answers by name. Each set of rows is scored by its own copies.
        optim, speed: needed for training only.
        init: the checkpoint of an earlier run that is merged into the base weights.
        trained_checkpoint: the checkpoint with the tensors that `adapter` trains; None to start
            from an untrained adapter.
        load_device: where the weights are loaded to. With a trainer, its device is used instead.
        config: plain data stored in every checkpoint, from which the run can be built again.
        features: where the processor gets vision features from, in place of pixels.

    Logs, per optimizer step: `train/loss`, `train/accuracy` (of next-token prediction) and
    `train/grad_norm` (before clipping). Per validation: `val/loss`, `val/perplexity` and
    `val/token_accuracy` on all held-out tokens, and `val/NAME` for each metric of the generated
    answers. Per test set: `SET/NAME` for each metric, `SET/rows_NAME`, the rows that it has
    scored, and `SET/rows`, the rows that were answered. A metric that found no row to
    score is not logged.
    """

    def __init__(
        self,
        *,
        family: Family,
        adapter: Adapter | None,
        generation: Generation,
        metrics: Mapping[str, Metric],
        optim: AdamW | None = None,
        speed: Speed | None = None,
        init: StartingCheckpoint | None = None,
        trained_checkpoint: Path | None = None,
        load_device: torch.device | str = "cpu",
        config: Mapping[str, Any] | None = None,
        features: FeatureSource | None = None,
    ):
        super().__init__()
        self.family = family
        self.adapter = adapter
        self.init = init
        self.trained_checkpoint = trained_checkpoint
        self.load_device = torch.device(load_device)
        self.generation = generation
        self.optim = optim
        self.speed = speed
        self.config = config
        self.processor = family.processor(features=features)
        self.model: nn.Module | None = None
        self.metrics = nn.ModuleDict(metrics)
        self.set_metrics = nn.ModuleList()  # copies of `metrics` for each set that is scored
        self.set_rows: list[int] = []
        self.val_tokens = TokenScores()
        self.answering = Answering(self)
        self.guard = NonFiniteGuard()
        self.zero_guard = ZeroGradientGuard(family.components)
        # The micro-batches of the current optimizer step, and their sums of losses and of
        # correctly predicted tokens
        self.step_batches: list[Batch] = []
        self.register_buffer("step_sums", torch.zeros(2), persistent=False)
        self.gradient_norm = torch.zeros(())
        self.loss_scale: LossScale | None = None  # for float16
        # Checkpoints have no frozen tensors; `load_state_dict` checks that they have all others.
        self.strict_loading = False

    def setup(self, stage: str) -> None:
        self.load_device = self.trainer.strategy.root_device
        if stage == "fit" and self.trainer.precision == "16-mixed":
            self.loss_scale = LossScale()

    def configure_model(self) -> None:
        """Loads the model and applies the adapter, unless that was done before.

        Raises:
            DataError: a checkpoint is missing, or belongs to another model or adapter.
        """
        if self.model is not None:
            return
        model = load_model(
            self.family,
            self.adapter,
            self.load_device,
            init=self.init,
            trained_checkpoint=self.trained_checkpoint,
        )
        self.model = model.train()
        if self.adapter and self.speed:
            self.speed.apply(model, family=self.family, adapter=self.adapter, trainer=self.trainer)

    def unload_model(self) -> None:
        """Frees the memory of the model; `configure_model` loads it again."""
        self.model = None
        free_unused_memory()

    def evaluate_with(self, *, generation: Generation, metrics: Mapping[str, Metric]) -> None:
        """Replaces how answers are generated and scored, for the next test run."""
        self.generation = generation
        self.metrics = nn.ModuleDict(metrics)

    def trainable_names(self) -> set[str]:
        """Returns the names, as in `state_dict`, of the trained tensors."""
        return {name for name, tensor in self.named_parameters() if tensor.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the trained tensors only, and adds the config."""
        trainable, state = self.trainable_names(), checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in state if name in trainable}
        checkpoint["config"] = self.config
        if self.loss_scale is not None:
            checkpoint["loss_scale"] = self.loss_scale.stored()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.loss_scale is not None:
            self.loss_scale.restore(checkpoint["loss_scale"])

    def load_state_dict(
        self, state_dict: Mapping[str, torch.Tensor], strict: bool = False, assign: bool = False
    ):
        """Loads the tensors of a checkpoint: all trained ones and nothing else.

        Raises:
            ValueError: a trained tensor is missing, or there is one that this model does not train.
        """
        check_trained_names(state_dict, self.trainable_names())
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def configure_optimizers(self):
        optimizer, schedule = self.optim.build(
            self.model,
            self._total_steps(),
            self.family.components,
            compiled=self.speed is not None and self.speed.compiled,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _total_steps(self) -> int:
        data = self.trainer.datamodule
        steps = data.steps_of_run() if data else self.trainer.estimated_stepping_batches
        if steps == math.inf:
            raise DataError(
                "the learning-rate schedule needs the number of steps: "
                "set trainer.max_epochs or trainer.max_steps"
            )
        return int(steps)

    def training_step(self, batch: Batch | Sequence[Batch], batch_idx: int) -> torch.Tensor:
        """Computes a batch, or all micro-batches of an optimizer step.

        Returns:
            The sum of the losses of a batch. How many supervised tokens it is to be averaged over
            is known at the end of the optimizer step only, see `on_before_optimizer_step`. For a
            list of micro-batches, whose gradients are computed here: zero.
        """
        if isinstance(batch, Batch):
            return self._loss(batch)
        add_gradients(
            batch,
            self.trainer.datamodule.cut,
            start=self._reset_gradients,
            loss=self._loss,
            cut_again=self._cut_again,
        )
        if sharding_of(self.trainer)[0] == "ddp":
            return zero_loss(self.model)
        return self.step_sums.new_zeros((), requires_grad=True)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer) -> None:
        """Resets the gradients, unless `training_step` has just computed them."""
        if not self.trainer.datamodule or not self.trainer.datamodule.cuts_steps:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def _reset_gradients(self) -> None:
        self.optimizers().zero_grad()
        self._reset_sums()

    def _reset_sums(self) -> None:
        self.step_batches, self.step_sums = [], torch.zeros_like(self.step_sums)

    def _cut_again(self, micro_batches: Sequence[Batch]) -> list[Batch]:
        samples = []
        for batch in micro_batches:
            samples += map(self.processor.encode, batch.conversations)
        return [batch.to(self.device) for batch in self.trainer.datamodule.cut(samples)]

    def _loss(self, batch: Batch) -> torch.Tensor:
        """Returns the sum of the losses of a batch, for float16 times the loss scale."""
        output = self.model(**self.family.inputs(batch), num_items_in_batch=1)
        self.step_batches.append(batch)
        if not len(batch.target_positions):
            # Every row was dropped. The other ranks wait for gradients all the same.
            return output.logits.sum() * 0
        targets = batch.labels.flatten()[batch.target_positions + 1]
        correct = (output.logits.detach().argmax(-1) == targets).sum()
        sums = torch.stack((output.loss.detach().float(), correct.float()))
        self.step_sums = self.step_sums + sums
        if self.loss_scale is not None:
            return output.loss * self.loss_scale.scale
        return output.loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Scales the gradient to that of the mean loss over all supervised tokens of the step.

        Batches and ranks may have different numbers of supervised tokens.

        Raises:
            DataError: a trained tensor has no gradient or, in all first steps, one of zero; or the
                gradient of the step before was not finite.
        """
        self.guard.check(Path(self.trainer.default_root_dir), self.global_rank)
        self.zero_guard.check(rows_have_images=self._rows_have_images())
        supervised = sum(len(batch.target_positions) for batch in self.step_batches)
        # `new_full`, not a copy: a host-to-device copy would synchronize
        tokens = self.step_sums.new_full((1,), supervised)
        loss, correct, tokens = sum_over_ranks(torch.cat((self.step_sums, tokens)))
        gradients_by_name = self._gradients()
        self.zero_guard.note(gradients_by_name, self.step_batches, optimizer)
        gradients = list(gradients_by_name.values())
        # Lightning divided the loss by the number of micro-batches; DDP and FSDP average over ranks
        averaged_over = self.trainer.accumulate_grad_batches * self.trainer.world_size
        factor = averaged_over / tokens.clamp(min=1)
        if self.loss_scale is not None:
            factor = factor / self.loss_scale.scale
        _scale(gradients, factor)
        norm = torch.nn.utils.get_total_norm(gradients)
        self.gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        finite = self.gradient_norm.isfinite()
        # As GradScaler does: where `found_inf` is 1, the optimizer skips the step on the device.
        optimizer.found_inf = (~finite).float()
        if self.loss_scale is not None:
            finite = self.loss_scale.update(finite)
        self.guard.note(finite, step=self.trainer.global_step + 1, batches=self.step_batches)
        self.log("train/loss", loss / tokens.clamp(min=1))
        self.log("train/accuracy", correct / tokens.clamp(min=1))
        self.log("train/grad_norm", self.gradient_norm)
        self._reset_sums()

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ) -> None:
        """Clips gradients, which may be sharded, to the norm `gradient_clip_val`."""
        if gradient_clip_algorithm not in (None, "norm"):
            raise ValueError(
                f"trainer.gradient_clip_algorithm={gradient_clip_algorithm}: "
                f"gradients can be clipped by their norm only"
            )
        if gradient_clip_val:
            factor = gradient_clip_val / (self.gradient_norm + 1e-6)
            _scale(list(self._gradients().values()), factor.clamp(max=1))

    def on_train_end(self) -> None:
        self.guard.check(Path(self.trainer.default_root_dir), self.global_rank)
        self.zero_guard.finish(rows_have_images=self._rows_have_images())
        if self.load_device.type == "cuda":
            # Else Lightning would move the optimizer's state to the host, like the model: see `cpu`
            self.trainer.strategy.optimizers = []

    def cpu(self) -> VisionLanguageModule:
        """Does nothing for a model on a GPU.

        Lightning calls this when a run ends, in the `teardown` of each of its strategies. It would
        move tens of gigabytes to the host, which is slow and may exceed its memory.
        """
        return self if self.load_device.type == "cuda" else super().cpu()

    def _rows_have_images(self) -> bool:
        """Whether a training row has an image; True if that is not known."""
        data = self.trainer.datamodule
        return data is None or any(dataset.images for dataset in data.measured.values())

    def _gradients(self) -> dict[str, torch.Tensor]:
        gradients, missing = {}, []
        for name, tensor in self.model.named_parameters():
            if not tensor.requires_grad:
                continue
            if tensor.grad is None:
                missing.append(name)
            else:
                gradients[name] = tensor.grad
        if missing:
            more = ", ..." if len(missing) > 5 else ""
            raise DataError(
                f"{len(missing)} trainable tensors got no gradient: {', '.join(missing[:5])}{more}."
                f" Nothing in the batch depends on them: choose an adapter that does not train "
                f"them, or data that uses them"
            )
        return gradients

    def on_validation_epoch_start(self) -> None:
        data = self.trainer.datamodule
        advice = ""
        if data.generated_validation_rows < len(data.validation):
            advice = (
                f"; answer more than {data.generated_validation_rows} of the "
                f"{len(data.validation)} validation rows: data.generated_validation_rows=N"
            )
        self._start_scoring(["val"], advice)

    def validation_step(
        self, batch: Sequence[Batch], batch_idx: int, dataloader_idx: int = 0
    ) -> list[Prediction] | None:
        """Scores the reference answers of all rows (loader 0); answers some prompts (loader 1)."""
        if dataloader_idx == 1:
            return self._answer(batch, 0)
        self.answering.score(self._score_tokens, batch)
        return None

    def _score_tokens(self, batch: Batch) -> None:
        output = self.model(**self.family.inputs(batch))
        if output.loss is not None:  # else every row was dropped
            targets = batch.labels.flatten()[batch.target_positions + 1]
            correct = (output.logits.argmax(-1) == targets).sum()
            self.val_tokens.update(output.loss * len(targets), len(targets), correct)

    def on_validation_epoch_end(self) -> None:
        for name, value in self.val_tokens.compute().items():
            self.log(f"val/{name}", value.float())
        self.val_tokens.reset()
        if len(self.trainer.num_val_batches) > 1:
            self._log_scores(["val"])
            self.answering.free_memory()  # training needs it

    def on_test_epoch_start(self) -> None:
        self._start_scoring(self.trainer.datamodule.test_names)

    def test_step(
        self, batch: Sequence[Batch], batch_idx: int, dataloader_idx: int = 0
    ) -> list[Prediction]:
        return self._answer(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        names = self.trainer.datamodule.test_names
        self._log_scores(names)
        for name, metrics in zip(names, self.set_metrics, strict=True):
            for metric_name, metric in metrics.items():
                if count := getattr(metric, "count", 0):  # torchmetrics' own have none
                    self.log(f"{name}/{ROWS}_{metric_name}", float(count))
        for name, rows in zip(names, self.set_rows, strict=True):
            self.log(f"{name}/{ROWS}", float(rows), reduce_fx="sum", sync_dist=True)

    def on_predict_epoch_start(self) -> None:
        self.answering.begin()

    def predict_step(
        self, batch: Sequence[Batch], batch_idx: int, dataloader_idx: int = 0
    ) -> list[Prediction]:
        return self.predict(batch)

    def predict(self, batch: Batch | Sequence[Batch]) -> list[Prediction]:
        """Answers each row of batches of prompts, each with options for all of its rows or none."""
        return self.answering(batch)

    @property
    def evaluated_rows(self) -> BatchLimit:
        """The most rows of a batch that is evaluated, which is lowered when memory runs out."""
        return self.answering.halving.limit

    def rows_together(self, sizes: RowSizes) -> BatchChoice:
        """Chooses the batches of a set; the data module calls it for `eval_batch_size` "auto"."""
        return self.answering.choose_batches(sizes)

    def _answer(self, batch: Sequence[Batch], set_index: int) -> list[Prediction]:
        predictions = self.predict(batch)
        for metric in self.set_metrics[set_index].values():
            metric.update(predictions)
        self.set_rows[set_index] += len(predictions)
        return predictions

    def _start_scoring(self, set_names: Sequence[str], advice: str = "") -> None:
        self.answering.begin()
        self.set_metrics = nn.ModuleList()
        for set_name in set_names:
            copies = {name: metric.clone() for name, metric in self.metrics.items()}
            for name, metric in copies.items():
                metric.title, metric.advice = f"{set_name}/{name}", advice
            self.set_metrics.append(nn.ModuleDict(copies))
        self.set_metrics.to(self.device)
        self.set_rows = [0] * len(set_names)

    def _log_scores(self, names: Sequence[str]) -> None:
        for set_name, metrics in zip(names, self.set_metrics, strict=True):
            for name, metric in metrics.items():
                if (value := metric.compute()).isfinite():
                    self.log(f"{set_name}/{name}", value.float())
        warn_without_rows(chain.from_iterable(group.values() for group in self.set_metrics))


def _scale(gradients: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiplies all gradients in place, with a few kernels as torch's own clipping does."""
    torch._foreach_mul_([local_tensor(gradient) for gradient in gradients], factor)
